"""Text classification sets: docstrings (standard library), toy, file:DIR or Hugging Face."""

import ast
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.config.schema import DatasetConfig
from fedara_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

ALLOWED_NAMES = "docstrings, toy, file:DIR, or a Hugging Face name[:configuration]"
SUFFIXES = (".parquet", ".csv", ".jsonl")
MIN_WORDS = 4
# Keeps the draw of the validation part apart from other streams that start from the same seed.
HOLDOUT_TAG = 0x686F6C64

# Label -> its modules: files or folders of the standard library, private implementations included.
# One that the running Python lacks is skipped (_pydatetime is of 3.12, compression of 3.14).
# What distributions package apart from python3 (tkinter, turtle, idlelib, distutils) is not here.
TOPICS: dict[str, tuple[str, ...]] = {
    "argparse": ("argparse", "optparse", "getopt", "configparser", "shlex", "cmd"),
    "asyncio": ("asyncio",),
    "codecs": ("codecs", "encodings", "locale", "gettext", "base64", "quopri", "stringprep"),
    "collections": ("collections", "_collections_abc", "operator", "heapq", "bisect", "weakref"),
    "datetime": ("datetime", "_pydatetime", "_strptime", "calendar", "zoneinfo"),
    "decimal": ("decimal", "_pydecimal", "numbers", "fractions", "statistics", "random"),
    "email": ("email", "mailbox"),
    "http": ("http", "wsgiref", "socketserver", "xmlrpc"),
    "importlib": ("importlib", "pkgutil", "runpy", "zipimport", "modulefinder"),
    "inspect": ("inspect", "ast", "dis", "symtable", "tokenize", "pydoc", "pyclbr"),
    "logging": ("logging", "warnings"),
    "multiprocessing": ("multiprocessing", "concurrent"),
    "pathlib": (
        *("pathlib", "shutil", "os", "posixpath", "ntpath", "genericpath", "glob", "stat"),
        *("io", "_pyio", "tempfile", "fileinput"),
    ),
    "pdb": ("pdb", "bdb", "traceback", "trace", "tracemalloc", "timeit", "pstats"),
    "smtplib": ("smtplib", "imaplib", "poplib", "ftplib", "netrc"),
    "socket": ("socket", "ssl", "ipaddress", "selectors"),
    "tarfile": ("tarfile", "zipfile", "gzip", "bz2", "lzma", "_compression", "compression"),
    "threading": ("threading", "_threading_local", "queue", "sched", "contextlib", "functools"),
    "typing": ("typing", "types", "enum", "dataclasses", "abc", "_py_abc"),
    "unittest": ("unittest", "doctest"),
    "urllib": ("urllib",),
    "xml": ("xml",),
}

TOY_WORDS: dict[str, str] = {
    "weather": "rain storm cloud wind snow frost thunder sunny humid fog hail breeze",
    "kitchen": "bread butter oven flour sugar pepper soup onion garlic cheese pan salt",
    "music": "guitar melody drum chord singer piano violin rhythm choir song tempo bass",
    "sport": "goal referee match score player coach stadium race tennis medal league ball",
}
TOY_COMMON = "the a and very new old today people with some they said good long over much"


@dataclass(frozen=True, kw_only=True, eq=False)
class TextDataset:
    """A text classification set in memory; label id i is named labels[i].

    train_labels and test_labels are int64 arrays of shape (num_train,) and (num_test,).
    """

    name: str
    labels: tuple[str, ...]
    train_texts: list[str]
    train_labels: np.ndarray
    test_texts: list[str]
    test_labels: np.ndarray

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex over label names, texts and label ids of both splits.

        Every list is preceded by its length and every string by its number of UTF-8 bytes, so no
        two different sets feed the same bytes.
        """
        hasher = hashlib.sha256()
        for strings in (self.labels, self.train_texts, self.test_texts):
            hasher.update(len(strings).to_bytes(8, "little"))
            for string in strings:
                data = string.encode("utf-8", errors="surrogatepass")
                hasher.update(len(data).to_bytes(8, "little") + data)
        for ids in (self.train_labels, self.test_labels):
            hasher.update(len(ids).to_bytes(8, "little") + ids.astype("<i8").tobytes())
        return hasher.hexdigest()


BUILT_IN_SETS = ("docstrings", "toy")  # need no file and no network


def load_dataset(config: DatasetConfig) -> TextDataset:
    """Load the set that config.name names: docstrings, toy, file:DIR, or a Hugging Face name.

    A Hugging Face set may name its configuration after a colon ("glue:sst2"). Its train split is
    needed; its test split is used if there is one with labels (GLUE's hold -1 instead), else its
    validation split. No code that comes with a set is run.

    A file:DIR set is a folder (a relative one is looked up from the current directory) with one
    train file and one test file, suffix .parquet, .csv or .jsonl, columns config.text_column and
    config.label_column, and optionally labels.json: a list of names, or {"labels": [names]}. An
    integer label is an index into it, a string is a name in it; without it the labels are the
    sorted values of the train split. In CSV a label of digits is an integer, an empty cell null.

    Raises InputError for a set that can not be fetched or read, a missing column, a null text or
    label, a label that is not in labels.json, and a split without rows. Rows count from 0.
    """
    if config.name == "docstrings":
        return _docstrings(Path(sysconfig.get_path("stdlib")))
    if config.name == "toy":
        return _toy()
    if config.name.startswith("file:"):
        return _from_folder(config)
    return _from_hub(config)


def holdout(dataset: TextDataset, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split the train examples for tuning: (train_index, validation_index), sorted and disjoint.

    Both are int64 arrays of indices into train_texts; the validation part has
    floor(fraction * num_train) examples drawn without regard to their label, none at fraction 0.
    """
    assert 0 <= fraction < 1, fraction
    num_examples = len(dataset.train_texts)
    generator = np.random.default_rng(np.random.SeedSequence([seed, HOLDOUT_TAG]))
    order = generator.permutation(num_examples)
    num_validation = int(fraction * num_examples)
    return np.sort(order[num_validation:]), np.sort(order[:num_validation])


# ---- docstrings ----


def _docstrings(stdlib: Path) -> TextDataset:
    """Docstrings of modules, classes and functions under `stdlib`; the label is the topic.

    The names of all topics' modules are removed from all texts, not only from those of their own
    topic: otherwise a name in a text would say which topic the text does not belong to. Texts of
    fewer than MIN_WORDS words are dropped, and so is a text that occurs under several topics.
    """
    files = {label: list(_topic_files(stdlib, modules)) for label, modules in TOPICS.items()}
    names = _module_names(stdlib, files)
    found: dict[str, tuple[str, set[str]]] = {}
    for label, paths in files.items():
        for path in paths:
            for docstring in _file_docstrings(path):
                text = _without_names(docstring, names)
                if len(text.split()) >= MIN_WORDS:
                    found.setdefault(text.lower(), (text, set()))[1].add(label)
    labels = tuple(TOPICS)
    examples = [
        (hashlib.sha256(key.encode()).digest(), text, labels.index(topics.pop()))
        for key, (text, topics) in found.items()
        if len(topics) == 1
    ]
    _require_all_topics(stdlib, {label_id for _, _, label_id in examples})
    # Order and split come from the text alone, so a file that moves changes neither.
    examples.sort()
    train = [example for example in examples if example[0][0] % 5]
    test = [example for example in examples if example[0][0] % 5 == 0]
    return TextDataset(
        name="docstrings",
        labels=labels,
        train_texts=[text for _, text, _ in train],
        train_labels=np.array([label_id for _, _, label_id in train], dtype=np.int64),
        test_texts=[text for _, text, _ in test],
        test_labels=np.array([label_id for _, _, label_id in test], dtype=np.int64),
    )


def _topic_files(stdlib: Path, modules: Sequence[str]) -> Iterator[Path]:
    """The .py files of the modules, in a fixed order, without those of test folders."""
    for module in modules:
        file = stdlib / f"{module}.py"
        if file.is_file():
            yield file
        for path in sorted((stdlib / module).rglob("*.py")):
            if not {"test", "tests"} & set(path.relative_to(stdlib).parts):
                yield path


def _module_names(stdlib: Path, files: dict[str, list[Path]]) -> frozenset[str]:
    """Lower-case names of all topics, packages and modules, without underscores at either end."""
    parts = {
        part
        for paths in files.values()
        for path in paths
        for part in path.relative_to(stdlib).with_suffix("").parts
    }
    names = parts - {"__init__", "__main__"} | set(TOPICS)
    return frozenset(name.strip("_").lower() for name in names)


def _file_docstrings(path: Path) -> Iterator[str]:
    """Docstrings of the module and of all classes and functions in it, outermost first."""
    pending: list[ast.AST] = [ast.parse(path.read_bytes())]
    for node in pending:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
        # Expressions hold no definitions, and skipping them takes most of the walk's time away.
        children = ast.iter_child_nodes(node)
        pending.extend(x for x in children if isinstance(x, ast.stmt | ast.excepthandler))


def _without_names(text: str, names: frozenset[str]) -> str:
    """Remove `names` and compounds of them with "." or "_" from the text; make white space single.

    Of a dotted name the parts that are no such name stay: "asyncio.Task" becomes "Task".
    """

    def strip(match: re.Match[str]) -> str:
        return ".".join(part for part in match[0].split(".") if not _is_named(part, names))

    return " ".join(re.sub(r"\w+(?:\.\w+)*", strip, text).split())


def _is_named(identifier: str, names: frozenset[str]) -> bool:
    identifier = identifier.lower().strip("_")
    return identifier in names or not names.isdisjoint(identifier.split("_"))


def _require_all_topics(stdlib: Path, label_ids: set[int]) -> None:
    missing = [label for index, label in enumerate(TOPICS) if index not in label_ids]
    if missing:
        raise InputError(
            f"dataset.name = 'docstrings': no docstrings of {', '.join(missing)} under {stdlib}; "
            "allowed: a Python that has its standard library as .py files"
        )


# ---- toy ----


def _toy() -> TextDataset:
    """400 train and 120 test texts of 8 words, about half of them typical of one of 4 classes."""
    generator = np.random.default_rng(0)
    label_ids = np.arange(520, dtype=np.int64) % len(TOY_WORDS)
    vocabularies = [words.split() for words in TOY_WORDS.values()]
    common = TOY_COMMON.split()
    texts = []
    for label_id in label_ids:
        typical = generator.choice(vocabularies[label_id], size=8)
        anything = generator.choice(common, size=8)
        texts.append(" ".join(np.where(generator.random(8) < 0.5, typical, anything)))
    return TextDataset(
        name="toy",
        labels=tuple(TOY_WORDS),
        train_texts=texts[:400],
        train_labels=label_ids[:400],
        test_texts=texts[400:],
        test_labels=label_ids[400:],
    )


# ---- file:DIR and Hugging Face sets ----


@dataclass(frozen=True, kw_only=True)
class _Split:
    """One split as it was read: source is what an error message calls it."""

    source: str
    texts: list[str]
    values: list[int | str]


def _from_folder(config: DatasetConfig) -> TextDataset:
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
            return _read_csv(path)
        with path.open(encoding="utf-8") as lines:
            return pd.DataFrame(
                [_json_object(line) for line in lines if line.strip()], dtype=object
            )
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        raise InputError(
            f"dataset file {path}: cannot be read: {_one_line(error)}; "
            f"allowed: a valid {path.suffix} file"
        ) from None


def _read_csv(path: Path) -> "pd.DataFrame":
    import pandas as pd

    # Only an empty cell is null: pandas would take a text such as "NA" or "None" for one as well.
    frame = pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])
    if not isinstance(frame.index, pd.RangeIndex):
        raise pd.errors.ParserError("rows have more fields than the header")
    return frame


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
            raise InputError(
                f"dataset split {source}: row {nulls[0]}: {column} is null; "
                f"allowed: a {key} in every row (rows count from 0)"
            )
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
            raise InputError(
                f"dataset split {source}: row {row}: {column} = {value!r:.80}; "
                f"allowed: {allowed} in every row (rows count from 0)"
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
            raise InputError(
                f"dataset split {split.source}: row {row}: label {value!r:.80} is not known; "
                f"allowed: {_listed(names)} (rows count from 0)"
            )
    return np.array([ids[value] for value in split.values], dtype=np.int64)


def _from_hub(config: DatasetConfig) -> TextDataset:
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


def _listed(names: list[str]) -> str:
    listed = ", ".join(names[:50]) + (", ..." if len(names) > 50 else "")
    return f"{listed}; or, in a file with labels.json, 0 to {len(names) - 1}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
