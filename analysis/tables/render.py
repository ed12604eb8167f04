"""One table as Markdown, CSV and LaTeX (booktabs): the same cells in all three."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

_LATEX = str.maketrans(
    {letter: f"\\{letter}" for letter in "_%&#${}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)
# What would end a cell, or be read as HTML, code or a link.
_MARKDOWN = str.maketrans({letter: f"\\{letter}" for letter in "\\|<`"})


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


def number(value: float, digits: int, form: str = "") -> str:
    """A rounded number, or nothing where it is missing; form: a format's sign and "," if any."""
    return "" if pd.isna(value) else f"{value:{form}.{digits}f}"


def rounded(values: pd.Series, digits: int) -> list[str]:
    """`number` of each value of a column."""
    return [number(value, digits) for value in values]


def medians_and_ranges(frame: pd.DataFrame, name: str, form: Callable[[float], str]) -> pd.Series:
    """Medians over launches, with the columns min_X and max_X where there are several."""
    median, low, high = (frame[column].map(form) for column in (name, f"min_{name}", f"max_{name}"))
    return median.where(frame["num_launches"] == 1, median + " (" + low + " to " + high + ")")


def _markdown(table: Table) -> str:
    columns = list(table.cells)
    lines = [f"# {table.title}", "", markdown_row(columns), markdown_row(["---"] * len(columns))]
    lines += [markdown_row(row) for row in table.cells.itertuples(index=False)]
    return "\n".join([*lines, "", *table.notes]) + "\n"


def markdown_row(cells: Iterable[object]) -> str:
    """One row of a table in Markdown."""
    return f"| {' | '.join(markdown_text(str(cell)) for cell in cells)} |"


def markdown_text(text: str) -> str:
    """A text from records as Markdown that shows it."""
    return text.translate(_MARKDOWN).replace("](", "]\\(")


def _latex(table: Table) -> str:
    columns = list(table.cells)
    rows = [columns, *table.cells.itertuples(index=False)]
    head, *body = [" & ".join(map(_escape, row)) + r" \\" for row in rows]
    lines = [f"% {note}" for note in table.notes]
    lines += [rf"\begin{{tabular}}{{{'l' * len(columns)}}}", r"\toprule", head, r"\midrule"]
    return "\n".join([*lines, *body, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _escape(text: object) -> str:
    return str(text).translate(_LATEX)
