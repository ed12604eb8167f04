"""Table: a round of the suite against a bare PyTorch loop of the same steps."""

import pandas as pd

from analysis.records.campaign import NotDrawn
from analysis.records.launches import Launches
from analysis.tables.over_launches import medians_and_quartiles, over_launches, three_digits
from analysis.tables.render import Table

NAME = "overhead"
BENCHMARK = "micro-overhead"
REQUIRED = [
    *("method", "num_clients", "local_steps", "max_length", "median_seconds"),
    *("bare_loop_median_seconds", "ratio_to_bare_loop", "meter_share"),
]

_GROUP = ["model", "cpu", "num_cores", "method", "num_clients", "local_steps", "max_length"]
_MEDIANS = ["bare_loop_median_seconds", "meter_share"]
_SPREAD = ["median_seconds", "ratio_to_bare_loop"]


def data(overhead: Launches) -> pd.DataFrame:
    """One row per setting on one machine: medians over launches.

    Columns: _GROUP, num_launches, _MEDIANS, _SPREAD with quartiles, run_ids.
    """
    if overhead.rows.empty:
        raise NotDrawn("no launch of fedara micro overhead finished its pairs of rounds")
    frame = over_launches(overhead.rows, _GROUP, _MEDIANS, _SPREAD)
    return frame.sort_values(_GROUP, ignore_index=True)


def table(overhead: Launches) -> Table:
    frame = data(overhead)
    sizes = zip(frame["num_clients"], frame["local_steps"], strict=True)
    cells = pd.DataFrame(
        {
            "method": frame["method"],
            "model": frame["model"],
            "tokens": frame["max_length"].astype(str),
            "clients x steps": [f"{clients} x {steps}" for clients, steps in sizes],
            "CPU": frame["cpu"],
            "launches": frame["num_launches"].astype(str),
            "s a round": medians_and_quartiles(frame, "median_seconds", three_digits),
            "bare loop s": frame["bare_loop_median_seconds"].map(three_digits),
            "ratio": medians_and_quartiles(frame, "ratio_to_bare_loop", "{:.3f}".format),
            "metering %": (100 * frame["meter_share"]).map("{:.2f}".format),
        }
    )
    notes = [
        "One process, one thread: medians over launches (quartiles) of each one's median over",
        "rounds. The suite's round includes packing, record and checkpoint, without evaluation.",
        "ratio: median over pairs of rounds, which took turns. metering: of the suite's round.",
    ]
    title = "A round of the suite against a bare loop"
    return Table(name=NAME, title=title, cells=cells, numbers=frame, notes=notes)
