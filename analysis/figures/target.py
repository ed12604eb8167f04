"""Figure: uplink bytes, seconds and counted joules to a target accuracy, as ratios to LoRA."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analysis import stats
from analysis.figures import caption, style
from analysis.figures.panels import label_inches
from analysis.records import caveats
from analysis.records.campaign import PANEL, SERIES, Campaign, NotDrawn, by_panel, series_names
from analysis.records.target import PART_OF_LORA, costs_to_target

NAME = "target"
# Costs of `costs_to_target`, and the label of each one's panel.
_LABELS = {
    "uplink_bytes": "Uplink bytes",
    "seconds": "Measured seconds",
    "joules": "Counted joules",
}
_OF_A_MACHINE = ("seconds", "joules")
_COST_INCHES = 2.6


def data(campaign: Campaign) -> pd.DataFrame:
    """One row per line of the figure: `ratios` of uplink_bytes, seconds and joules.

    Seconds and joules are missing where machines differ, joules also where a round lacks them.
    """
    frame = ratios(campaign, list(_LABELS))
    mixed = caveats.mixed_machines(campaign)
    unlike = [tuple(panel) in mixed for panel in frame[PANEL].itertuples(index=False)]
    of_a_machine = [name for name in frame if str(name).startswith(_OF_A_MACHINE)]
    frame.loc[unlike, of_a_machine] = float("nan")
    return frame


def ratios(campaign: Campaign, costs: list[str]) -> pd.DataFrame:
    """One row per data set, partition, method and setting.

    Columns: those, target_accuracy_percent (mean over seeds), num_runs, num_reached, and of each
    cost X_ratio and X_ratio_{low,high}: the ratio to lora's cost with the same seed, mean over the
    runs that reached the target, and its interval; missing where none did.
    """
    runs = costs_to_target(campaign)
    lora = runs[runs["method"] == "lora"].groupby([*PANEL, "seed"])[costs].mean()
    runs = runs.join(lora.add_prefix("lora_"), on=[*PANEL, "seed"])
    found = {f"{cost}_ratio": runs[cost] / runs[f"lora_{cost}"] for cost in costs}
    groups = runs.assign(**found).groupby(SERIES, as_index=False, sort=False)
    frame = groups.agg(
        target_accuracy_percent=("target_accuracy_percent", "mean"),
        num_runs=("run_id", "count"),
        num_reached=("uplink_bytes", "count"),
        **stats.mean_and_interval(*found),
    )
    return frame.rename(columns=lambda name: name.removesuffix("_mean"))


def draw(campaign: Campaign, out_dir: Path) -> list[Path]:
    frame = data(campaign)
    # Bytes and seconds always, so that a gap shows.
    labels = {
        cost: text
        for cost, text in _LABELS.items()
        if cost != "joules" or frame["joules_ratio"].notna().any()
    }
    return draw_ratios(campaign, frame, labels, out_dir / NAME, title=sentence("Cost"))


@style.context()
def draw_ratios(
    campaign: Campaign,
    frame: pd.DataFrame,
    labels: dict[str, str],
    out: Path,
    *,
    title: str,
    modelled: bool = False,
) -> list[Path]:
    """Draw `ratios` of the costs that have labels, a row of axes per panel.

    Modelled costs have hollow markers. Raises NotDrawn where no run reached its target.
    """
    if not (frame["num_reached"] > 0).any():
        raise NotDrawn("no run reached its target accuracy in an evaluated round")
    mixed = caveats.mixed_machines(campaign)
    blocks = by_panel(campaign, frame)
    heights = [1 + 0.19 * len(rows) for _, rows in blocks]
    width = _COST_INCHES * len(labels) + label_inches(_names(frame))
    fig = Figure(figsize=(width, sum(heights)))
    axes = fig.subplots(len(blocks), len(labels), squeeze=False, height_ratios=heights)
    for row, (panel, unsorted) in zip(axes, blocks, strict=True):
        rows = unsorted.sort_values(["method", "setting"])
        for ax, (cost, label) in zip(row, labels.items(), strict=True):
            of_a_machine = cost in _OF_A_MACHINE and panel in mixed
            gap = caveats.MARK if of_a_machine else "not measured"
            _draw_cost(ax, rows, cost, gap=gap, modelled=modelled)
            ax.set_xlabel(f"{label} / lora's")
            ax.set_yticklabels(_names(rows) if ax is row[0] else [])
        target = rows.loc[rows["method"] == "lora", "target_accuracy_percent"].mean()
        heading = f"{', '.join(panel)}; cost to {target:.1f} % accuracy, mean over seeds"
        row[0].set_title(heading, loc="left")
    return style.save(fig, out, caption.paragraphs(campaign, title))


def sentence(cost: str) -> str:
    """The caption's first words about a cost to the target."""
    return (
        f"{cost} until the first evaluated round at or above the target accuracy, which is "
        f"{100 * PART_OF_LORA:g} % of LoRA's last accuracy with the same seed, relative to LoRA "
        "with that seed; left of 1 is cheaper. Accuracy is known only in evaluated rounds, so a "
        "ratio is as coarse as they are. Where fewer than all n runs reached the target, the mean "
        "is over those that did, which flatters."
    )


def _names(rows: pd.DataFrame) -> list[str]:
    counts = zip(series_names(rows), rows["num_reached"], rows["num_runs"], strict=True)
    return [f"{name} ({reached}/{runs})" for name, reached, runs in counts]


def _draw_cost(ax: Any, rows: pd.DataFrame, cost: str, *, gap: str, modelled: bool) -> None:
    for place, (_, row) in enumerate(rows.iterrows()):
        look = style.look(row["method"])
        ratio = row[f"{cost}_ratio"]
        if pd.isna(ratio):
            # At the left edge, in the axes' own coordinates, so that no scale is implied.
            text = "not reached" if row["num_reached"] == 0 else gap
            ax.text(0.01, place, text, transform=ax.get_yaxis_transform(), fontsize=7, va="center")
            continue
        low, high = row[f"{cost}_ratio_low"], row[f"{cost}_ratio_high"]
        if not pd.isna(low):
            ax.plot([low, high], [place, place], color=look.color, linewidth=2, alpha=0.5)
        ax.plot(
            ratio,
            place,
            marker=look.marker,
            color=look.color,
            markerfacecolor="white" if modelled else look.color,
            markersize=look.size(6),
        )
    limits = rows[[f"{cost}_ratio{end}" for end in ("", "_low", "_high")]]
    found = rows[f"{cost}_ratio"]
    if found.max() >= 10 * found.min() > 0:
        ax.set_xscale("log")
        ax.margins(x=0.08)
        ax.xaxis.set_major_formatter(style.plain_number)
    else:  # a short logarithmic axis would have no number
        ax.set_xlim(0, 1.1 * max(1.0, limits.fillna(0).max().max()))
    ax.axvline(1, color=style.GREY, linewidth=0.8, zorder=0)
    ax.set_yticks(range(len(rows)))
    ax.set_ylim(len(rows) - 0.5, -0.5)
