"""Figure: where a round's seconds go, by phase and method, as stacked bars."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures import caption, style
from analysis.figures.panels import label_inches
from analysis.records import caveats
from analysis.records.campaign import SERIES, Campaign, NotDrawn, by_panel, series_names
from fedara_core.schema import PHASES

NAME = "phases"
# Colour and hatch of each phase; they differ in grey, too.
_BARS = [
    *((style.BLACK, ""), (style.BLUE, ""), (style.PURPLE, "//")),
    *(("#DDDDDD", ".."), (style.VERMILLION, "\\\\"), (style.GREEN, "xx")),
    *((style.SKY, ""), (style.ORANGE, "--"), ("#999999", "||")),
]
_BARS_INCHES = 5.6


def data(campaign: Campaign) -> pd.DataFrame:
    """Columns: dataset, partition, method, setting, phase, seconds (mean over rounds and runs).

    A round without a phase counts as 0 seconds of it, such as one without an evaluation.
    """
    columns = {f"{phase}_seconds": phase for phase in PHASES}
    present = [name for name in columns if name in campaign.rounds]
    rounds = campaign.rounds.dropna(subset=present, how="all")
    if not present or rounds.empty:
        raise NotDrawn("no run holds seconds by phase")
    rows = rounds.fillna(dict.fromkeys(present, 0.0)).merge(campaign.runs[["run_id", *SERIES]])
    means = rows.groupby([*SERIES, "run_id"])[present].mean().groupby(SERIES).mean()
    long = means.rename(columns=columns).reset_index()
    return long.melt(id_vars=SERIES, var_name="phase", value_name="seconds")


@style.context()
def draw(campaign: Campaign, out_dir: Path) -> list[Path]:
    frame = data(campaign)
    blocks = by_panel(campaign, frame)
    heights = [0.9 + 0.2 * len(rows[SERIES].drop_duplicates()) for _, rows in blocks]
    width = _BARS_INCHES + label_inches(series_names(frame))
    fig = Figure(figsize=(width, sum(heights) + 0.4))
    axes = fig.subplots(len(blocks), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (panel, rows) in zip(axes, blocks, strict=True):
        _draw_bars(ax, rows)
        ax.set_title(caveats.heading(campaign, panel), loc="left")
    axes[-1].set_xlabel("Seconds of a round (mean over rounds and runs)")
    handles = {
        label: handle
        for ax in axes
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    fig.legend(handles.values(), handles, loc="outside lower center", ncols=5)
    title = (
        "Seconds of a round by phase, mean over all rounds and runs; the evaluation's seconds are "
        "spread over the rounds without one. Each phase is the maximum over processes, so a bar "
        "may be longer than its round. Seconds compare methods only where the runs had the same "
        "machine to themselves."
    )
    return style.save(fig, out_dir / NAME, caption.paragraphs(campaign, title))


def _draw_bars(ax: Any, rows: pd.DataFrame) -> None:
    wide = rows.pivot_table(index=["method", "setting"], columns="phase", values="seconds")
    left = pd.Series(0.0, index=wide.index)
    for phase, (color, hatch) in zip(PHASES, _BARS, strict=True):
        if phase not in wide:
            continue
        ax.barh(
            range(len(wide)),
            wide[phase],
            left=left,
            color=color,
            hatch=hatch,
            edgecolor="white",
            linewidth=0,
            label=phase.replace("_", " "),
        )
        left += wide[phase].fillna(0)
    ax.set_yticks(range(len(wide)), series_names(wide.reset_index()))
    ax.set_ylim(len(wide) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
