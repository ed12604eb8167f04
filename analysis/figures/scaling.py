"""Figure: seconds of a round against the number of processes, strong and weak scaling."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from analysis.figures import style
from analysis.records.launches import Launches
from analysis.records.scaling import GROUP, scaling_points

NAME = "scaling"
_KINDS = ("strong", "weak")


@style.context()
def draw(scaling: Launches, out_dir: Path) -> list[Path]:
    """One panel for each kind; one line for each GROUP, with its ideal."""
    points = scaling_points(scaling)
    kinds = [kind for kind in _KINDS if kind in set(points["scaling"])]
    fig = Figure(figsize=(3.1 * len(kinds), 3.0))
    axes = fig.subplots(1, len(kinds), squeeze=False)[0]
    handles: dict[str, Line2D] = {}
    for kind, ax in zip(kinds, axes, strict=True):
        for group, line in points[points["scaling"] == kind].groupby(GROUP):
            handles |= _draw_line(ax, dict(zip(GROUP, group, strict=True)), line)
        ticks = sorted(points["world_size"].unique())
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_ylim(bottom=0)
        ax.set_xlabel("Processes")
        ax.set_ylabel("Seconds a round")
        ax.set_title(f"{kind} scaling")
    ideal = Line2D([], [], color=style.GREY, linestyle=style.MODELLED, label="ideal")
    fig.legend(handles=[*handles.values(), ideal], loc="outside lower center", ncols=1)
    return style.save(fig, out_dir / NAME, _caption(scaling.launches, points))


def _draw_line(ax: Any, group: dict[str, Any], line: pd.DataFrame) -> dict[str, Line2D]:
    """Draw medians with the range over launches, and the ideal; returns the legend's entry."""
    look = style.look(group["method"])
    middle = line["seconds"]
    ax.errorbar(
        line["world_size"],
        middle,
        yerr=[middle - line["min_seconds"], line["max_seconds"] - middle],
        **look._asdict(),
        markersize=look.size(),
        elinewidth=0.8,
    )
    ax.plot(line["world_size"], line["ideal_seconds"], color=style.GREY, linestyle=style.MODELLED)
    label = f"{group['method']}, {group['model']}, {group['backend']}, {group['cpu']}"
    return {label: Line2D([], [], **look._asdict(), label=label)}


def _caption(launches: pd.DataFrame, points: pd.DataFrame) -> list[str]:
    cores = int(launches["num_cores"].max() * launches["num_hosts"].max())
    where = {"strong": "a round", "weak": "on each process"}
    sizes = [
        f"{kind} scaling {', '.join(map(str, sorted(numbers)))} clients {where[str(kind)]}"
        for kind, numbers in points.groupby("scaling")["per_round"].unique().items()
    ]
    efficiency = "; ".join(
        f"{row['scaling']}, {row['method']}, {row['world_size']} processes: {row['efficiency']:.2f}"
        for _, row in points.iterrows()
    )
    text = (
        "Seconds of one round of federated training without evaluation, the slowest process, "
        "median over launches with their range, against the number of MPI processes, one thread "
        f"each: {' and '.join(sizes)}. Dashed: ideal, from the fewest processes. More than {cores} "
        "processes share the machine's cores. "
        f"Efficiency (ideal to measured seconds): {efficiency}."
    )
    commits = ", ".join(sorted(set(launches["commit"])))
    return [text, f"Launches: {len(launches)}; commit {commits}."]
