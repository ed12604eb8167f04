"""What each run paid until it reached its target: 95 % of lora's accuracy with the same seed."""

import pandas as pd

from analysis.records.campaign import PANEL, SERIES, Campaign, NotDrawn, modelled_devices
from analysis.records.energy import known_energy
from analysis.records.per_run import per_run

PART_OF_LORA = 0.95
_COSTS = ["uplink_bytes", "total_bytes", "seconds", "joules"]


def targets(campaign: Campaign) -> pd.DataFrame:
    """Columns: dataset, partition, seed, target_accuracy_percent: 95 % of lora's last accuracy.

    Each seed has its own target: it is another partition, and some are harder by many points.
    Raises NotDrawn without an evaluated run of lora.
    """
    runs = per_run(campaign)
    lora = runs[(runs["method"] == "lora") & runs["accuracy_percent"].notna()]
    if lora.empty:
        raise NotDrawn("no evaluated run of lora, which sets the target accuracy")
    means = PART_OF_LORA * lora.groupby([*PANEL, "seed"])["accuracy_percent"].mean()
    return means.rename("target_accuracy_percent").reset_index()


def costs_to_target(campaign: Campaign) -> pd.DataFrame:
    """One row per run whose panel and seed have a target.

    Columns: run_id, SERIES, seed, target_accuracy_percent, and the sums up to the first evaluated
    round that reached it, else missing, of uplink_bytes, total_bytes (up and down), seconds, joules
    (counted, of one source) and modelled_joules.D of each device D.
    """
    costs = [*_COSTS, *(f"modelled_joules.{name}" for name in modelled_devices(campaign))]
    if known_energy(campaign)[0] is None:
        costs.remove("joules")
    keys = ["run_id", *SERIES, "seed"]
    runs = campaign.runs[keys].merge(targets(campaign), on=[*PANEL, "seed"])
    rounds = campaign.rounds.merge(runs[["run_id", "target_accuracy_percent"]], on="run_id")
    reached = rounds[100 * rounds["accuracy"] >= rounds["target_accuracy_percent"]]
    first = reached.sort_values("round_index").groupby("run_id").head(1).set_index("run_id")
    for name in costs:
        runs[name] = runs["run_id"].map(first.get(f"cumulative_{name}", pd.Series(dtype=float)))
    runs = runs.reindex(columns=list(dict.fromkeys([*runs, *_COSTS])))
    return runs.sort_values([*SERIES, "seed"], ignore_index=True)
