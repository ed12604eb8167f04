"""Table: bytes, seconds and memory of each method, per data set and partition."""

import pandas as pd

from analysis.curves import is_panel
from analysis.ends import ends
from analysis.load import SERIES, Campaign, panels
from analysis.tables import Table, number

NAME = "cost"
_MEGABYTES = {
    "uplink_bytes": "up MB",
    "downlink_bytes": "down MB",
    "peak_memory_bytes": "peak memory MB",
    "peak_device_memory_bytes": "peak device memory MB",
}


def data(campaign: Campaign) -> pd.DataFrame:
    """One row per data set, partition, method and setting; means over runs.

    Columns: those, num_runs, uplink_bytes, downlink_bytes, total_seconds, local_train_seconds,
    peak_memory_bytes, peak_device_memory_bytes, and total_joules where every run measured it with
    the same energy_source.
    """
    runs = ends(campaign)
    columns = {
        "uplink_bytes": "cumulative_uplink_bytes",
        "downlink_bytes": "cumulative_downlink_bytes",
        "total_seconds": "total_seconds",
        "local_train_seconds": "all_local_train_seconds",
        "peak_memory_bytes": "peak_memory_bytes",
        "peak_device_memory_bytes": "peak_device_memory_bytes",
    }
    if _energy_gap(campaign) is None:
        joules = campaign.rounds.groupby("run_id")["total_joules"].sum()
        runs["total_joules"] = runs["run_id"].map(joules)
        columns["total_joules"] = "total_joules"
    frame = runs.groupby(SERIES, as_index=False).agg(
        num_runs=("run_id", "nunique"), **{name: (of, "mean") for name, of in columns.items()}
    )
    parts = [frame[is_panel(frame, panel)] for panel in panels(campaign)]
    return pd.concat(parts, ignore_index=True)


def table(campaign: Campaign) -> Table:
    """The table and what must be said below it."""
    frame = data(campaign)
    names = zip(frame["method"], frame["setting"], strict=True)
    cells = frame[["dataset", "partition"]].assign(
        method=[f"{method} ({setting})" if setting else method for method, setting in names],
        n=frame["num_runs"].astype(str),
    )
    for column, heading in _MEGABYTES.items():
        if frame[column].notna().any():
            cells[heading] = (frame[column] / 1e6).map(lambda value: number(value, 2))
    cells["seconds"] = frame["total_seconds"].map(lambda value: number(value, 1))
    cells["local training s"] = frame["local_train_seconds"].map(lambda value: number(value, 1))
    if "total_joules" in frame:
        cells["J"] = frame["total_joules"].map(lambda value: number(value, 1))
    notes = [
        "Means over n runs, summed over all rounds; memory is the peak of a process. 1 MB = 10^6",
        "bytes. Seconds compare methods only where runs had the same machine to themselves.",
        *([gap] if (gap := _energy_gap(campaign)) else []),
    ]
    return Table(name=NAME, title="Cost by method", cells=cells, numbers=frame, notes=notes)


def _energy_gap(campaign: Campaign) -> str | None:
    """Why energies can not stand in one column, or None where they can."""
    rounds = campaign.rounds
    if "total_joules" not in rounds or "energy_source" not in rounds:
        return "Energy: not measured in these runs."
    if rounds["total_joules"].isna().any() or rounds["energy_source"].isna().any():
        return "Energy: left out, since not every round measured it."
    if rounds["energy_source"].nunique() > 1:
        names = ", ".join(sorted(rounds["energy_source"].unique()))
        return f"Energy: left out, since runs measured it with different sources ({names})."
    return None
