"""Figure: which labels each client holds, for every data set and partition."""

from pathlib import Path

import numpy as np
import pandas as pd

from analysis.figures import caption, style
from analysis.figures.panels import filled_rows, heat_map
from analysis.records.campaign import PANEL, Campaign, NotDrawn, by_panel

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


@style.context()
def draw(campaign: Campaign, out_dir: Path) -> list[Path]:
    frame = data(campaign)
    blocks = by_panel(campaign, frame)
    most_labels = frame.groupby("dataset")["label"].nunique().max()
    size = (4.2, 1.3 + 0.13 * most_labels)
    fig, axes = filled_rows(len(blocks), min(_COLUMNS, len(blocks)), size, margin=0.6)
    for ax, (panel, rows) in zip(axes, blocks, strict=False):
        wide = rows.pivot(index="label", columns="client_id", values="share").fillna(0)
        image = heat_map(ax, wide, cmap="Greys", top=1, num_ticks=6)
        ax.set_yticks(np.arange(len(wide)), wide.index, fontsize=6)
        ax.set_title(", ".join(panel))
        ax.set_xlabel("Client (client_id)")
    fig.colorbar(image, ax=axes, label="Share of the client's examples")
    title = (
        "Share of each label in each client's examples (a column sums to 1), of the panel's lowest "
        "seed; clients differ in number of examples too, which the shares do not show."
    )
    return style.save(fig, out_dir / NAME, caption.paragraphs(campaign, title))
