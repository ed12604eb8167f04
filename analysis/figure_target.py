"""Figure: uplink bytes and seconds to a target accuracy, as ratios to LoRA."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analysis import caption, spread, style
from analysis.curves import is_panel, series_label
from analysis.load import SERIES, Campaign, NotDrawn, panels
from analysis.target import COSTS, PART_OF_LORA, costs_to_target

NAME = "target"
_LABELS = {
    "uplink_bytes": "Uplink bytes to target / lora's",
    "seconds": "Seconds to target / lora's",
}


def data(campaign: Campaign) -> pd.DataFrame:
    """One row per line of the figure.

    Columns: dataset, partition, method, setting, target_accuracy_percent, num_runs, num_reached,
    and for uplink_bytes and seconds X_ratio, X_ratio_{low,high}: the mean over the runs that
    reached the target, and its interval, over lora's mean. Missing where no run reached it.
    """
    runs = costs_to_target(campaign)
    lora = runs[runs["method"] == "lora"].groupby(["dataset", "partition"])[list(COSTS)].mean()
    rows = []
    for series, group in runs.groupby(SERIES, sort=False):
        base = lora.loc[series[:2]]
        row: dict[str, Any] = dict(zip(SERIES, series, strict=True))
        row |= {
            "target_accuracy_percent": group["target_accuracy_percent"].iloc[0],
            "num_runs": len(group),
            "num_reached": int(group["uplink_bytes"].notna().sum()),
        }
        for cost in COSTS:
            ratio = group[cost] / base[cost]
            row |= {f"{cost}_ratio": ratio.mean(), f"{cost}_ratio_low": spread.low(ratio)}
            row[f"{cost}_ratio_high"] = spread.high(ratio)
        rows.append(row)
    return pd.DataFrame(rows)


def draw(campaign: Campaign, out_dir: Path) -> list[Path]:
    """Write target.pdf, .png and .txt (the caption); raises NotDrawn where LoRA is missing."""
    frame = data(campaign)
    shown = [panel for panel in panels(campaign) if is_panel(frame, panel).any()]
    if not frame["uplink_bytes_ratio"].notna().any():
        raise NotDrawn("no run reached its target accuracy in an evaluated round")
    heights = [1 + 0.19 * is_panel(frame, panel).sum() for panel in shown]
    with style.context():
        fig = Figure(figsize=(7.2, sum(heights)))
        axes = fig.subplots(len(shown), len(COSTS), squeeze=False, height_ratios=heights)
        for row, panel in zip(axes, shown, strict=True):
            rows = frame[is_panel(frame, panel)].sort_values(["method", "setting"])
            for ax, cost in zip(row, COSTS, strict=True):
                _draw_ratios(ax, rows, cost)
                ax.set_xlabel(_LABELS[cost])
            row[1].set_yticklabels([])
            target = rows["target_accuracy_percent"].iloc[0]
            row[0].set_title(f"{', '.join(panel)}; target {target:.1f} %", loc="left")
        files = style.save(fig, out_dir / NAME)
    title = (
        "Cost of the first evaluated round at or above the target accuracy, which is "
        f"{100 * PART_OF_LORA:g} % of LoRA's last accuracy in the same panel, relative to LoRA's "
        "mean; left of 1 is cheaper. Accuracy is known only in evaluated rounds, so a ratio is as "
        "coarse as they are. Where fewer than all n runs reached the target, the mean is over "
        "those that did, which flatters. Seconds are comparable only between runs on the same "
        "machine."
    )
    return [*files, caption.write(campaign, out_dir / NAME, title=title)]


def _draw_ratios(ax: Any, rows: pd.DataFrame, cost: str) -> None:
    ratios = rows[f"{cost}_ratio"]
    for place, (_, row) in enumerate(rows.iterrows()):
        look = style.look(row["method"])
        ratio = row[f"{cost}_ratio"]
        if pd.isna(ratio):
            # At the left edge, in the axes' own coordinates, so that no scale is implied.
            text = "not reached" if row["num_reached"] == 0 else "not measured"
            ax.text(0.01, place, text, transform=ax.get_yaxis_transform(), fontsize=7, va="center")
            continue
        low, high = row[f"{cost}_ratio_low"], row[f"{cost}_ratio_high"]
        if not pd.isna(low):
            ax.plot([low, high], [place, place], color=look.color, linewidth=2, alpha=0.5)
        ax.plot(ratio, place, marker=look.marker, color=look.color, markersize=6)
    if ratios.notna().any():
        ax.set_xscale("log")
        ax.margins(x=0.08)
        if ratios.max() < 10 * ratios.min():  # a short logarithmic axis would have no number
            ax.set_xscale("linear")
            ax.set_xlim(left=0)
        ax.xaxis.set_major_formatter(style.plain_number)
    ax.axvline(1, color=style.GREY, linewidth=0.8, zorder=0)
    labels = [
        series_label(row["method"], row["setting"]).replace("\n", " ")
        + f" ({row['num_reached']}/{row['num_runs']})"
        for _, row in rows.iterrows()
    ]
    ax.set_yticks(range(len(rows)), labels)
    ax.set_ylim(len(rows) - 0.5, -0.5)
