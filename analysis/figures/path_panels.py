"""Axes, legend and caption of the figures of merge paths, which two figures share."""

import textwrap
from typing import Any, Literal

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.figures import caption, style
from analysis.records.campaign import NotDrawn
from analysis.records.collectives import collective_points
from analysis.records.launches import Launches
from fedara_core.schema import PATHS

_PANEL_INCHES = (2.6, 2.1)
# Of a point; what else it lacks leaves a gap.
_NEEDED = ["density", "overlap", "payload_bytes", "part_bytes", "layout_bytes", "num_rows"]
_TITLE_LETTERS = 34  # that fit over a panel


def path_points(collectives: Launches) -> pd.DataFrame:
    """The measured points of the float32 merge paths over two processes or more.

    Columns: those of `collective_points`, and crossing_density, 2/P. Raises NotDrawn.
    """
    frame = collective_points(collectives)
    chosen = (frame["call"] == "weighted_sum") & (frame["codec"] == "fp32")
    frame = frame[chosen & (frame["world_size"] > 1) & frame["path"].isin(PATHS)]
    frame = frame.dropna(subset=_NEEDED)
    if frame.empty:
        raise NotDrawn("no launch timed the merge paths on two processes or more")
    return frame.assign(crossing_density=2 / frame["world_size"]).reset_index(drop=True)


def grid(num_rows: int, num_columns: int, *, share_y: Literal["row", "all"]) -> tuple[Figure, Any]:
    """A figure with as many axes; share_y: which of them have one y axis."""
    width, height = _PANEL_INCHES
    fig = Figure(figsize=(width * num_columns, height * num_rows + 0.4))
    return fig, fig.subplots(num_rows, num_columns, squeeze=False, sharey=share_y)


def draw_panel(
    ax: Any, points: pd.DataFrame, x: str, *, scale: float, linestyle: str | None = None
) -> None:
    """Each path's medians and their range over launches; scale: what is drawn for a second."""
    for path in PATHS:
        line = points[points["path"] == path].sort_values(x)
        look = style.PATH_LOOKS[path]
        drawn = scale * line[["median_seconds", "min_seconds", "max_seconds"]]
        middle = drawn["median_seconds"]
        ax.errorbar(
            line[x],
            middle,
            yerr=[middle - drawn["min_seconds"], drawn["max_seconds"] - middle],
            color=look.color,
            marker=look.marker,
            linestyle=look.linestyle if linestyle is None else linestyle,
            elinewidth=0.8,
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    if points.empty:
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color="#555555")


def add_legend(fig: Figure, points: pd.DataFrame, further: list[Line2D]) -> None:
    """The paths that occur in the points, and further entries, below the panels."""
    looks = {path: style.PATH_LOOKS[path] for path in PATHS if path in set(points["path"])}
    handles = [
        Line2D([], [], color=look.color, marker=look.marker, linestyle="none", label=path)
        for path, look in looks.items()
    ]
    fig.legend(handles=[*handles, *further], loc="outside lower center", ncols=3)


def title(backend: str, what: str) -> str:
    """The title in one line, or with a long name on lines of its own."""
    if len(f"{backend}, {what}") <= _TITLE_LETTERS:
        return f"{backend}, {what}"
    return f"{textwrap.fill(backend, _TITLE_LETTERS)}\n{what}"


def size_text(num_bytes: float) -> str:
    """Such as "50 MB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:g} {unit}"
    return f"{num_bytes:g} B"


def launches_text(points: pd.DataFrame) -> str:
    """What a point and its bar are, with the number of launches."""
    low, high = points["num_launches"].min(), points["num_launches"].max()
    if high == 1:
        return "One launch: median over its calls of the slowest process, no measure of spread."
    count = low if low == high else f"{low} to {high}"
    return (
        f"Median over {count} launches of each one's median over calls of the slowest process; "
        "bars: smallest and largest of the launches."
    )


def conditions(collectives: Launches) -> list[str]:
    """One line per back end and number of processes, and one about launches left out."""
    lines = []
    shown = collectives.launches[collectives.launches["world_size"] > 1]
    for (backend, world_size), rows in shown.groupby(["backend", "world_size"]):
        cpus, commits, cores, hosts = (
            " or ".join(map(str, sorted(rows[name].unique())))
            for name in ("cpu", "commit", "num_cores", "num_hosts")
        )
        lines.append(
            f"{backend}, {world_size} processes; hosts {hosts}, of {cores} cores ({cpus}); "
            f"launches {len(rows)}; commit {commits}."
        )
    return [*lines, *caption.left_out(collectives)]
