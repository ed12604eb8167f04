"""Sets in tables: file:DIR, a folder of .parquet, .csv or .jsonl files, and Hugging Face sets."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.config.sections import DatasetConfig
from bench.data.texts import TextDataset
from fedara_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

ALLOWED_NAMES = "docstrings, toy, file:DIR, or a Hugging Face name[:configuration]"
SUFFIXES = (".parquet", ".csv", ".jsonl")


@dataclass(frozen=True, kw_only=True)
class _Split:
    """One split as it was read: source is what an error message calls it."""

    source: str
    texts: list[str]
    values: list[int | str]


def load_folder(config: DatasetConfig) -> TextDataset:
    """Load file:DIR: a folder with one train file, one test file, and optionally labels.json.

    The files have the columns config.text_column and config.label_column. labels.json is a list of
    names, or {"labels": [names]}: an integer label is an index into it, a string is a name in it.
    Without it the labels are the sorted values of the train split. In CSV a label of digits is an
    integer, and an empty cell is null.

    Raises InputError for a file that can not be read, a missing column, a null text or label, a
    label that is not in labels.json, and a split without rows. Rows count from 0.
    """
    name = config.name.removeprefix("file:")
    folder = Path(name).expanduser()
    if not name or not folder.is_dir():
        raise InputError(
            f"dataset.name = {config.name!r}: no folder {name!r}; "
            "allowed: file:DIR, where DIR holds a train and a test file"
        )
    paths = [_split_file(folder, split) for split in ("train", "test")]
    train, test = (_split_of(_read_table(path), str(path), config) for path in paths)
    return _encoded(config.name, _names_in(folder / "labels.json"), train, test)


def load_from_hub(config: DatasetConfig) -> TextDataset:
    """Load a Hugging Face set; its configuration may follow a colon ("glue:sst2").

    It needs a train split. The test split is used if it has labels (GLUE's hold -1 instead), else
    the validation split. No code that comes with a set is run. Raises InputError.
    """
    splits = _fetch(config.name)
    if "train" not in splits:
        raise InputError(
            f"dataset.name = {config.name!r}: no train split among {', '.join(splits)}; "
            "allowed: a set with the splits train and test or validation"
        )
    train = _split_of(splits["train"].to_pandas(), f"{config.name} train", config)
    test_name = _labelled_split(splits, config)
    test = _split_of(splits[test_name].to_pandas(), f"{config.name} {test_name}", config)
    # A ClassLabel feature knows the names of its ids; other features do not have the attribute.
    names = getattr(splits["train"].features[config.label_column], "names", None)
    return _encoded(config.name, names, train, test)


def _split_file(folder: Path, split: str) -> Path:
    wanted = [folder / f"{split}{suffix}" for suffix in SUFFIXES]
    found = [path for path in wanted if path.is_file()]
    if len(found) != 1:
        names = ", ".join(path.name for path in found or wanted)
        problem = f"several {split} files ({names})" if found else f"none of {names}"
        raise InputError(f"dataset folder {folder}: {problem}; allowed: exactly one {split} file")
    return found[0]


def _read_table(path: Path) -> "pd.DataFrame":
    import pandas as pd

    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        if path.suffix == ".csv":
            # Only an empty cell is null; by default pandas reads texts such as "NA" as null, too.
            frame = pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])
            if not isinstance(frame.index, pd.RangeIndex):
                raise pd.errors.ParserError("rows have more fields than the header")
            return frame
        with path.open(encoding="utf-8") as lines:
            rows = [_json_object(line) for line in lines if line.strip()]
        return pd.DataFrame(rows, dtype=object)
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        raise InputError(
            f"dataset file {path}: cannot be read: {_one_line(error)}; "
            f"allowed: a valid {path.suffix} file"
        ) from None


def _json_object(line: str) -> dict[str, Any]:
    value = json.loads(line)
    if not isinstance(value, dict):
        raise TypeError(f"{line.strip()[:40]!r} is not a JSON object")
    return value


def _split_of(frame: "pd.DataFrame", source: str, config: DatasetConfig) -> _Split:
    """The text and label columns of a table, checked."""
    if frame.empty:
        raise InputError(f"dataset split {source}: no rows; allowed: at least one")
    for key, column in (("text", config.text_column), ("label", config.label_column)):
        if column not in frame.columns:
            raise InputError(
                f"dataset.{key}_column = {column!r} is not in {source}; "
                f"allowed: {', '.join(map(str, frame.columns))}"
            )
        nulls = np.flatnonzero(frame[column].isna())
        if len(nulls):
            raise _wrong_row(source, nulls[0], f"{column} is null", f"a {key} in every row")
    texts = frame[config.text_column].tolist()
    values = frame[config.label_column].tolist()
    _require_type(texts, str, "a string", source, config.text_column)
    if source.endswith(".csv"):
        values = [int(value) if re.fullmatch(r"-?[0-9]+", value) else value for value in values]
    _require_type(values, int | str, "an integer or a string", source, config.label_column)
    return _Split(source=source, texts=texts, values=values)


def _require_type(values: list[Any], types: Any, allowed: str, source: str, column: str) -> None:
    for row, value in enumerate(values):
        if not isinstance(value, types):
            problem = f"{column} = {value!r:.80}"
            raise _wrong_row(source, row, problem, f"{allowed} in every row")


def _wrong_row(source: str, row: int, problem: str, allowed: str) -> InputError:
    return InputError(
        f"dataset split {source}: row {row}: {problem}; allowed: {allowed} (rows count from 0)"
    )


def _names_in(path: Path) -> list[str] | None:
    """The label names of a labels.json, or None where there is no such file."""
    if not path.is_file():
        return None
    allowed = 'allowed: a JSON list of different names, or {"labels": [names]}'
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"dataset file {path}: cannot be read: {_one_line(error)}; {allowed}"
        ) from None
    names = content.get("labels") if isinstance(content, dict) else content
    if not isinstance(names, list) or not names or not all(isinstance(x, str) for x in names):
        raise InputError(f"dataset file {path}: holds no list of names; {allowed}")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(f"dataset file {path}: {repeated[0]!r} occurs more than once; {allowed}")
    return names


def _encoded(name: str, names: list[str] | None, train: _Split, test: _Split) -> TextDataset:
    """Both splits with label ids; without names, the sorted values of the train split are taken."""
    ids: dict[int | str, int]
    if names is None:
        values = sorted(set(train.values), key=lambda value: (isinstance(value, str), value))
        names = [str(value) for value in values]
        ids = {value: label_id for label_id, value in enumerate(values)}
    else:
        ids = {key: label_id for label_id, pair in enumerate(enumerate(names)) for key in pair}
    return TextDataset(
        name=name,
        labels=tuple(names),
        train_texts=train.texts,
        train_labels=_label_ids(train, ids, names),
        test_texts=test.texts,
        test_labels=_label_ids(test, ids, names),
    )


def _label_ids(split: _Split, ids: dict[int | str, int], names: list[str]) -> np.ndarray:
    for row, value in enumerate(split.values):
        if value not in ids:
            listed = ", ".join(names[:50]) + (", ..." if len(names) > 50 else "")
            allowed = f"{listed}; or, in a file with labels.json, 0 to {len(names) - 1}"
            raise _wrong_row(split.source, row, f"label {value!r:.80} is not known", allowed)
    return np.array([ids[value] for value in split.values], dtype=np.int64)


def _fetch(name: str) -> dict[str, Any]:
    """The splits of a Hugging Face set, from the network or the local cache."""
    import datasets

    path, _, configuration = name.partition(":")
    try:
        splits: dict[str, Any] = datasets.load_dataset(path, configuration or None)
    except Exception as error:  # builders, hub client and its HTTP library share no base class
        raise InputError(
            f"dataset.name = {name!r} cannot be fetched ({_one_line(error)}); "
            f"allowed: {ALLOWED_NAMES} that is reachable or cached"
        ) from None
    return splits


def _labelled_split(splits: dict[str, Any], config: DatasetConfig) -> str:
    """The first of test and validation that exists and has labels."""
    for name in ("test", "validation"):
        split = splits.get(name)
        if split is None or config.label_column not in split.column_names:
            continue
        if set(split.unique(config.label_column)) - {-1, None}:
            return name
    raise InputError(
        f"dataset.name = {config.name!r}: no test or validation split with labels among "
        f"{', '.join(splits)}; allowed: a set with the splits train and test or validation"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
