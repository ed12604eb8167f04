"""What each run paid until it first reached the target accuracy of its data set and partition."""

import pandas as pd

from analysis.ends import ends
from analysis.load import PANEL, SERIES, Campaign, NotDrawn

PART_OF_LORA = 0.95
COSTS = {"uplink_bytes": "cumulative_uplink_bytes", "seconds": "cumulative_seconds"}


def targets(campaign: Campaign) -> pd.DataFrame:
    """target_accuracy_percent by dataset and partition: 95 % of lora's last accuracy, mean over it.

    Raises NotDrawn without an evaluated run of lora.
    """
    final = ends(campaign)
    lora = final[(final["method"] == "lora") & final["accuracy_percent"].notna()]
    if lora.empty:
        raise NotDrawn("no evaluated run of lora, which sets the target accuracy")
    frame = lora.groupby(PANEL, as_index=False)["accuracy_percent"].mean()
    frame["target_accuracy_percent"] = PART_OF_LORA * frame.pop("accuracy_percent")
    return frame


def costs_to_target(campaign: Campaign) -> pd.DataFrame:
    """One row per run whose panel has a target.

    Columns: run_id, dataset, partition, method, setting, seed, target_accuracy_percent, and of the
    first evaluated round at or above it uplink_bytes, total_bytes (up and down) and seconds, each
    summed up to that round and missing where the target was never reached.
    """
    keys = ["run_id", *SERIES, "seed"]
    runs = campaign.runs[keys].merge(targets(campaign), on=PANEL)
    rounds = campaign.rounds.merge(runs[["run_id", "target_accuracy_percent"]], on="run_id")
    reached = rounds[100 * rounds["accuracy"] >= rounds["target_accuracy_percent"]]
    first = reached.sort_values("round_index").groupby("run_id").head(1).set_index("run_id")
    for name, column in (*COSTS.items(), ("total_bytes", "cumulative_total_bytes")):
        of_run = first[column] if column in first else pd.Series(dtype=float)
        runs[name] = runs["run_id"].map(of_run)
    return runs.sort_values([*SERIES, "seed"], ignore_index=True)
