"""What each finished run reached and cost, one row a run; tables and figures share it."""

import pandas as pd

from analysis.records.campaign import SERIES, Campaign, by_panel, modelled_devices, series_names
from analysis.records.energy import known_energy

# Evaluations. One alone is far off by chance where few unlike clients are averaged.
LATE = 3
_OF_LAST_EVALUATION = [
    *("accuracy", "macro_f1"),
    *("client_accuracy_mean", "client_accuracy_std", "client_accuracy_p10"),
]
_OF_LAST_ROUND = [
    *("cumulative_uplink_bytes", "cumulative_downlink_bytes", "cumulative_total_bytes"),
    *("live_triplets", "state_digest"),
]
_MAXIMA = ["peak_memory_bytes", "peak_device_memory_bytes"]
_OF = ("first", "last", "all")
_COSTS = ["local_train_seconds", "local_train_joules", "flops"]
# FedARA without one of them is its ablation.
_SWITCHES = ["method.rank_allocation", "method.module_pruning"]
_CONDITIONS = {
    "alpha": "partition.alpha",
    "num_rounds": "federation.num_rounds",
    "cohort": "federation.cohort",
}


def per_run(campaign: Campaign) -> pd.DataFrame:
    """One row per run, in the order of SERIES and seed; a column that no run has is empty.

    Columns: run_id, SERIES, seed, total_seconds, alpha, num_rounds, cohort, and

    is_ablation: a part of the method is switched off.
    accuracy_percent, macro_f1, client_accuracy_*: of the last evaluated round.
    late_accuracy_percent: the mean of the last LATE evaluations; missing where there are fewer.
    cumulative bytes, live_triplets, state_digest: of the last round.
    peak_*_bytes: the largest over rounds.
    first_X, last_X, all_X: of the first round, of the last one, and summed over all rounds, where
        X is local_train_seconds, local_train_joules, flops, and of each device D
        modelled_seconds.D and modelled_joules.D. Missing unless every round holds X.
    energy_joules: of the whole run. It and all local_train_joules are missing where sources
        differ.
    """
    rounds = campaign.rounds.sort_values(["run_id", "round_index"])
    own = ["run_id", *SERIES, "seed", "total_seconds", "energy_joules"]
    runs = campaign.runs.set_index("run_id")
    frame = campaign.runs[own].set_index("run_id")
    for name, column in _CONDITIONS.items():
        frame[name] = runs.get(column, float("nan"))
    frame["is_ablation"] = runs.reindex(columns=_SWITCHES).eq(False).any(axis=1)
    evaluations = rounds.dropna(subset=["accuracy"]).groupby("run_id")
    late = evaluations.tail(LATE).groupby("run_id")["accuracy"]
    frame["late_accuracy_percent"] = 100 * late.mean()[late.size() == LATE]
    evaluated = evaluations.tail(1).set_index("run_id")
    for name in _OF_LAST_EVALUATION:
        frame[name] = evaluated.get(name, float("nan"))
    by_run = rounds.groupby("run_id")
    first, last = (rows.set_index("run_id") for rows in (by_run.head(1), by_run.tail(1)))
    for name in _OF_LAST_ROUND:
        frame[name] = last.get(name, float("nan"))
    for name in _MAXIMA:
        frame[name] = by_run[name].max() if name in rounds else float("nan")
    devices = modelled_devices(campaign)
    modelled = [f"modelled_{unit}.{name}" for name in devices for unit in ("seconds", "joules")]
    for name in (*_COSTS, *modelled):
        frame[f"all_{name}"] = last.get(f"cumulative_{name}", float("nan"))
        in_every_round = frame[f"all_{name}"].notna()
        for of, rows in (("first", first), ("last", last)):
            frame[f"{of}_{name}"] = rows.get(name, pd.Series(dtype=float)).where(in_every_round)
    if known_energy(campaign)[0] is None:
        frame[["energy_joules", *(f"{of}_local_train_joules" for of in _OF)]] = float("nan")
    frame["accuracy_percent"] = 100 * frame.pop("accuracy")
    return frame.reset_index().sort_values([*SERIES, "seed", "run_id"], ignore_index=True)


def in_panels(campaign: Campaign, frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of `frame`, those of one panel together, in the order of the figures."""
    return pd.concat([rows for _, rows in by_panel(campaign, frame)], ignore_index=True)


def series_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """The first columns of a table with one row per data set, partition, method and setting."""
    return frame[["dataset", "partition"]].assign(
        method=series_names(frame), n=frame["num_runs"].astype(str)
    )


def mean_of_all(values: pd.Series) -> float:
    """The mean, missing where one of the runs lacks the number; for DataFrame.agg."""
    return float(values.mean(skipna=False))
