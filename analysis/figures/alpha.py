"""Figure: last accuracy against the Dirichlet concentration of the partition."""

from pathlib import Path

import pandas as pd

from analysis import stats
from analysis.figures import caption, style
from analysis.figures.panels import add_legend, draw_lines, grid
from analysis.records.campaign import Campaign, NotDrawn
from analysis.records.per_run import per_run

NAME = "alpha"


def data(campaign: Campaign) -> pd.DataFrame:
    """Columns: dataset, method, setting, alpha, num_seeds, accuracy_percent_{mean,low,high}.

    Only Dirichlet partitions, of data sets with at least two concentrations.
    """
    dirichlet = campaign.runs.loc[campaign.runs["partition.scheme"] == "dirichlet", "run_id"]
    runs = per_run(campaign).dropna(subset=["accuracy_percent", "alpha"])
    runs = runs[runs["run_id"].isin(dirichlet)]
    if not runs.empty:
        runs = runs[runs.groupby("dataset")["alpha"].transform("nunique") > 1]
    if runs.empty:
        raise NotDrawn("no data set with two Dirichlet concentrations")
    return runs.groupby(["dataset", "method", "setting", "alpha"], as_index=False).agg(
        num_seeds=("run_id", "nunique"),
        **stats.mean_and_interval("accuracy_percent"),
    )


@style.context()
def draw(campaign: Campaign, out_dir: Path) -> list[Path]:
    frame = data(campaign)
    datasets = sorted(frame["dataset"].unique())
    x_label = "Dirichlet alpha (left: more heterogeneous)"
    fig, axes = grid([(dataset, "") for dataset in datasets], x_label)
    for dataset, ax in zip(datasets, axes, strict=True):
        rows = frame[frame["dataset"] == dataset]
        draw_lines(ax, rows, "alpha", "accuracy_percent")
        ax.set_xscale("log")
        ax.set_xticks(sorted(rows["alpha"].unique()), minor=False)
        ax.set_xticks([], minor=True)
        ax.xaxis.set_major_formatter(style.plain_number)
    add_legend(fig, axes, frame["num_seeds"])
    what = "the concentration of the Dirichlet partition"
    title = f"Accuracy of the last evaluated round against {what}."
    return style.save(fig, out_dir / NAME, caption.paragraphs(campaign, title))
