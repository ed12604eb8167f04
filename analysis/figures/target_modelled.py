"""Figure: modelled joules to a target accuracy on edge devices, as ratios to LoRA."""

from pathlib import Path

import pandas as pd

from analysis.figures.target import draw_ratios, ratios, sentence
from analysis.records.campaign import Campaign, NotDrawn, modelled_devices

NAME = "target_modelled"


def data(campaign: Campaign) -> pd.DataFrame:
    """One row per line: `target.ratios` of modelled_joules.D of each device D."""
    devices = modelled_devices(campaign)
    if not devices:
        raise NotDrawn("no run has rounds that are modelled on devices")
    return ratios(campaign, [f"modelled_joules.{name}" for name in devices])


def draw(campaign: Campaign, out_dir: Path) -> list[Path]:
    frame = data(campaign)
    names = modelled_devices(campaign)
    labels = {f"modelled_joules.{name}": f"Modelled joules, {name}" for name in names}
    title = (
        "Modelled, not measured: joules of all clients on the named edge device, from counted "
        "FLOPs and bytes by the profiles of bench/devices.toml (device_profiles in run.json); "
        f"hollow markers. {sentence('They are summed')}"
    )
    return draw_ratios(campaign, frame, labels, out_dir / NAME, title=title, modelled=True)
