"""Figure: what local training costs round by round, FedARA against LoRA."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.ticker import MaxNLocator

from analysis import stats
from analysis.figures import caption, style
from analysis.figures.panels import add_legend, draw_lines, filled_rows
from analysis.records import caveats
from analysis.records.campaign import PANEL, SERIES, Campaign, NotDrawn, by_panel, is_panel
from analysis.records.energy import known_energy

NAME = "local_train"
_METHODS = ["fedara", "lora"]
# Column of a round, axis label, and what is drawn for one of the column's unit.
_COSTS = {
    "local_train_seconds": ("Measured seconds", 1.0),
    "flops": ("Counted TFLOP", 1e-12),
    "num_backward_layers": ("Layers in backward pass", 1.0),
    "trained_bytes": ("Adapters, optimiser (MB)", 1e-6),
    "local_train_peak_memory_bytes": ("Peak memory (MB)", 1e-6),
    "local_train_peak_device_memory_bytes": ("Peak GPU memory (MB)", 1e-6),
    "local_train_joules": ("Counted energy (J)", 1.0),
}
_MAX_COLUMNS = 3


def data(campaign: Campaign) -> pd.DataFrame:
    """Of panels in which both methods were timed, one row per method, setting and round.

    Columns: SERIES, round_index, num_seeds, and X_{mean,low,high} over seeds of each cost X of
    _COSTS. A cost is missing in all of a panel if one of its rounds lacks it; joules also where
    sources differ, and the host's memory where runs shared processes.
    """
    rows = campaign.rounds.merge(campaign.runs[["run_id", *SERIES]], on="run_id")
    rows = rows[rows["method"].isin(_METHODS)].dropna(subset=["local_train_seconds"])
    if not rows.empty:
        rows = rows[rows.groupby(PANEL)["method"].transform("nunique") == len(_METHODS)]
    if rows.empty:
        raise NotDrawn("no data set and partition with the seconds of both fedara and lora")
    costs = rows.reindex(columns=[*_COSTS, "adapter_bytes", "optimizer_bytes"])
    costs["trained_bytes"] = costs.pop("adapter_bytes") + costs.pop("optimizer_bytes")
    if known_energy(campaign)[0] is None:
        costs["local_train_joules"] = float("nan")
    for panel in caveats.shared_processes(campaign):
        costs.loc[is_panel(rows, panel), "local_train_peak_memory_bytes"] = float("nan")
    known = costs.notna().groupby([rows[name] for name in PANEL]).transform("all")
    groups = rows[[*SERIES, "run_id", "round_index"]].join(costs.where(known))
    return groups.groupby([*SERIES, "round_index"], as_index=False).agg(
        num_seeds=("run_id", "nunique"),
        **stats.mean_and_interval(*_COSTS),
    )


@style.context()
def draw(campaign: Campaign, out_dir: Path) -> list[Path]:
    frame = data(campaign)
    frame["rounds_completed"] = frame["round_index"] + 1
    blocks = by_panel(campaign, frame)
    costs = [cost for cost in _COSTS if frame[f"{cost}_mean"].notna().any()]
    places = [(panel, rows, cost) for panel, rows in blocks for cost in costs]
    fig, axes = filled_rows(len(places), _num_columns(len(blocks), len(costs)), (2.7, 2.2))
    for (panel, rows, cost), ax in zip(places, axes, strict=False):
        _draw_cost(ax, rows, cost)
        if cost == costs[0]:
            ax.set_title(caveats.heading(campaign, panel, before_mark="\n"), loc="left")
    add_legend(fig, list(axes), frame["num_seeds"])
    source, reason = known_energy(campaign)
    energy = f"Energy: of the hosts, gross, in the phase, counted by {source}."
    if "local_train_joules" not in costs:
        energy = f"No energy: {reason or 'no counter was read in every round'}."
    title = (
        "Local training in each round. Seconds: of all clients that one process hosts, maximum "
        "over processes; single peaks are other work on the machine. TFLOP (10^12): counted from "
        "shapes and live triplets, forward and backward, sum over the cohort. Layers: wrapped "
        "linear layers from the last down to the lowest one that trains, the most of any client. "
        "Adapters, optimiser: bytes of a client's live rows and of its optimiser's state, the "
        "head's included, the most of any client. Peak memory: in the phase, the largest process, "
        "with all that it holds; not drawn where runs shared processes. A fall of FedARA's line is "
        f"what pruning saves. {energy}"
    )
    return style.save(fig, out_dir / NAME, caption.paragraphs(campaign, title))


def _num_columns(num_panels: int, num_costs: int) -> int:
    """A row for each panel; one panel or one cost alone fills several rows."""
    if num_panels > 1 < num_costs:
        return num_costs
    num_places = num_panels * num_costs
    return math.ceil(num_places / math.ceil(num_places / _MAX_COLUMNS))


def _draw_cost(ax: Any, rows: pd.DataFrame, cost: str) -> None:
    label, scale = _COSTS[cost]
    columns = list(stats.mean_and_interval(cost))
    scaled = rows.assign(**{name: scale * rows[name] for name in columns})
    if scaled[f"{cost}_mean"].isna().all():
        ax.text(0.5, 0.5, "not in these records", transform=ax.transAxes, ha="center", fontsize=7)
    else:
        draw_lines(ax, scaled, "rounds_completed", cost)
        ax.set_ylim(0, 1.1 * scaled[columns].max().max())
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.set_xlim(left=0.5)  # no tick at a round 0
    if cost == "num_backward_layers":
        ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.set_xlabel("Round")
    ax.set_ylabel(label)
