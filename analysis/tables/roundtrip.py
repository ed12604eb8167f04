"""Table: a round without training, against bare loops that do the same to plain tensors."""

import pandas as pd

from analysis.records.campaign import NotDrawn
from analysis.records.launches import Launches
from analysis.tables.over_launches import (
    medians_and_quartiles,
    milliseconds,
    over_launches,
    three_digits,
)
from analysis.tables.render import Table
from fedara_core.merge.cost import PATHS

NAME = "roundtrip"
BENCHMARK = "micro-roundtrip"
REQUIRED = [
    *("method", "num_clients", "path", "codec", "median_seconds", "messages_per_second"),
    *("bare_loop_median_seconds", "bare_messages_median_seconds", "ratio_to_bare_loop"),
    "phase_seconds",
]

# Launches of other settings, or on another machine, are another row. The bytes of an upload tell
# models' adapters of unlike lora_rank apart.
_GROUP = [
    *("model", "backend", "world_size", "num_hosts", "cpu", "num_cores"),
    *("method", "num_clients", "path", "codec", "uplink_bytes_per_client"),
]
_SPREAD = ["median_seconds", "ratio_to_bare_loop", "ratio_to_bare_messages"]
_MEDIANS = [
    *("messages_per_second", "bare_loop_median_seconds", "bare_messages_median_seconds"),
    *("bare_allgather_median_seconds", "peak_memory_bytes"),
]
_SHOWN_PHASES = ("download", "pack", "exchange", "aggregate", "meter")


def data(roundtrip: Launches) -> pd.DataFrame:
    """One row per combination on one machine: medians over launches.

    Columns: _GROUP, num_launches, _MEDIANS, _SPREAD with quartiles, X_seconds by phase, run_ids.
    """
    rows = roundtrip.rows
    if rows.empty:
        raise NotDrawn("no launch of fedara micro roundtrip finished a combination")
    # A phase that took no time is left out of a record.
    phases = pd.DataFrame(rows["phase_seconds"].tolist()).fillna(0.0).add_suffix("_seconds")
    rows = rows.drop(columns="phase_seconds").join(phases)
    frame = over_launches(rows, _GROUP, [*_MEDIANS, *phases], _SPREAD)
    return frame.sort_values(_GROUP, key=_in_order, ignore_index=True)


def _in_order(column: pd.Series) -> pd.Series:
    """Sort key: paths as merge/cost lists them, all else by value."""
    if column.name != "path":
        return column
    return column.map(lambda path: PATHS.index(path) if path in PATHS else len(PATHS))


def table(roundtrip: Launches) -> Table:
    frame = data(roundtrip)
    two_digits = "{:.2f}".format
    cells = pd.DataFrame(
        {
            "method": frame["method"],
            "model": frame["model"],
            "clients": frame["num_clients"].astype(str),
            "path": frame["path"],
            "codec": frame["codec"],
            "MB up": (frame["uplink_bytes_per_client"] / 1e6).map(three_digits),
            "back end": frame["backend"],
            "P": frame["world_size"].astype(str),
            "CPU": frame["cpu"],
            "launches": frame["num_launches"].astype(str),
            "ms a round": medians_and_quartiles(frame, "median_seconds", milliseconds),
            "messages/s": frame["messages_per_second"].map("{:.0f}".format),
            "bare loop ms": frame["bare_loop_median_seconds"].map(milliseconds),
            "with messages ms": frame["bare_messages_median_seconds"].map(milliseconds),
            "bare allgather ms": frame["bare_allgather_median_seconds"].map(milliseconds),
            "ratio to bare loop": medians_and_quartiles(frame, "ratio_to_bare_loop", two_digits),
            "ratio, with messages": medians_and_quartiles(
                frame, "ratio_to_bare_messages", two_digits
            ),
            f"{', '.join(_SHOWN_PHASES)} ms": frame.apply(_phases, axis=1),
        }
    )
    notes = [
        "A round of all clients without a local step, the slowest process: medians over launches",
        "(quartiles) of each one's median over rounds. bare loop: one process copies and sums",
        "plain tensors, without any message; with messages: every client's message is a copy of",
        "its tensors, which are summed when all are there. Ratios: median over rounds of the",
        "suite's seconds to those of the loop that took turns with it; where only some launches",
        "measured one, their number stands beside it. MB up: one client's upload.",
    ]
    title = "Rounds without training"
    return Table(name=NAME, title=title, cells=cells, numbers=frame, notes=notes)


def _phases(row: pd.Series) -> str:
    return ", ".join(milliseconds(row.get(f"{phase}_seconds", 0.0)) for phase in _SHOWN_PHASES)
