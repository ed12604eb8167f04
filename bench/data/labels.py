"""What the values of a label column mean: names, or indices into a list of names.

A number in CSV is text that looks like one. So all labels of a set decide together what they are;
where two readings are possible and differ, the set is refused.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bench.data.read import one_line
from bench.data.texts import TextDataset, listed, shown
from fedara_core import strict_json
from fedara_core.errors import InputError

# An integer as it is written by who means one: neither 01 nor -0 nor 1.0.
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,99}")
_DIGITS = re.compile(r"-?[0-9]{1,100}")
_TRUTH = ("true", "false")
_LIKE_MISSING = ("", "nan", "none", "null", "n/a", "na", "<na>", "nil", "-", "?")


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split as it was read. source: what an error message calls it. is_csv: the values are
    cells, all of them text."""

    source: str
    texts: list[str]
    values: list[int | str]
    is_csv: bool = False


def names_in(path: Path) -> list[str] | None:
    """The label names of a labels.json, or None where there is no such file. Raises InputError."""
    if not path.exists():
        return None
    allowed = 'allowed: a JSON list of different names, or {"labels": [names]}'
    try:
        content = strict_json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"dataset file {path}: cannot be read: {one_line(error)}; {allowed}"
        ) from None
    names = content.get("labels") if isinstance(content, dict) else content
    if not isinstance(names, list) or not names or not all(isinstance(x, str) for x in names):
        raise InputError(f"dataset file {path}: holds no list of names; {allowed}")
    if len(set(names)) < len(names):
        repeated = min(name for name in names if names.count(name) > 1)
        raise InputError(f"dataset file {path}: {repeated!r:.80} occurs more than once; {allowed}")
    for index, name in enumerate(names):
        if is_half(name):
            raise InputError(
                f"dataset file {path}: name {index}: {name!r:.80} holds a lone surrogate, which is "
                "half a character; allowed: whole characters (names count from 0)"
            )
    return names


def is_half(text: str) -> bool:
    """Whether a text holds a lone surrogate, which no file and no tokeniser takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def wrong_row(source: str, row: int, problem: str, allowed: str) -> InputError:
    """The error of a row, which is counted from 0."""
    return InputError(
        f"dataset split {source}: row {row}: {problem}; allowed: {allowed} (rows count from 0)"
    )


def encoded(
    name: str,
    names: Sequence[str] | None,
    train: Split,
    test: Split,
    *,
    only_indices: bool = False,
) -> TextDataset:
    """Both splits with label ids.

    Without names, the labels are the sorted values of the train split, integers first. With names,
    the cells of CSV files are names if one of them is, else indices; integers of other files are
    indices. only_indices: integers can be nothing else, as in a hub set with class names.

    Warns of what looks like a missing label. Raises InputError for a label that is not known, and
    for labels that can be read in two ways.
    """
    splits = [train, test]
    _require_one_kind(splits)
    ids: dict[int | str, int]
    if names is None:
        if not _only_look_like_integers(_cells(splits)):
            splits = _with_integers(splits)
        values = sorted(set(splits[0].values), key=lambda value: (isinstance(value, str), value))
        names = [str(value) for value in values]
        _require_different(names, splits[0])
        ids = {value: label_id for label_id, value in enumerate(values)}
        allowed = f"{listed(names)}, which are the labels of the train split"
    else:
        splits = _read_by_names(splits, names, only_indices)
        ids = {key: label_id for label_id, pair in enumerate(enumerate(names)) for key in pair}
        allowed = f"{listed(names)}; or, where no label is a name, 0 to {len(names) - 1}"
    train, test = splits
    dataset = TextDataset(
        name=name,
        labels=tuple(names),
        train_texts=train.texts,
        train_labels=_label_ids(train, ids, allowed),
        test_texts=test.texts,
        test_labels=_label_ids(test, ids, allowed),
    )
    _warn_of_labels(dataset)
    return dataset


def _cells(splits: Sequence[Split]) -> set[str]:
    """The different label cells of CSV files."""
    return {str(cell) for split in splits if split.is_csv for cell in split.values}


def _with_integers(splits: Sequence[Split]) -> list[Split]:
    """The splits with the cells of CSV files that are integers as such."""
    integers = {cell: int(cell) for cell in _cells(splits) if _INTEGER.fullmatch(cell)}
    return [
        replace(s, values=[integers.get(str(v), v) for v in s.values]) if s.is_csv else s
        for s in splits
    ]


def _only_look_like_integers(cells: set[str]) -> bool:
    """Whether a cell is made of digits and is no integer, such as 01; then all are text."""
    return any(_DIGITS.fullmatch(cell) and not _INTEGER.fullmatch(cell) for cell in cells)


def _require_one_kind(splits: Sequence[Split]) -> None:
    """Python takes true for 1."""
    if {bool, int} <= {type(value) for split in splits for value in split.values}:
        raise InputError(
            f"dataset split {splits[0].source}: labels are true or false in some rows and "
            "integers in others; allowed: one of the two"
        )


def _require_different(names: list[str], split: Split) -> None:
    """The names of the values of a split."""
    if len(set(names)) < len(names):
        repeated = min(name for name in names if names.count(name) > 1)
        raise InputError(
            f"dataset split {split.source}: label {repeated!r:.80} is a string in some rows and "
            "none in others; allowed: one of the two"
        )


def _read_by_names(
    splits: Sequence[Split], names: Sequence[str], only_indices: bool
) -> list[Split]:
    """The splits with strings where labels are names, and integers where they are indices."""
    cells = _cells(splits)
    if cells & set(names):
        _require_names(splits, cells, names)
    else:
        splits = _with_integers(splits)
    typed = [split for split in splits if not split.is_csv]
    integers = {v for split in typed for v in split.values if not isinstance(v, str)}
    spelled = _spelled(integers, names)
    if only_indices or not spelled:
        return list(splits)
    if all(0 <= value < len(names) for value in integers):
        _require_equal_readings(spelled, names, typed[0].source)
        return list(splits)
    return [
        replace(s, values=[v if isinstance(v, str) else spelled.get(v, v) for v in s.values])
        for s in splits
    ]


def _require_names(splits: Sequence[Split], cells: set[str], names: Sequence[str]) -> None:
    """Where some cells of CSV files are names, an integer among the others is no index."""
    odd = sorted(cell for cell in cells - set(names) if _INTEGER.fullmatch(cell))
    for split in splits:
        if odd and odd[0] in split.values:
            other = min(cells & set(names))
            problem = f"label {odd[0]} is no name in labels.json, and label {other!r:.80} is one"
            allowed = f"only names, {listed(names)}; or only indices"
            raise wrong_row(split.source, split.values.index(odd[0]), problem, allowed)


def _spelled(integers: set[int], names: Sequence[str]) -> dict[int, str]:
    """The name that each integer or truth value spells; none if there is one that spells none."""
    by_text = {name.lower() if name.lower() in _TRUTH else name: name for name in names}
    spelled = {v: by_text[str(v).lower()] for v in integers if str(v).lower() in by_text}
    return spelled if len(spelled) == len(integers) else {}


def _require_equal_readings(spelled: dict[int, str], names: Sequence[str], source: str) -> None:
    """An integer column holds indices, unless its numbers are names of other indices."""
    for value, name in spelled.items():
        if names[value] != name:
            raise InputError(
                f"dataset split {source}: label {value} is the name {name!r} in labels.json, and "
                f"as an index it is {names[value]!r:.80}; allowed: strings for names, or names "
                "that are no numbers"
            )


def _label_ids(split: Split, ids: dict[int | str, int], allowed: str) -> np.ndarray:
    for row, value in enumerate(split.values):
        if value not in ids:
            raise wrong_row(split.source, row, f"label {value!r:.80} is not known", allowed)
    return np.array([ids[value] for value in split.values], dtype=np.int64)


# ---- what looks wrong, and may be right ----


def _warn_of_labels(dataset: TextDataset) -> None:
    for problem in _doubts(dataset):
        text = f"dataset {shown(dataset.name, 80)}: {problem}"
        warnings.warn(text, RuntimeWarning, stacklevel=4)


def _doubts(dataset: TextDataset) -> list[str]:
    """What looks like a missing label, or like one label written in two ways; and labels that only
    the test split has."""
    train, test = dataset.label_counts
    used = [i for i in range(len(dataset.labels)) if train[i] or test[i]]
    missing = [i for i in used if dataset.labels[i].strip().lower() in _LIKE_MISSING]
    integers = [i for i in used if _INTEGER.fullmatch(dataset.labels[i])]
    negative = [i for i in integers if dataset.labels[i].startswith("-")]
    if len(negative) == 1 and len(integers) > 1:
        missing += negative
    doubts = [
        f"label {dataset.labels[i]!r} ({train[i]} train, {test[i]} test examples) looks like a "
        "missing label; it is trained as a class of its own"
        for i in missing
    ]
    spellings: dict[str, list[str]] = {}
    for i in used:
        spellings.setdefault(dataset.labels[i].strip().casefold(), []).append(dataset.labels[i])
    doubts += [
        f"labels {listed(map(repr, same))} differ only in case or spaces; they are classes apart"
        for same in spellings.values()
        if len(same) > 1
    ]
    untrained = [i for i in used if not train[i]]
    if untrained:
        doubts.append(
            f"no train example has {listed(dataset.labels[i] for i in untrained)}, which "
            f"{test[untrained].sum()} of {test.sum()} test examples have"
        )
    return doubts
