"""Figure: last accuracy against the bytes that clients sent up, with the Pareto front."""

from pathlib import Path
from typing import Any

import pandas as pd

from analysis import stats
from analysis.figures import caption, style
from analysis.figures.panels import add_legend, grid, series_label
from analysis.records.campaign import PANEL, SERIES, Campaign, NotDrawn, by_panel
from analysis.records.per_run import per_run

NAME = "pareto"


def data(campaign: Campaign) -> pd.DataFrame:
    """One row per method and setting of a panel, means over seeds.

    Columns: SERIES, num_seeds, accuracy_percent_{mean,low,high}, uplink_bytes, and on_front:
    nothing in the panel is more accurate at as few bytes, or as accurate at fewer.
    """
    runs = per_run(campaign).dropna(subset=["accuracy_percent"])
    if runs.empty:
        raise NotDrawn("no run holds an evaluated round")
    frame = runs.groupby(SERIES, as_index=False).agg(
        num_seeds=("run_id", "nunique"),
        **stats.mean_and_interval("accuracy_percent"),
        uplink_bytes=("cumulative_uplink_bytes", "mean"),
    )
    frame["on_front"] = False
    for _, group in frame.groupby(PANEL):
        frame.loc[group.index, "on_front"] = _front(group)
    return frame


@style.context()
def draw(campaign: Campaign, out_dir: Path) -> list[Path]:
    frame = data(campaign)
    blocks = by_panel(campaign, frame)
    fig, axes = grid([panel for panel, _ in blocks], "Uplink of the whole run (MB)")
    for (_, rows), ax in zip(blocks, axes, strict=True):
        _draw_points(ax, rows)
    add_legend(fig, axes, frame["num_seeds"])
    title = (
        "Accuracy of the last evaluated round against the uplink of the whole run: payload of all "
        "cohorts' uploads, headers and masks included, 1 MB = 10^6 bytes. The grey steps are the "
        "Pareto front of the means: nothing shown is more accurate for as few bytes. It takes no "
        "account of the spread over seeds."
    )
    return style.save(fig, out_dir / NAME, caption.paragraphs(campaign, title))


def _front(group: pd.DataFrame) -> pd.Series:
    order = group.sort_values(
        ["uplink_bytes", "accuracy_percent_mean"], ascending=[True, False], kind="stable"
    )
    best_before = order["accuracy_percent_mean"].cummax().shift(fill_value=float("-inf"))
    return (order["accuracy_percent_mean"] > best_before).reindex(group.index)


def _draw_points(ax: Any, rows: pd.DataFrame) -> None:
    front = rows[rows["on_front"]].sort_values("uplink_bytes")
    megabytes, accuracies = front["uplink_bytes"] / 1e6, front["accuracy_percent_mean"]
    ax.step(megabytes, accuracies, where="post", color="#BBBBBB", zorder=0)
    for _, row in rows.iterrows():
        settings = sorted(rows.loc[rows["method"] == row["method"], "setting"])
        look, fill = style.setting_look(row["method"], settings.index(row["setting"]))
        x, y = row["uplink_bytes"] / 1e6, row["accuracy_percent_mean"]
        if not pd.isna(row["accuracy_percent_low"]):
            bar = [row["accuracy_percent_low"], row["accuracy_percent_high"]]
            ax.plot([x, x], bar, color=look.color, alpha=0.5)
        ax.plot(
            x,
            y,
            color=look.color,
            marker=look.marker,
            markerfacecolor=fill,
            markersize=look.size(6),
            linestyle="none",
            label=series_label(row["method"], row["setting"]),
        )
    if rows["uplink_bytes"].max() > 10 * rows["uplink_bytes"].min() > 0:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(style.plain_number)
