"""Table: seconds of a round and efficiency against the number of processes."""

import pandas as pd

from analysis.records.launches import Launches
from analysis.records.scaling import scaling_points
from analysis.tables.render import Table, medians_and_ranges

NAME = "scaling"


def table(scaling: Launches) -> Table:
    """A row for each point of the figure."""
    frame = scaling_points(scaling)
    cells = pd.DataFrame(
        {
            "scaling": frame["scaling"],
            "method": frame["method"],
            "model": frame["model"],
            "back end": frame["backend"],
            "CPU": frame["cpu"],
            "clients": frame["per_round"].astype(str),
            "P": frame["world_size"].astype(str),
            "launches": frame["num_launches"].astype(str),
            "seconds": medians_and_ranges(frame, "seconds", "{:.3g}".format),
            "efficiency": frame["efficiency"].map("{:.2f}".format),
        }
    )
    notes = [
        "Seconds of one round without evaluation, the slowest process: median over launches",
        "(smallest to largest). clients: of a round (strong), of each process (weak). efficiency:",
        "ideal seconds, from the fewest processes, to measured ones.",
    ]
    title = "Strong and weak scaling"
    return Table(name=NAME, title=title, cells=cells, numbers=frame, notes=notes)
