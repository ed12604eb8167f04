"""Table: the communicator's allgather of packed rows against the library's bare call."""

import pandas as pd

from analysis.records.campaign import NotDrawn
from analysis.records.micro import MicroCampaign
from analysis.tables.render import Table, number

NAME = "collectives_allgather"


def data(micro: MicroCampaign) -> pd.DataFrame:
    """One row per back end, number of processes and payload; medians over launches."""
    points = micro.points
    rows = points[(points["call"] == "allgather") & points["ratio"].notna()]
    columns = [
        *("backend", "world_size", "payload_bytes", "num_launches", "bare_call"),
        *("median_seconds", "bare_median_seconds", "ratio", "min_ratio", "max_ratio"),
        *("sizes_first_ratio", "run_ids"),
    ]
    return rows[columns].sort_values(columns[:3], ignore_index=True)


def table(micro: MicroCampaign) -> Table:
    """The table; NotDrawn where no launch has measured the bare call."""
    frame = data(micro)
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
            "ratio": [_ratio(row) for _, row in frame.iterrows()],
            "ratio, sizes first": frame["sizes_first_ratio"].map(lambda value: number(value, 3)),
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


def _ratio(row: pd.Series) -> str:
    spread = f" ({row['min_ratio']:.3f} to {row['max_ratio']:.3f})"
    return f"{row['ratio']:.3f}{spread if row['num_launches'] > 1 else ''}"
