"""Table: seconds and memory of preparing a run, over processes, without and with a cache."""

import pandas as pd

from analysis.records.campaign import NotDrawn
from analysis.records.launches import Launches
from analysis.tables.over_launches import medians_and_quartiles, over_launches, three_digits
from analysis.tables.render import Table

NAME = "prepare"
BENCHMARK = "micro-prepare"
REQUIRED = ["cache", "dataset", "max_length", "load_seconds", "prepare_seconds", "cpu_seconds"]

_GROUP = ["model", "dataset", "max_length", "cpu", "num_cores", "backend", "world_size", "cache"]
_PSS = "trained_pss_bytes"
_MEDIANS = ["load_seconds", "cpu_seconds", "prepared_pss_bytes", _PSS]
_SPREAD = ["prepare_seconds"]


def data(prepare: Launches) -> pd.DataFrame:
    """One row per setting, number of processes and state of the cache: medians over launches.

    Columns: _GROUP, num_launches, _MEDIANS, _SPREAD with quartiles, run_ids.
    """
    if prepare.rows.empty:
        raise NotDrawn("no launch of fedara micro prepare finished")
    frame = over_launches(prepare.rows, _GROUP, _MEDIANS, _SPREAD)
    return frame.sort_values(_GROUP, ignore_index=True)


def table(prepare: Launches) -> Table:
    frame = data(prepare)
    each = frame[_PSS] / frame["world_size"]
    cells = pd.DataFrame(
        {
            "data": frame["dataset"],
            "model": frame["model"],
            "tokens": frame["max_length"].astype(str),
            "CPU": frame["cpu"],
            "processes": frame["world_size"].astype(str),
            "cache": frame["cache"],
            "launches": frame["num_launches"].astype(str),
            "loading s": frame["load_seconds"].map(three_digits),
            "preparing s": medians_and_quartiles(frame, "prepare_seconds", three_digits),
            "CPU s": frame["cpu_seconds"].map(three_digits),
            "MB each": (each / 1e6).map(three_digits),
        }
    )
    notes = [
        "Medians over launches (quartiles). loading: of libraries and model, before the rest.",
        "preparing: from data to the first state, of the slowest process. CPU s: of all processes.",
        "MB each: proportional set size after one step of 16 texts, divided by the processes.",
    ]
    title = "Preparing a run"
    return Table(name=NAME, title=title, cells=cells, numbers=frame, notes=notes)
