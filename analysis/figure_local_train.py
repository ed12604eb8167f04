"""Figure: seconds of local training round by round, FedARA against LoRA."""

from pathlib import Path

import pandas as pd

from analysis import caption, spread, style
from analysis.curves import add_legend, columns_of, draw_lines, grid, is_panel, seeds_text
from analysis.load import PANEL, SERIES, Campaign, NotDrawn, panels

NAME = "local_train"
_METHODS = ["fedara", "lora"]


def data(campaign: Campaign) -> pd.DataFrame:
    """Panels in which both methods were timed; mean over seeds and its 95 % interval.

    Columns: dataset, partition, method, setting, round_index, num_seeds,
    local_train_seconds_{mean,low,high}.
    """
    rows = campaign.rounds.merge(campaign.runs[["run_id", *SERIES]], on="run_id")
    rows = rows[rows["method"].isin(_METHODS)].dropna(subset=["local_train_seconds"])
    if not rows.empty:
        both = rows.groupby(PANEL)["method"].transform("nunique") == len(_METHODS)
        rows = rows[both]
    if rows.empty:
        raise NotDrawn("no data set and partition with the seconds of both fedara and lora")
    return rows.groupby([*SERIES, "round_index"], as_index=False).agg(
        num_seeds=("run_id", "nunique"),
        local_train_seconds_mean=("local_train_seconds", "mean"),
        local_train_seconds_low=("local_train_seconds", spread.low),
        local_train_seconds_high=("local_train_seconds", spread.high),
    )


def draw(campaign: Campaign, out_dir: Path) -> list[Path]:
    """Write local_train.pdf, .png and .txt (the caption) to `out_dir`; returns the files."""
    frame = data(campaign)
    frame = frame.assign(rounds_completed=frame["round_index"] + 1)
    shown = [panel for panel in panels(campaign) if is_panel(frame, panel).any()]
    with style.context():
        num_columns = columns_of(shown)
        fig, axes = grid(shown, num_columns)
        for index, (panel, ax) in enumerate(zip(shown, axes, strict=True)):
            draw_lines(ax, frame[is_panel(frame, panel)], "rounds_completed", "local_train_seconds")
            ax.set_title(", ".join(panel))
            ax.set_xlabel("Round")
            ax.set_ylabel("Local training (s)" if index % num_columns == 0 else "")
        for ax in axes:  # at the end: panels of one data set share their scale
            ax.set_ylim(bottom=0)
        add_legend(fig, axes, seeds_text(frame["num_seeds"]))
        files = style.save(fig, out_dir / NAME)
    title = (
        "Seconds of local training in each round, over all clients that one process hosts, maximum "
        "over processes. A fall of FedARA's line is what pruning saves; single peaks are other "
        "work on the machine."
    )
    return [*files, caption.write(campaign, out_dir / NAME, title=title)]
