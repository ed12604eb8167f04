"""Table: modelled seconds and joules of each method on edge devices, beside the counted FLOPs."""

import pandas as pd

from analysis.records.campaign import Campaign, NotDrawn, modelled_devices
from analysis.records.per_run import means_by_series, series_cells
from analysis.tables.render import Table, rounded

NAME = "modelled"


def data(campaign: Campaign) -> pd.DataFrame:
    """One row per data set, partition, method and setting; means over runs, sums over rounds.

    Columns: those, num_runs, run_ids, flops, and of each device D modelled_seconds.D and
    modelled_joules.D; missing where not every round of every run holds them.
    """
    devices = modelled_devices(campaign)
    if not devices:
        raise NotDrawn("no run has rounds that are modelled on devices")
    names = [f"modelled_{unit}.{device}" for device in devices for unit in ("seconds", "joules")]
    return means_by_series(campaign, {name: f"all_{name}" for name in ("flops", *names)})


def table(campaign: Campaign) -> Table:
    frame = data(campaign)
    cells = series_cells(frame)
    cells["counted TFLOP"] = rounded(frame["flops"] / 1e12, 2)
    for device in modelled_devices(campaign):
        for unit, heading, digits in (("seconds", "s", 1), ("joules", "kJ", 3)):
            values = frame[f"modelled_{unit}.{device}"] / (1e3 if unit == "joules" else 1)
            cells[f"{device}, {heading}"] = rounded(values, digits)
    notes = [
        "Nothing here is measured. FLOPs of local training are counted from shapes and live",
        "triplets; seconds and joules on the named devices are modelled from them and from the",
        "bytes (bench/devices.toml; device_profiles in run.json). A round's seconds are those of",
        "its slowest client, its joules those of all its clients; sums over all rounds, means",
        "over n runs.",
    ]
    title = "Modelled cost on edge devices"
    return Table(name=NAME, title=title, cells=cells, numbers=frame, notes=notes)
