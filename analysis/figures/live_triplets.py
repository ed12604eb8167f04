"""Figure: live triplets of each adapter over the rounds, as a heat map, where any are pruned."""

from pathlib import Path
from textwrap import fill

import pandas as pd

from analysis.figures import caption, style
from analysis.figures.panels import filled_rows, heat_map
from analysis.records.campaign import SERIES, Campaign, NotDrawn, by_panel, by_series, series_name

NAME = "live_triplets"
_MAX_LABELS = 48
_TITLE_LETTERS = 34  # that fit over a panel


def data(campaign: Campaign) -> pd.DataFrame:
    """Columns: SERIES, adapter, round_index, live_triplets (mean over seeds).

    Only of methods that end with fewer live triplets than they had after the first round.
    """
    rows = campaign.adapters.merge(campaign.runs[["run_id", *SERIES]], on="run_id")
    if rows.empty:
        raise NotDrawn("no run holds live_triplets_by_adapter")
    totals = rows.groupby([*SERIES, "round_index"])["live_triplets"].sum().groupby(SERIES)
    pruned = totals.last() < totals.first()
    kept = pruned[pruned].index.to_frame(index=False)
    if kept.empty:
        raise NotDrawn("no method pruned a triplet")
    groups = rows.merge(kept, on=SERIES).groupby([*SERIES, "adapter", "round_index"])
    return groups["live_triplets"].mean().reset_index()


@style.context()
def draw(campaign: Campaign, out_dir: Path) -> list[Path]:
    frame = data(campaign)
    blocks = [
        (panel, series_name(method, setting), rows)
        for panel, own in by_panel(campaign, frame)
        for method, setting, rows in by_series(own)
    ]
    num_adapters = max(rows["adapter"].nunique() for _, _, rows in blocks)
    height = 1.05 + 0.11 * min(num_adapters, _MAX_LABELS)
    num_columns = min(3, len(blocks))
    fig, axes = filled_rows(len(blocks), num_columns, (2.6, height), margin=1.4)
    top = frame["live_triplets"].max()
    row_names: list[str] = []
    for place, (ax, (panel, label, rows)) in enumerate(zip(axes, blocks, strict=False)):
        wide = rows.pivot(index="adapter", columns="round_index", values="live_triplets")
        wide = wide.loc[sorted(wide.index, key=_natural)].rename(columns=lambda index: index + 1)
        # cividis is monotone in grey and the same to colour-blind readers.
        image = heat_map(ax, wide, cmap="cividis", top=top, num_ticks=5)
        ax.set_title("\n".join(fill(text, _TITLE_LETTERS) for text in (label, ", ".join(panel))))
        ax.set_xlabel("Round")
        step = -(-len(wide) // _MAX_LABELS)
        names = [_short(name) for name in wide.index[::step]]
        if place % num_columns and names == row_names:
            ax.set_yticks([])  # the same adapters as to the left
        else:
            ax.set_yticks(range(0, len(wide), step), names, fontsize=5.5)
        row_names = names
    fig.colorbar(image, ax=axes, label="Live triplets", shrink=0.6)
    title = (
        "Live triplets of each adapter after each round, layers from the lowest at the top; an "
        "adapter at 0 has left the model. Only methods that prune are shown."
    )
    return style.save(fig, out_dir / NAME, caption.paragraphs(campaign, title))


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _short(name: str) -> str:
    """From the layer's number on: "encoder.encoder.layer.3.output.dense" is "3.output.dense"."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] :]) if numbers else name
