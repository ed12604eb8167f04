"""Axes, lines and legends of figures with one panel per data set and partition."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pandas.api.types import is_integer_dtype

from analysis import stats
from analysis.figures import caption, style
from analysis.records.campaign import SERIES, Campaign, NotDrawn, by_panel, by_series

_MAX_COLUMNS = 3
_PANEL_INCHES = (3.4, 2.5)  # one column of a two-column page
_LEGEND_LINE_INCHES = 0.18
_CHARACTER_INCHES = 0.072
_MAX_ENTRIES_BELOW = 9
_MAX_MARKERS = 10


def accuracy_by_round(campaign: Campaign) -> pd.DataFrame:
    """One row per data set, partition, method, setting and round with an evaluation.

    Columns: those, rounds_completed, num_seeds, accuracy_percent_{mean,low,high} over seeds (low
    and high are missing for one seed) and cumulative_uplink_bytes_mean. Raises NotDrawn.
    """
    evaluated = campaign.rounds.dropna(subset=["accuracy"])
    if evaluated.empty:
        raise NotDrawn("no run holds an evaluated round")
    rows = evaluated.merge(campaign.runs[["run_id", *SERIES]], on="run_id")
    rows["accuracy_percent"] = 100 * rows["accuracy"]
    frame = rows.groupby([*SERIES, "round_index"], as_index=False).agg(
        num_seeds=("run_id", "nunique"),
        **stats.mean_and_interval("accuracy_percent"),
        cumulative_uplink_bytes_mean=("cumulative_uplink_bytes", "mean"),
    )
    # Accuracy is that of the state after the round.
    frame.insert(len(SERIES) + 1, "rounds_completed", frame["round_index"] + 1)
    return frame


@style.context()
def draw_panels(
    campaign: Campaign, frame: pd.DataFrame, out: Path, *, x: str, x_label: str, title: str
) -> list[Path]:
    """Draw accuracy over column `x` of `frame`; writes `out`.pdf, .png and the caption `out`.txt.

    The x axis is logarithmic when the lines end more than a factor of ten apart.
    """
    blocks = by_panel(campaign, frame)
    shown = [panel for panel, _ in blocks]
    last = frame.groupby(SERIES)[x].max()
    log_x = frame[x].min() > 0 and last.max() > 10 * last.min()
    fig, axes = grid(shown, x_label)
    for ax in axes[: -_columns_of(shown)]:  # a label below each column is enough
        ax.set_xlabel("")
    for (_, rows), ax in zip(blocks, axes, strict=True):
        draw_lines(ax, rows, x, "accuracy_percent")
        if log_x:
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter(style.plain_number)
        elif is_integer_dtype(frame[x]):
            ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    add_legend(fig, axes, frame["num_seeds"])
    return style.save(fig, out, caption.paragraphs(campaign, title))


def _columns_of(shown: list[tuple[str, str]]) -> int:
    """How many columns: one row per data set if one has several partitions, else filled rows."""
    most_partitions = max(Counter(dataset for dataset, _ in shown).values())
    return min(most_partitions if most_partitions > 1 else len(shown), _MAX_COLUMNS)


def grid(shown: list[tuple[str, str]], x_label: str) -> tuple[Figure, list[Any]]:
    """A figure with axes of accuracies for each panel; those of a data set share their y axis."""
    num_columns = _columns_of(shown)
    num_rows = math.ceil(len(shown) / num_columns)
    width, height = _PANEL_INCHES
    fig = Figure(figsize=(width * num_columns, height * num_rows))
    first_of: dict[str, Any] = {}
    for index, (dataset, partition) in enumerate(shown):
        ax = fig.add_subplot(num_rows, num_columns, index + 1, sharey=first_of.get(dataset))
        first_of.setdefault(dataset, ax)
        ax.set_title(f"{dataset}, {partition}" if partition else dataset)
        ax.set_xlabel(x_label)
        ax.set_ylabel("Accuracy (%)" if index % num_columns == 0 else "")
    return fig, fig.axes


def filled_rows(
    num_axes: int, num_columns: int, size: tuple[float, float], *, margin: float = 0.0
) -> tuple[Figure, Any]:
    """A figure, and its axes of `size` inches, row by row; margin: inches of width beside them."""
    num_rows = math.ceil(num_axes / num_columns)
    fig = Figure(figsize=(margin + size[0] * num_columns, size[1] * num_rows))
    axes = fig.subplots(num_rows, num_columns, squeeze=False).ravel()
    for ax in axes[num_axes:]:
        ax.set_visible(False)
    return fig, axes


def heat_map(ax: Any, wide: pd.DataFrame, *, cmap: str, top: float, num_ticks: int) -> Any:
    """Draw the cells of a frame from 0 to `top`, with its columns as ticks; returns the image."""
    image = ax.imshow(wide, aspect="auto", cmap=cmap, vmin=0, vmax=top, interpolation="nearest")
    ticks = range(0, len(wide.columns), max(1, len(wide.columns) // num_ticks))
    ax.set_xticks(list(ticks), [str(wide.columns[tick]) for tick in ticks])
    ax.grid(False)
    return image


def draw_lines(ax: Any, frame: pd.DataFrame, x: str, y: str) -> None:
    """One line per method and setting: y_mean over column x, with the band y_low to y_high."""
    for method, setting, line in by_series(frame):
        settings = sorted(frame.loc[frame["method"] == method, "setting"].unique())
        look, fill = style.setting_look(method, settings.index(setting))
        ax.plot(
            line[x],
            line[f"{y}_mean"],
            **look._asdict(),
            markersize=look.size(),
            markerfacecolor=fill,
            markevery=math.ceil(len(line) / _MAX_MARKERS),
            label=series_label(method, setting),
        )
        if line["num_seeds"].max() > 1:
            low, high = line[f"{y}_low"], line[f"{y}_high"]
            ax.fill_between(line[x], low, high, color=look.color, alpha=0.2, linewidth=0)


def add_legend(fig: Figure, axes: list[Any], num_seeds: pd.Series) -> None:
    """One legend for all panels, below them or, if long, beside; the figure grows to hold it."""
    title = _seeds_text(num_seeds)
    handles: dict[str, Any] = {}
    for ax in axes:
        lines, labels = ax.get_legend_handles_labels()
        handles = dict(zip(labels, lines, strict=True)) | handles
    labels = sorted(handles)
    beside = len(labels) > _MAX_ENTRIES_BELOW
    if beside:
        num_columns = 1
        num_lines = 2 + sum(1 + label.count("\n") for label in labels)
        # Margins take as much of the width as two characters of each label do.
        longest = max(len(line) for label in labels for line in label.split("\n"))
        fig.set_figwidth(fig.get_figwidth() + 0.7 + _CHARACTER_INCHES * longest)
        fig.set_figheight(max(fig.get_figheight(), num_lines * _LEGEND_LINE_INCHES))
    else:
        labels = [label.replace("\n", " ") for label in labels]
        handles = {label.replace("\n", " "): handle for label, handle in handles.items()}
        inches_per_entry = 0.8 + 0.075 * max(len(label) for label in labels)
        num_columns = max(1, min(len(labels), int(fig.get_figwidth() / inches_per_entry)))
        num_lines = 1 + math.ceil(len(labels) / num_columns)
        fig.set_figheight(fig.get_figheight() + num_lines * _LEGEND_LINE_INCHES)
    fig.legend(
        [handles[label] for label in labels],
        labels,
        title=title.replace(", ", ",\n") if beside else title,
        loc="outside right upper" if beside else "outside lower center",
        ncols=num_columns,
        handlelength=3.2,
    )


def series_label(method: str, setting: str) -> str:
    """A line's name, with the setting on a second line; legends below the panels join the two."""
    return f"{method}\n({setting})" if setting else method


def label_inches(labels: list[str]) -> float:
    """About the width of the longest label, by which a figure grows to keep its axes' size."""
    return _CHARACTER_INCHES * max(map(len, labels))


def _seeds_text(num_seeds: pd.Series) -> str:
    """What a line and its band show, with the number of seeds."""
    low, high = num_seeds.min(), num_seeds.max()
    if high == 1:
        return "one seed each (n = 1)"
    count = f"n = {low}" if low == high else f"n = {low} to {high}"
    return f"mean and 95 % interval, {count} seeds"
