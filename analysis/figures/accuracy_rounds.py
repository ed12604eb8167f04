"""Figure: accuracy of the server's state against communication rounds completed."""

from pathlib import Path

import pandas as pd

from analysis.figures.panels import accuracy_by_round, draw_panels
from analysis.records.campaign import Campaign

NAME = "accuracy_rounds"


def data(campaign: Campaign) -> pd.DataFrame:
    """`panels.accuracy_by_round`, without the bytes."""
    return accuracy_by_round(campaign).drop(columns="cumulative_uplink_bytes_mean")


def draw(campaign: Campaign, out_dir: Path) -> list[Path]:
    return draw_panels(
        campaign,
        data(campaign),
        out_dir / NAME,
        x="rounds_completed",
        x_label="Rounds completed",
        title="Accuracy of the server's state against communication rounds completed.",
    )
