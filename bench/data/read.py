"""Reads one file of a set into a table: .parquet, .csv or .jsonl."""

import csv
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedara_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

# A cell with so many times the lines that most cells have is told of.
LONG_CELL = 10


def read_table(path: Path, text_column: str, label_column: str) -> "pd.DataFrame":
    """The table in a file.

    In CSV all cells are text, and an empty one is null. A byte order mark is skipped. Warns, with
    the line, of a CSV cell that seems to have swallowed rows. Raises InputError for a file that can
    not be read, or in which one of the two columns occurs more than once.
    """
    import pandas as pd

    used = (text_column, label_column)
    try:
        if path.suffix == ".parquet":
            frame = pd.read_parquet(path)
            for column in frame.columns.intersection(list(used)):
                frame[column].tolist()  # text that is not UTF-8 is found only here
        elif path.suffix == ".csv":
            frame = _read_csv(path, used)
            _warn_of_long_cells(path, frame, used)
        else:
            with path.open(encoding="utf-8-sig") as lines:
                rows = [_json_object(line, used) for line in lines if line.strip()]
            frame = pd.DataFrame(rows, dtype=object)
    except Exception as error:  # damaged files raise many kinds
        raise InputError(
            f"dataset file {path}: cannot be read: {one_line(error)}; "
            f"allowed: a valid {path.suffix} file"
        ) from None
    return frame


def one_line(error: Exception) -> str:
    """The start of an error's text, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:200].encode("ascii", "backslashreplace").decode()


def _read_csv(path: Path, used: Sequence[str]) -> "pd.DataFrame":
    import pandas as pd

    as_text: dict[str, Any] = {"dtype": str, "keep_default_na": False}
    # pandas would rename the second of two columns of one name.
    _require_once(pd.read_csv(path, header=None, nrows=1, **as_text).iloc[0].tolist(), used)
    # Only an empty cell is null; by default pandas reads texts such as "NA" as null, too.
    frame: pd.DataFrame = pd.read_csv(path, na_values=[""], **as_text)
    if not isinstance(frame.index, pd.RangeIndex):
        raise pd.errors.ParserError("rows have more fields than the header")
    return frame


def _json_object(line: str, used: Sequence[str]) -> dict[str, Any]:
    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _require_once([key for key, _ in pairs], used)
        return dict(pairs)

    value = json.loads(line, object_pairs_hook=table)
    if not isinstance(value, dict):
        raise TypeError(f"{line.strip()[:40]!r} is not a JSON object")
    return value


def _require_once(names: list[str], used: Sequence[str]) -> None:
    for name in used:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} occurs {names.count(name)} times")


def _warn_of_long_cells(path: Path, frame: "pd.DataFrame", used: Sequence[str]) -> None:
    """Warn of quoted cells that hold rows of this table, or many lines among short ones."""
    columns = [column for column in used if column in frame.columns]
    if frame.empty or len(columns) < len(used):
        return
    cells = frame[columns].fillna("")
    num_lines = 1 + np.max([cells[column].str.count("\n") for column in columns], axis=0)
    place, labels = list(frame.columns).index(used[1]), set(cells[used[1]])
    found = [
        row
        for row in np.flatnonzero(num_lines > 1)
        if num_lines[row] >= LONG_CELL * np.median(num_lines)
        or any(_holds_row(cell, len(frame.columns), place, labels) for cell in cells.iloc[row])
    ]
    if found:
        first = int(found[0])
        warnings.warn(
            f"dataset file {path}: line {_first_line(path, first)}: a quoted cell goes on for "
            f"{num_lines[first]} lines, where most have {np.median(num_lines):g}; cells like it "
            f"in this file: {len(found)}. A stray quote swallows the rows that follow it",
            RuntimeWarning,
            stacklevel=3,
        )


def _holds_row(cell: str, num_fields: int, place: int, labels: set[str]) -> bool:
    """Whether a line of a cell of several lines reads like a row with a known label."""
    rows = [line.rstrip("\r").split(",") for line in cell.split("\n")]
    return len(rows) > 1 and any(len(row) == num_fields and row[place] in labels for row in rows)


def _first_line(path: Path, row: int) -> int:
    """The line, counted from 1, at which a row of a CSV file starts; rows count from 0."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            starts = _row_starts(csv.reader(file))
            return next(start for index, start in enumerate(starts) if index == row + 1)
    finally:
        csv.field_size_limit(limit)


def _row_starts(reader: Any) -> Iterator[int]:
    """The first line of the header and of each row; empty lines are none."""
    start = 1
    for fields in reader:
        if fields:
            yield start
        start = reader.line_num + 1
