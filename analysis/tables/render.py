"""One table as Markdown, CSV and LaTeX (booktabs): the same cells in all three."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

_LATEX = {"\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#"}


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table.

    cells: what a reader sees, rounded.
    numbers: the same rows with all digits; run_ids names the runs behind a row, one blank between.
    sources: for columns of `cells` that come from other runs, the column of `numbers` with these.
    notes: what stands below.
    """

    name: str
    title: str
    cells: pd.DataFrame
    numbers: pd.DataFrame
    notes: list[str]
    sources: dict[str, str] = field(default_factory=dict)


def write(table: Table, out_dir: Path) -> list[Path]:
    """Write `name`.md, .csv (all digits) and .tex to `out_dir`; returns the files."""
    out_dir.mkdir(parents=True, exist_ok=True)
    files = [out_dir / f"{table.name}.{suffix}" for suffix in ("md", "csv", "tex")]
    files[0].write_text(_markdown(table), encoding="utf-8", newline="\n")
    table.numbers.to_csv(files[1], index=False, lineterminator="\n")
    files[2].write_text(_latex(table), encoding="utf-8", newline="\n")
    return files


def number(value: float, digits: int) -> str:
    """A rounded number, or nothing where it is missing."""
    return "" if pd.isna(value) else f"{value:.{digits}f}"


def rounded(values: pd.Series, digits: int) -> list[str]:
    """`number` of each value of a column."""
    return [number(value, digits) for value in values]


def median_and_range(row: pd.Series, median: str, of: str, form: str) -> str:
    """A median over launches, followed by their smallest and largest value if there are several.

    of: the columns min_X and max_X. form: a format specification.
    """
    text = f"{row[median]:{form}}"
    if row["num_launches"] == 1:
        return text
    return f"{text} ({row[f'min_{of}']:{form}} to {row[f'max_{of}']:{form}})"


def _markdown(table: Table) -> str:
    columns = list(table.cells)
    lines = [f"# {table.title}", "", _row(columns), _row(["---"] * len(columns))]
    lines += [_row(row) for row in table.cells.itertuples(index=False)]
    return "\n".join([*lines, "", *table.notes]) + "\n"


def _row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _latex(table: Table) -> str:
    columns = list(table.cells)
    rows = [columns, *table.cells.itertuples(index=False)]
    head, *body = [" & ".join(map(_escape, row)) + r" \\" for row in rows]
    lines = [f"% {note}" for note in table.notes]
    lines += [rf"\begin{{tabular}}{{{'l' * len(columns)}}}", r"\toprule", head, r"\midrule"]
    return "\n".join([*lines, *body, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _escape(text: object) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in str(text))
