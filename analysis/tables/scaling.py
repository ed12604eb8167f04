"""Table: seconds of a round and efficiency against the number of processes."""

import pandas as pd

from analysis.figures import scaling as figure_scaling
from analysis.figures.scaling import Scaling
from analysis.tables.render import Table

NAME = "scaling"


def table(scaling: Scaling) -> Table:
    """A row for each point of the figure."""
    frame = figure_scaling.data(scaling)
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
            "seconds": [_seconds(row) for _, row in frame.iterrows()],
            "efficiency": frame["efficiency"].map("{:.2f}".format),
        }
    )
    notes = [
        "Seconds of one round without evaluation, the slowest process: median over launches",
        "(smallest to largest). clients: of a round (strong), of each process (weak). efficiency:",
        "ideal seconds, from the fewest processes, to measured ones.",
    ]
    return Table(
        name=NAME, title="Strong and weak scaling", cells=cells, numbers=frame, notes=notes
    )


def _seconds(row: pd.Series) -> str:
    spread = f" ({row['min_seconds']:.3g} to {row['max_seconds']:.3g})"
    return f"{row['seconds']:.3g}{spread if row['num_launches'] > 1 else ''}"
