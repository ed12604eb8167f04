"""Table: the communicator's allgather of packed rows against the library's bare call."""

import pandas as pd

from analysis.records.campaign import NotDrawn
from analysis.records.collectives import collective_points
from analysis.records.launches import Launches
from analysis.tables.render import Table, medians_and_ranges, rounded

NAME = "collectives_allgather"


def data(collectives: Launches) -> pd.DataFrame:
    """One row per back end, number of processes and payload; medians over launches."""
    points = collective_points(collectives)
    rows = points[(points["call"] == "allgather") & points["ratio"].notna()]
    columns = [
        *("backend", "world_size", "payload_bytes", "num_launches", "bare_call"),
        *("median_seconds", "bare_median_seconds", "ratio", "min_ratio", "max_ratio"),
        *("sizes_first_ratio", "run_ids"),
    ]
    return rows[columns].sort_values(columns[:3], ignore_index=True)


def table(collectives: Launches) -> Table:
    frame = data(collectives)
    if frame.empty:
        raise NotDrawn("no launch measured allgather against the bare call")
    cells = pd.DataFrame(
        {
            "back end": frame["backend"],
            "P": frame["world_size"].astype(str),
            "bytes of a process": frame["payload_bytes"].map("{:g}".format),
            "launches": frame["num_launches"].astype(str),
            "ours ms": (1e3 * frame["median_seconds"]).map("{:.4g}".format),
            "bare ms": (1e3 * frame["bare_median_seconds"]).map("{:.4g}".format),
            "ratio": medians_and_ranges(frame, "ratio", "{:.3f}".format),
            "ratio, sizes first": rounded(frame["sizes_first_ratio"], 3),
            "bare call": frame["bare_call"],
        }
    )
    notes = [
        "Seconds: median over launches of each one's median over calls of the slowest process.",
        "ratio: median over launches (smallest to largest) of each one's median over calls of ours",
        "to bare, which ran turn about. ours knows the sizes, as bare does: merge paths have them",
        "from the headers. sizes first: where the call has to exchange them.",
    ]
    title = "Allgather of packed rows against the bare call"
    return Table(name=NAME, title=title, cells=cells, numbers=frame, notes=notes)
