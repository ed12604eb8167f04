"""What the tables of micro-benchmarks share: a launch is the replicate."""

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from analysis.records.provenance import joined


def over_launches(
    rows: pd.DataFrame, group: Sequence[str], columns: Sequence[str], spread: Sequence[str]
) -> pd.DataFrame:
    """One row per group: the columns' medians over launches, num_launches and run_ids.

    Columns in `spread` also get lower_X and upper_X, their quartiles, and num_X, the launches that
    have them. A column that no launch has is empty.
    """
    rows = rows.reindex(columns=[*dict.fromkeys([*group, *columns, *spread, "run_id"])])
    groups = rows.groupby([*group], as_index=False, dropna=False, sort=False)
    aggregates: dict[str, Any] = {name: (name, "median") for name in columns}
    for name in spread:
        aggregates |= {
            name: (name, "median"),
            f"lower_{name}": (name, lambda values: values.quantile(0.25)),
            f"upper_{name}": (name, lambda values: values.quantile(0.75)),
            f"num_{name}": (name, "count"),
        }
    frame: pd.DataFrame = groups.agg(
        num_launches=("run_id", "nunique"), **aggregates, run_ids=("run_id", joined)
    )
    return frame


def medians_and_quartiles(
    frame: pd.DataFrame, name: str, form: Callable[[float], str]
) -> list[str]:
    """Such as "0.90 (0.85 to 0.94)"; fewer launches than the row's are named; nothing if none."""
    return [_median_and_quartiles(row, name, form) for _, row in frame.iterrows()]


def _median_and_quartiles(row: pd.Series, name: str, form: Callable[[float], str]) -> str:
    count = row[f"num_{name}"]
    if count == 0:
        return ""
    middle, lower, upper = (form(row[f"{which}{name}"]) for which in ("", "lower_", "upper_"))
    if count == 1:
        return middle
    fewer = f", {count} launches" if count < row["num_launches"] else ""
    return f"{middle} ({lower} to {upper}{fewer})"


def three_digits(value: float) -> str:
    """Such as "0.123", "12.3" or "1230"; nothing for a missing value."""
    return "" if pd.isna(value) else f"{float(f'{value:.3g}'):g}"


def milliseconds(seconds: float) -> str:
    return three_digits(1e3 * seconds)
