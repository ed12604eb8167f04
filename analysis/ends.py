"""Each finished run in one row: what it reached and what it cost; tables and figures share it."""

import pandas as pd

from analysis.load import SERIES, Campaign

_OF_LAST_EVALUATION = [
    "accuracy",
    "macro_f1",
    "client_accuracy_mean",
    "client_accuracy_std",
    "client_accuracy_p10",
]
_OF_LAST_ROUND = [
    "cumulative_uplink_bytes",
    "cumulative_downlink_bytes",
    "cumulative_total_bytes",
    "live_triplets",
]
_MAXIMA = ["peak_memory_bytes", "peak_device_memory_bytes"]
_CONDITIONS = {"alpha": "partition.alpha", "num_rounds": "federation.num_rounds"}


def ends(campaign: Campaign) -> pd.DataFrame:
    """One row per run, in the order of SERIES and seed; a column that no run has is empty.

    Columns: run_id, dataset, partition, method, setting, seed, total_seconds, alpha, num_rounds;
    of the last evaluated round accuracy_percent, macro_f1 and client_accuracy_*; of the last round
    the cumulative bytes and live_triplets; over rounds the largest peak_*_bytes, and
    local_train_seconds, summed (all) and of the last round (last).
    """
    rounds = campaign.rounds.sort_values(["run_id", "round_index"])
    frame = campaign.runs[["run_id", *SERIES, "seed", "total_seconds"]].set_index("run_id")
    for name, column in _CONDITIONS.items():
        frame[name] = campaign.runs.set_index("run_id").get(column, float("nan"))
    evaluated = rounds.dropna(subset=["accuracy"]).groupby("run_id").tail(1).set_index("run_id")
    for name in _OF_LAST_EVALUATION:
        frame[name] = evaluated.get(name, float("nan"))
    last = rounds.groupby("run_id").tail(1).set_index("run_id")
    for name in _OF_LAST_ROUND:
        frame[name] = last.get(name, float("nan"))
    by_run = rounds.groupby("run_id")
    for name in _MAXIMA:
        frame[name] = by_run[name].max() if name in rounds else float("nan")
    frame["all_local_train_seconds"] = by_run["local_train_seconds"].sum(min_count=1)
    frame["last_local_train_seconds"] = last["local_train_seconds"]
    frame["accuracy_percent"] = 100 * frame.pop("accuracy")
    return frame.reset_index().sort_values([*SERIES, "seed", "run_id"], ignore_index=True)
