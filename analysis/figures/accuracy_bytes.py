"""Figure: accuracy of the server's state against the bytes that clients have sent up."""

from pathlib import Path

import pandas as pd

from analysis.figures.panels import accuracy_by_round, draw_panels
from analysis.records.campaign import Campaign

NAME = "accuracy_bytes"


def data(campaign: Campaign) -> pd.DataFrame:
    """`panels.accuracy_by_round`. Masks differ between seeds, and so may their bytes."""
    return accuracy_by_round(campaign)


def draw(campaign: Campaign, out_dir: Path) -> list[Path]:
    frame = data(campaign)
    return draw_panels(
        campaign,
        frame.assign(uplink_megabytes=frame["cumulative_uplink_bytes_mean"] / 1e6),
        out_dir / NAME,
        x="uplink_megabytes",
        x_label="Cumulative uplink (MB)",
        title="Accuracy of the server's state against cumulative uplink: the payload of all "
        "cohorts' uploads so far, headers and masks included, mean over seeds, 1 MB = 10^6 bytes.",
    )
