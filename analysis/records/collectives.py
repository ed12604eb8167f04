"""Records of `fedara micro collectives`: medians over launches of every measured combination."""

from pathlib import Path

import pandas as pd

from analysis.records.launches import Launches, load_launches
from analysis.records.provenance import joined

# What the launches of one combination share.
_POINT = [
    *("backend", "world_size", "call", "path", "codec"),
    *("payload_bytes", "density", "overlap", "num_clients"),
]
_MEDIANS = [
    *("part_bytes", "union_bytes", "layout_bytes", "num_rows", "model_bytes"),
    *("counted_bytes_received", "measured_bytes"),
    *("median_seconds", "bare_median_seconds", "ratio", "sizes_first_ratio"),
]


def load_collectives(path: Path) -> Launches | None:
    """The launches below `path`; None if there is none. Raises InputError for a damaged one."""
    required = ("call", "payload_bytes", "num_clients", "median_seconds")
    return load_launches(path, "micro-collectives", required)


def collective_points(collectives: Launches) -> pd.DataFrame:
    """One row per combination: medians over launches of sizes, bytes, times and ratios.

    Columns: _POINT, _MEDIANS, min_seconds and max_seconds (of the launches' median_seconds),
    min_ratio, max_ratio, bare_call, num_launches and run_ids.
    """
    rows = collectives.rows.reindex(columns=[*_POINT, *_MEDIANS, "run_id", "bare_call"])
    return rows.groupby(_POINT, as_index=False, dropna=False).agg(
        num_launches=("run_id", "nunique"),
        run_ids=("run_id", joined),
        **{name: (name, "median") for name in _MEDIANS},
        min_seconds=("median_seconds", "min"),
        max_seconds=("median_seconds", "max"),
        min_ratio=("ratio", "min"),
        max_ratio=("ratio", "max"),
        bare_call=("bare_call", "first"),
    )
