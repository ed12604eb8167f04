"""Figure: seconds of the merge paths by density, with the line at 2/P."""

from pathlib import Path

import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from analysis.figures import path_panels, style
from analysis.records.launches import Launches

NAME = "collectives_density"


def draw(collectives: Launches, out_dir: Path) -> list[Path]:
    """Write collectives_density_overlap_X.pdf, .png and .txt for each overlap X."""
    files = []
    for overlap, points in path_panels.path_points(collectives).groupby("overlap"):
        files += _draw(collectives, points, out_dir / f"{NAME}_overlap_{overlap:g}")
    return files


@style.context()
def _draw(collectives: Launches, points: pd.DataFrame, out: Path) -> list[Path]:
    payloads = sorted(points["payload_bytes"].unique())
    machines = sorted(set(zip(points["backend"], points["world_size"], strict=True)))
    fig, axes = path_panels.grid(len(payloads), len(machines), share_y="row")
    for row, payload_bytes in enumerate(payloads):
        for column, (backend, world_size) in enumerate(machines):
            ax = axes[row, column]
            same = (points["payload_bytes"] == payload_bytes) & (points["backend"] == backend)
            panel = points[same & (points["world_size"] == world_size)]
            path_panels.draw_panel(ax, panel, "density", scale=1e3)
            for crossing_density in panel["crossing_density"].unique():
                ax.axvline(crossing_density, color=style.GREY, linewidth=1, zorder=1)
            size = path_panels.size_text(payload_bytes)
            ax.set_title(path_panels.title(backend, f"P = {world_size}, {size}"))
            densities = sorted(panel["density"].unique())
            ax.set_xticks(densities, [f"{density:g}" for density in densities])
            ax.xaxis.set_minor_locator(NullLocator())
            ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.yaxis.set_minor_locator(NullLocator())
            ax.set_xlabel("Density" if row == len(payloads) - 1 else "")
            ax.set_ylabel("Time (ms)" if column == 0 else "")
    crossing = Line2D([], [], color=style.GREY, linewidth=1, label="density 2/P")
    path_panels.add_legend(fig, points, [crossing])
    overlap = points["overlap"].iloc[0]
    title = (
        "Measured time of one exchange by merge path against density, the live part of a client's "
        f"layout, at overlap {overlap:g} (0: masks as disjoint as can be, 1: equal masks). The "
        "panels' titles give the bytes of one client's live rows, so that the layout grows to the "
        "left. Below the grey line at density 2/P a sparse allgather moves fewer bytes than a "
        "dense allreduce."
    )
    first = f"{title} {path_panels.launches_text(points)}"
    return style.save(fig, out, [first, *path_panels.conditions(collectives)])
