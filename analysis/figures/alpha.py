"""Figure: last accuracy against the Dirichlet concentration of the partition."""

from pathlib import Path

import pandas as pd

from analysis import stats
from analysis.figures import caption, style
from analysis.figures.panels import add_legend, draw_lines, grid, seeds_text
from analysis.records.campaign import Campaign, NotDrawn
from analysis.records.per_run import per_run

NAME = "alpha"
_KEYS = ["dataset", "method", "setting"]


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
    return runs.groupby([*_KEYS, "alpha"], as_index=False).agg(
        num_seeds=("run_id", "nunique"),
        **stats.mean_and_interval("accuracy_percent"),
    )


def draw(campaign: Campaign, out_dir: Path) -> list[Path]:
    """Write alpha.pdf, .png and .txt (the caption) to `out_dir`; returns the files."""
    frame = data(campaign)
    datasets = sorted(frame["dataset"].unique())
    with style.context():
        num_columns = min(3, len(datasets))
        fig, axes = grid([(dataset, "") for dataset in datasets], num_columns)
        for index, (dataset, ax) in enumerate(zip(datasets, axes, strict=True)):
            rows = frame[frame["dataset"] == dataset]
            draw_lines(ax, rows, "alpha", "accuracy_percent")
            ax.set_xscale("log")
            ax.set_xticks(sorted(rows["alpha"].unique()), minor=False)
            ax.set_xticks([], minor=True)
            ax.xaxis.set_major_formatter(style.plain_number)
            ax.set_title(dataset)
            ax.set_xlabel("Dirichlet alpha (left: more heterogeneous)")
            ax.set_ylabel("Accuracy (%)" if index % num_columns == 0 else "")
        add_legend(fig, axes, seeds_text(frame["num_seeds"]))
        files = style.save(fig, out_dir / NAME)
    title = (
        "Accuracy of the last evaluated round against the concentration of the Dirichlet partition."
    )
    return [*files, caption.write(campaign, out_dir / NAME, title=title)]
