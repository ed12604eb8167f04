"""Figure: which labels each client holds, for every data set and partition."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.figures import caption, style
from analysis.records.campaign import PANEL, Campaign, NotDrawn, is_panel, panels_in

NAME = "partition"
_COLUMNS = 2


def data(campaign: Campaign) -> pd.DataFrame:
    """Columns: dataset, partition, seed, client_id, label, num_examples, share (of the client's).

    Of the first seed in each panel, whose runs share their partition.
    """
    runs = campaign.runs[["run_id", *PANEL, "seed"]]
    runs = runs[runs["run_id"].isin(campaign.clients["run_id"])]
    if runs.empty:
        raise NotDrawn("no record has a partition.json with label_counts")
    first = runs.sort_values([*PANEL, "seed", "run_id"]).groupby(PANEL).head(1)
    frame = campaign.clients.merge(first, on="run_id").drop(columns="run_id")
    totals = frame.groupby([*PANEL, "client_id"])["num_examples"].transform("sum")
    return frame.assign(share=frame["num_examples"] / totals)


def draw(campaign: Campaign, out_dir: Path) -> list[Path]:
    """Write partition.pdf, .png and .txt (the caption) to `out_dir`; returns the files."""
    frame = data(campaign)
    shown = panels_in(campaign, frame)
    num_columns = min(_COLUMNS, len(shown))
    num_rows = -(-len(shown) // num_columns)
    most_labels = frame.groupby("dataset")["label"].nunique().max()
    with style.context():
        fig = Figure(figsize=(0.6 + 4.2 * num_columns, (1.3 + 0.13 * most_labels) * num_rows))
        grid = fig.subplots(num_rows, num_columns, squeeze=False)
        for ax in grid.flat[len(shown) :]:
            ax.set_visible(False)
        for ax, panel in zip(grid.flat, shown, strict=False):
            rows = frame[is_panel(frame, panel)]
            wide = rows.pivot(index="label", columns="client_id", values="share").fillna(0)
            image = ax.imshow(
                wide, aspect="auto", cmap="Greys", vmin=0, vmax=1, interpolation="nearest"
            )
            ax.set_yticks(np.arange(len(wide)), wide.index, fontsize=6)
            ticks = range(0, len(wide.columns), max(1, len(wide.columns) // 6))
            ax.set_xticks(list(ticks), [str(wide.columns[tick]) for tick in ticks])
            ax.set_title(", ".join(panel))
            ax.set_xlabel("Client (client_id)")
            ax.grid(False)
        fig.colorbar(image, ax=grid, label="Share of the client's examples")
        files = style.save(fig, out_dir / NAME)
    title = (
        "Share of each label in each client's examples (a column sums to 1), of the panel's lowest "
        "seed; clients differ in number of examples too, which the shares do not show."
    )
    return [*files, caption.write(campaign, out_dir / NAME, title=title)]
