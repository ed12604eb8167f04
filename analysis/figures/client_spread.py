"""Figure: how unequal the clients' accuracies are, method by method."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures import caption, style
from analysis.figures.panels import label_inches
from analysis.records.campaign import SERIES, Campaign, NotDrawn, by_panel, series_names
from analysis.records.per_run import per_run

NAME = "client_spread"
_SPANS_INCHES = 4.2


def data(campaign: Campaign) -> pd.DataFrame:
    """One row per data set, partition, method and setting.

    Columns: those, num_runs, and mean_percent, p10_percent and std_percent over clients at the last
    evaluation, each the mean over runs.
    """
    runs = per_run(campaign).dropna(subset=["client_accuracy_mean", "client_accuracy_p10"])
    if runs.empty:
        raise NotDrawn("no run holds client_accuracy_mean and client_accuracy_p10")
    frame = runs.groupby(SERIES, as_index=False).agg(
        num_runs=("run_id", "nunique"),
        mean_percent=("client_accuracy_mean", "mean"),
        p10_percent=("client_accuracy_p10", "mean"),
        std_percent=("client_accuracy_std", "mean"),
    )
    columns = ["mean_percent", "p10_percent", "std_percent"]
    return frame.assign(**{name: 100 * frame[name] for name in columns})


@style.context()
def draw(campaign: Campaign, out_dir: Path) -> list[Path]:
    frame = data(campaign)
    blocks = by_panel(campaign, frame)
    heights = [0.8 + 0.19 * len(rows) for _, rows in blocks]
    fig = Figure(figsize=(_SPANS_INCHES + label_inches(_names(frame)), sum(heights) + 0.3))
    axes = fig.subplots(len(blocks), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for ax, (panel, rows) in zip(axes, blocks, strict=True):
        _draw_spans(ax, rows.sort_values("mean_percent", ascending=False))
        ax.set_title(", ".join(panel), loc="left")
    axes[-1].set_xlabel("Accuracy on the clients' own label mixes (%)")
    title = (
        "Accuracy on each client's own label mix at the last evaluation: the mean over clients "
        "(marker) and the 10th percentile (far end of the line), mean over runs. A long "
        "line means that some clients are served much worse than others."
    )
    return style.save(fig, out_dir / NAME, caption.paragraphs(campaign, title))


def _draw_spans(ax: Any, rows: pd.DataFrame) -> None:
    for place, (_, row) in enumerate(rows.iterrows()):
        look = style.look(row["method"])
        mean, p10 = row["mean_percent"], row["p10_percent"]
        ax.plot([p10, mean], [place, place], color=look.color, linewidth=1.2)
        ax.plot(p10, place, marker="|", markersize=8, color=look.color)
        ax.plot(mean, place, marker=look.marker, color=look.color, markersize=look.size(6))
    ax.set_yticks(range(len(rows)), _names(rows))
    ax.set_ylim(len(rows) - 0.5, -0.5)


def _names(rows: pd.DataFrame) -> list[str]:
    return [
        f"{name} (n = {n})" for name, n in zip(series_names(rows), rows["num_runs"], strict=True)
    ]
