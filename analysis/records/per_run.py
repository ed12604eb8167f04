"""Each finished run in one row: what it reached and what it cost; tables and figures share it."""

import pandas as pd

from analysis.records.campaign import (
    SERIES,
    Campaign,
    is_panel,
    known_energy,
    modelled_devices,
    panels,
    series_name,
)

LATE = 3  # evaluations: where few unlike clients are averaged, one of them is far off by chance
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
    "state_digest",
]
_MAXIMA = ["peak_memory_bytes", "peak_device_memory_bytes"]
_ALL_AND_LAST = ["local_train_seconds", "local_train_joules", "flops"]
# FedARA without one of them is its ablation.
_PARTS = ["method.rank_allocation", "method.module_pruning"]
_CONDITIONS = {"alpha": "partition.alpha", "num_rounds": "federation.num_rounds"}


def ends(campaign: Campaign) -> pd.DataFrame:
    """One row per run, in the order of SERIES and seed; a column that no run has is empty.

    Columns: run_id, dataset, partition, method, setting, seed, total_seconds, energy_joules, alpha,
    num_rounds; is_ablation: a part of the method is switched off; of the last evaluated round
    accuracy_percent, macro_f1 and client_accuracy_*;
    late_accuracy_percent, the mean of the last LATE evaluations, missing where there are fewer; of
    the last round the cumulative bytes, live_triplets and state_digest; over rounds the largest
    peak_*_bytes; summed over all rounds (all_X) and of the last one (last_X) local_train_seconds,
    local_train_joules, flops, and of each device D modelled_seconds.D and modelled_joules.D,
    missing where not every round holds them. Joules that are not modelled on devices are missing
    where sources differ.
    """
    rounds = campaign.rounds.sort_values(["run_id", "round_index"])
    own = ["run_id", *SERIES, "seed", "total_seconds", "energy_joules"]
    frame = campaign.runs[own].set_index("run_id")
    for name, column in _CONDITIONS.items():
        frame[name] = campaign.runs.set_index("run_id").get(column, float("nan"))
    parts = campaign.runs.set_index("run_id").reindex(columns=_PARTS)
    frame["is_ablation"] = parts.eq(False).any(axis=1)
    evaluations = rounds.dropna(subset=["accuracy"]).groupby("run_id")
    late = evaluations.tail(LATE).groupby("run_id")["accuracy"]
    frame["late_accuracy_percent"] = 100 * late.mean()[late.size() == LATE]
    evaluated = evaluations.tail(1).set_index("run_id")
    for name in _OF_LAST_EVALUATION:
        frame[name] = evaluated.get(name, float("nan"))
    last = rounds.groupby("run_id").tail(1).set_index("run_id")
    for name in _OF_LAST_ROUND:
        frame[name] = last.get(name, float("nan"))
    by_run = rounds.groupby("run_id")
    for name in _MAXIMA:
        frame[name] = by_run[name].max() if name in rounds else float("nan")
    devices = modelled_devices(campaign)
    modelled = [f"modelled_{unit}.{name}" for name in devices for unit in ("seconds", "joules")]
    for name in (*_ALL_AND_LAST, *modelled):
        frame[f"all_{name}"] = last.get(f"cumulative_{name}", float("nan"))
        in_every_round = frame[f"all_{name}"].notna()
        frame[f"last_{name}"] = last.get(name, pd.Series(dtype=float)).where(in_every_round)
    if known_energy(campaign)[0] is None:
        frame[["energy_joules", "all_local_train_joules", "last_local_train_joules"]] = float("nan")
    frame["accuracy_percent"] = 100 * frame.pop("accuracy")
    return frame.reset_index().sort_values([*SERIES, "seed", "run_id"], ignore_index=True)


def in_panels(campaign: Campaign, frame: pd.DataFrame) -> pd.DataFrame:
    """Rows with dataset and partition, those of one panel together, in the order of the figures."""
    parts = [frame[is_panel(frame, panel)] for panel in panels(campaign)]
    return pd.concat(parts, ignore_index=True)


def series_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """The first columns of a table with a row for each data set, partition, method and setting, and
    its num_runs."""
    series = zip(frame["method"], frame["setting"], strict=True)
    return frame[["dataset", "partition"]].assign(
        method=[series_name(*names) for names in series], n=frame["num_runs"].astype(str)
    )


def mean_of_all(values: pd.Series) -> float:
    """The mean, missing where one of the runs lacks the number; for DataFrame.agg."""
    return float(values.mean(skipna=False))
