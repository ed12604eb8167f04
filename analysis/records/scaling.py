"""Records of `fedara micro scaling`: seconds and efficiency by number of processes."""

from pathlib import Path

import pandas as pd

from analysis.records.campaign import NotDrawn
from analysis.records.launches import Launches, load_launches
from analysis.records.provenance import joined

# What the launches of one line of the figure share.
GROUP = ["scaling", "method", "model", "per_round", "backend", "cpu", "num_cores"]


def load_scaling(path: Path) -> Launches | None:
    """The launches below `path`; None if there is none. Raises InputError for a damaged one."""
    return load_launches(path, "micro-scaling", ("scaling", "method", "cohort", "median_seconds"))


def scaling_points(scaling: Launches) -> pd.DataFrame:
    """One row per number of processes of each GROUP.

    per_round: clients of a round (strong) or of each process (weak). seconds: of a round, of the
    slowest process, median over launches; {min,max}_seconds: their range. ideal_seconds: from the
    fewest processes. efficiency: ideal to measured seconds. Also num_launches, run_ids. Raises
    NotDrawn.
    """
    rows = scaling.rows
    if rows.empty:
        raise NotDrawn("no launch of fedara micro scaling finished a round")
    of_process = rows["cohort"] // rows["world_size"]
    rows = rows.assign(per_round=rows["cohort"].where(rows["scaling"] == "strong", of_process))
    frame = rows.groupby([*GROUP, "world_size"], as_index=False).agg(
        seconds=("median_seconds", "median"),
        min_seconds=("median_seconds", "min"),
        max_seconds=("median_seconds", "max"),
        num_launches=("run_id", "nunique"),
        run_ids=("run_id", joined),
    )
    first = frame.groupby(GROUP)[["world_size", "seconds"]].transform("first")
    share = (first["world_size"] / frame["world_size"]).where(frame["scaling"] == "strong", 1.0)
    frame["ideal_seconds"] = first["seconds"] * share
    frame["efficiency"] = frame["ideal_seconds"] / frame["seconds"]
    return frame
