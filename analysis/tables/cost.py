"""Table: bytes, seconds and memory of each method, per data set and partition."""

import pandas as pd

from analysis.records import caveats
from analysis.records.campaign import PANEL, Campaign
from analysis.records.energy import energy_kind, known_energy
from analysis.records.per_run import means_by_series, series_cells
from analysis.tables.render import Table, rounded

NAME = "cost"
_MEGABYTES = {
    "uplink_bytes": "up MB",
    "downlink_bytes": "down MB",
    "peak_memory_bytes": "peak memory MB",
    "peak_device_memory_bytes": "peak device memory MB",
}
_SECONDS = {"total_seconds": "seconds", "local_train_seconds": "local training s"}


def data(campaign: Campaign) -> pd.DataFrame:
    """One row per data set, partition, method and setting; means over its num_runs runs.

    Columns: those, num_runs, uplink_bytes, downlink_bytes, total_seconds, local_train_seconds,
    flops (counted, of local training), peak_memory_bytes, peak_device_memory_bytes, energy_joules
    (of the whole run, where all runs have one source) and run_ids. A number is missing where one of
    the runs lacks it.
    """
    columns = {
        "uplink_bytes": "cumulative_uplink_bytes",
        "downlink_bytes": "cumulative_downlink_bytes",
        "total_seconds": "total_seconds",
        "local_train_seconds": "all_local_train_seconds",
        "flops": "all_flops",
        "peak_memory_bytes": "peak_memory_bytes",
        "peak_device_memory_bytes": "peak_device_memory_bytes",
    }
    if known_energy(campaign)[0]:
        columns["energy_joules"] = "energy_joules"
    frame = means_by_series(campaign, columns)
    return frame.assign(run_ids=frame.pop("run_ids"))  # the last column


def table(campaign: Campaign) -> Table:
    frame = data(campaign)
    cells = series_cells(frame)
    for column, heading in _MEGABYTES.items():
        if frame[column].notna().any():
            cells[heading] = rounded(frame[column] / 1e6, 2)
    mixed = caveats.mixed_machines(campaign)
    marks = [" *" if tuple(panel) in mixed else "" for panel in frame[PANEL].to_numpy()]
    source, reason = known_energy(campaign)
    joules = {"energy_joules": f"{energy_kind(source)} J"} if source else {}
    for column, heading in (_SECONDS | joules).items():
        values = zip(rounded(frame[column], 1), marks, strict=True)
        cells[heading] = [value and f"{value}{mark}" for value, mark in values]
    if frame["flops"].notna().any():
        cells["local training TFLOP"] = rounded(frame["flops"] / 1e12, 2)
    energy = f"of the whole run, {energy_kind(source)} by {source}" if source else reason
    notes = [
        "Means over n runs, summed over all rounds; memory is the peak of a process. 1 MB = 10^6",
        "bytes. Seconds compare methods only where runs had the same machine to themselves. A cell",
        "is empty where one of its runs lacks the number. cost.csv names the runs behind each row.",
        "TFLOP: 10^12 FLOPs, counted from shapes and live triplets, without a clock.",
        *([f"*: {caveats.MARK}; the warnings say in what."] if mixed else []),
        f"Energy (J): {energy}.",
    ]
    return Table(name=NAME, title="Cost by method", cells=cells, numbers=frame, notes=notes)
