"""Sets in tables: file:DIR, a folder of .parquet, .csv or .jsonl files, and Hugging Face sets."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.config.sections import DatasetConfig
from bench.data.labels import Split, encoded, is_half, names_in, wrong_row
from bench.data.read import one_line, read_table
from bench.data.texts import TextDataset, listed
from fedara_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

ALLOWED_NAMES = "docstrings, toy, file:DIR, or a Hugging Face name[:configuration]"
SUFFIXES = (".parquet", ".csv", ".jsonl")


def load_folder(config: DatasetConfig) -> TextDataset:
    """Load file:DIR: a folder with one train file, one test file, and optionally labels.json.

    The files have the columns config.text_column and config.label_column. labels.json is a list of
    names, or {"labels": [names]}: an integer label is an index into it, a string is a name in it.
    Without it the labels are the sorted values of the train split. In CSV an empty cell is null;
    bench/data/labels.py says what numbers in its label column are.

    Raises InputError for a file that can not be read, a missing column, a null text or label, a
    label that is not in labels.json or can be read in two ways, half a character, and a split
    without rows. Warns of what looks like swallowed rows or missing labels. Rows count from 0.
    """
    *paths, names = folder_files(config)
    columns = config.text_column, config.label_column
    train, test = (_split_of(read_table(path, *columns), str(path), config) for path in paths)
    return encoded(config.name, names_in(names), train, test)


def folder_files(config: DatasetConfig) -> tuple[Path, Path, Path]:
    """The train file, the test file and labels.json of file:DIR; the last need not exist. Raises
    InputError."""
    name = config.name.removeprefix("file:")
    folder = _folder(name)
    if folder is None:
        raise InputError(
            f"dataset.name = {config.name!r}: no folder {name!r}; "
            "allowed: file:DIR, where DIR holds a train and a test file"
        )
    return _split_file(folder, "train"), _split_file(folder, "test"), folder / "labels.json"


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
    return encoded(config.name, names, train, test, only_indices=True)


def _folder(name: str) -> Path | None:
    """The folder of this name, if there is one."""
    try:
        folder = Path(name).expanduser()
        return folder if name and folder.is_dir() else None
    except (OSError, RuntimeError):  # a name too long, or ~ of nobody
        return None


def _split_file(folder: Path, split: str) -> Path:
    wanted = [folder / f"{split}{suffix}" for suffix in SUFFIXES]
    found = [path for path in wanted if path.is_file()]
    if len(found) != 1:
        names = ", ".join(path.name for path in found or wanted)
        problem = f"several {split} files ({names})" if found else f"none of {names}"
        raise InputError(f"dataset folder {folder}: {problem}; allowed: exactly one {split} file")
    return found[0]


def _split_of(frame: "pd.DataFrame", source: str, config: DatasetConfig) -> Split:
    """The text and label columns of a table, checked."""
    if frame.empty:
        raise InputError(f"dataset split {source}: no rows; allowed: at least one")
    for key, column in (("text", config.text_column), ("label", config.label_column)):
        if column not in frame.columns:
            raise InputError(
                f"dataset.{key}_column = {column!r} is not in {source}; "
                f"allowed: {listed(map(str, frame.columns))}"
            )
        nulls = np.flatnonzero(frame[column].isna())
        if len(nulls):
            raise wrong_row(source, nulls[0], f"{column} is null", f"a {key} in every row")
    texts = frame[config.text_column].tolist()
    values = frame[config.label_column].tolist()
    _require_type(texts, str, "a string", source, config.text_column)
    _require_type(values, int | str, "an integer or a string", source, config.label_column)
    return Split(source=source, texts=texts, values=values, is_csv=source.endswith(".csv"))


def _require_type(values: list[Any], types: Any, allowed: str, source: str, column: str) -> None:
    for row, value in enumerate(values):
        if not isinstance(value, types):
            problem = f"{column} = {value!r:.80}"
            raise wrong_row(source, row, problem, f"{allowed} in every row")
        if isinstance(value, str) and is_half(value):
            problem = f"{column} = {value!r:.80} holds a lone surrogate, which is half a character"
            raise wrong_row(source, row, problem, "whole characters")


def _fetch(name: str) -> dict[str, Any]:
    """The splits of a Hugging Face set, from the network or the local cache."""
    import datasets

    path, _, configuration = name.partition(":")
    try:
        splits: dict[str, Any] = datasets.load_dataset(path, configuration or None)
    except Exception as error:  # builders, hub client and its HTTP library share no base class
        raise InputError(
            f"dataset.name = {name!r} cannot be fetched ({one_line(error)}); "
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
