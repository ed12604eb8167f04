"""A campaign's records (run.json, rounds.jsonl, partition.json) as tidy data frames."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.records import reader
from analysis.records.names import shown
from analysis.records.settings import differing_keys, setting_texts
from analysis.records.versions import with_versions
from fedara_core.errors import InputError
from fedara_core.schema import RUN_FILE
from fedara_core.shapes import REQUIRED_IN_ROUND

# What one panel of a figure, or one block of a table, shares; and what one line or row shares.
PANEL = ["dataset", "partition"]
SERIES = [*PANEL, "method", "setting"]

# Columns that figures and tables name. One that no run measured is there, and empty.
_RUN_COLUMNS = ["total_seconds", "partition.alpha", "energy_source", "energy_joules"]
_ROUND_COLUMNS = ["accuracy", "macro_f1", "live_triplets", "local_train_seconds", "flops"]
_ADAPTER_COLUMNS = ["run_id", "round_index", "adapter", "live_triplets"]
_CLIENT_COLUMNS = ["run_id", "client_id", "label", "num_examples"]

THEN = " then "  # joins two values of an interrupted run

# Nested keys of a round become columns that carry their unit.
_UNITS = {
    "seconds": "seconds",
    "energy_joules": "joules",
    "energy_net_joules": "net_joules",
    "peak_memory_bytes_by_phase": "peak_memory_bytes",
    "peak_device_memory_bytes_by_phase": "peak_device_memory_bytes",
}

# What is summed up over a run's rounds: total_X as cumulative_X, any other X, too.
_SUMMED = [
    *("uplink_bytes", "downlink_bytes", "total_seconds", "total_joules"),
    *("local_train_seconds", "local_train_joules", "flops"),
]
_LABEL_LETTERS = 60  # over a panel, or beside it
_MOST_INTEGER = 9e18
_MODELLED = ("modelled_seconds.", "modelled_joules.")


class NotDrawn(ValueError):
    """The records do not hold what one figure or table needs; the message says what."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Campaign:
    """The records below one folder.

    runs: one row per finished run. Columns are the keys of run.json. Nested keys are joined by a
        dot, and keys of the config lose "config.": "train.lr", "federation.cohort", "comm". Added:
        method, dataset, partition: labels. A method is marked, as "lora_a2 (v1)", where the
        records hold a newer version of its results (results_version, method_version: 1 if absent).
        setting: what tells runs of one method apart within a panel, seeds aside; often "".
        device: cpu, cuda, or both.
        world_size: "2 then 4" where a run was resumed on another number of processes.
        energy_joules, energy_source: of the whole run, from the rounds' counters if every round has
            them, else from run.json. Compare energy only after `energy.one_energy_source`.
    rounds: one row per run_id and round_index. Scalar keys keep their names. Nested keys are
        renamed: seconds.X is X_seconds, energy_joules.X is X_joules, energy_net_joules.X is
        X_net_joules, peak_memory_bytes_by_phase.X is X_peak_memory_bytes (of a GPU
        X_peak_device_memory_bytes), and modelled_by_device.D.modelled_X is modelled_X.D. Added are
        the sums up to and including the round, cumulative_X of each X of _SUMMED,
        cumulative_total_bytes (up and down) and cumulative_modelled_X.D. A sum is missing from the
        first round on that lacks the number.
    adapters: live_triplets by run_id, round_index and adapter; empty if no run recorded it.
    clients: num_examples by run_id, client_id and label, of partition.json; empty without one.
    incomplete: folder names of the runs without DONE; they never enter a figure.
    damaged: likewise the runs with DONE whose files are damaged or have lost rounds, with reasons.
    """

    runs: pd.DataFrame
    rounds: pd.DataFrame
    adapters: pd.DataFrame
    clients: pd.DataFrame
    incomplete: list[str]
    damaged: list[str]


def load_campaign(path: Path) -> Campaign:
    """Read all runs at any depth below `path`.

    Raises InputError when there is no folder or no run, or when a run id comes twice.
    """
    folders = reader.run_folders(path)
    if not folders:
        raise InputError(f"{path}: no records here (looked for */{RUN_FILE} at any depth)")
    found = reader.read_finished(folders, reader.read_record, lambda record: record.run["run_id"])
    runs: list[dict[str, Any]] = []
    rounds: list[pd.DataFrame] = []
    adapters: list[dict[str, Any]] = []
    clients: list[dict[str, Any]] = []
    for record in found.records:
        run = _run_columns(record.run)
        own = {"run_id": run["run_id"]}
        frame = _with_sums(pd.DataFrame([own | _round_columns(row) | own for row in record.rounds]))
        runs.append(run | _energy(run, frame))
        rounds.append(frame)
        adapters += [
            {**own, "round_index": row["round_index"], "adapter": name, "live_triplets": live}
            for row in record.rounds
            for name, live in row.get("live_triplets_by_adapter", {}).items()
        ]
        clients += [
            {
                **own,
                "client_id": client["client_id"],
                "label": shown(label, _LABEL_LETTERS),
                "num_examples": number,
            }
            for client in record.partition
            for label, number in client.get("label_counts", {}).items()
        ]
    empty = pd.DataFrame(columns=["run_id", *REQUIRED_IN_ROUND])
    return Campaign(
        runs=_runs_frame(runs),
        rounds=_with_columns(pd.concat(rounds or [empty], ignore_index=True), _ROUND_COLUMNS),
        adapters=pd.DataFrame(adapters, columns=_ADAPTER_COLUMNS),
        clients=pd.DataFrame(clients, columns=_CLIENT_COLUMNS),
        incomplete=found.incomplete,
        damaged=found.damaged,
    )


def by_panel(campaign: Campaign, frame: pd.DataFrame) -> list[tuple[tuple[str, str], pd.DataFrame]]:
    """((dataset, partition), its rows) in the order of figures: by data set, scheme, then alpha."""
    order = campaign.runs.sort_values(["dataset", "partition.scheme", "partition.alpha"])
    panels = order[PANEL].drop_duplicates().itertuples(index=False, name=None)
    groups = [(panel, frame[is_panel(frame, panel)]) for panel in panels]
    return [(panel, rows) for panel, rows in groups if not rows.empty]


def is_panel(frame: pd.DataFrame, panel: tuple[str, str]) -> pd.Series:
    """Which rows belong to this data set and partition."""
    return (frame["dataset"] == panel[0]) & (frame["partition"] == panel[1])


def by_series(frame: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(method, setting, its rows), of rows of one panel."""
    for (method, setting), group in frame.groupby(["method", "setting"]):
        yield str(method), str(setting), group


def series_name(method: str, setting: str) -> str:
    """The name of a row or line, on one line."""
    return f"{method} ({setting})" if setting else method


def series_names(frame: pd.DataFrame) -> list[str]:
    """`series_name` of each row of a frame."""
    return [series_name(*names) for names in zip(frame["method"], frame["setting"], strict=True)]


def modelled_devices(campaign: Campaign) -> list[str]:
    """Names of the devices that rounds are modelled on, in the order of the records."""
    seconds = campaign.rounds.filter(regex=r"^modelled_seconds\.")
    return [str(name).removeprefix(_MODELLED[0]) for name in seconds]


def _run_columns(record: dict[str, Any]) -> dict[str, Any]:
    run = {key.removeprefix("config."): value for key, value in _flatten(record).items()}
    run["run_id"] = record["run_id"]
    run["method"] = run["method.name"]
    name = run["dataset.name"].removeprefix("file:")
    run["dataset"] = shown(name.rstrip("/").split("/")[-1] or name, _LABEL_LETTERS)
    run["partition"] = _partition_label(run)
    sizes = dict.fromkeys(part.get("world_size") for part in (record, *record.get("parts", [])))
    if len(sizes) > 1:
        run["world_size"] = THEN.join(map(str, sizes))
    devices = {process.get("device", "").split(":")[0] for process in record.get("processes", [])}
    run["device"] = " and ".join(sorted(devices - {""})) or None
    return run


def _round_columns(record: dict[str, Any]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for key, value in record.items():
        if key in _UNITS:
            columns |= {f"{part}_{_UNITS[key]}": number for part, number in value.items()}
        elif key == "modelled_by_device":
            for device, modelled in value.items():
                columns |= {f"{name}.{device}": number for name, number in modelled.items()}
        elif not isinstance(value, dict | list):
            columns[key] = value
    return columns


def _with_sums(rounds: pd.DataFrame) -> pd.DataFrame:
    """One run's rounds with their cumulative columns."""
    modelled = [name for name in map(str, rounds) if name.startswith(_MODELLED)]
    # A sum that skipped a round without the number would look like a small one.
    sums = {
        f"cumulative_{name.removeprefix('total_')}": _wide(rounds[name]).cumsum(skipna=False)
        for name in [*_SUMMED, *modelled]
        if name in rounds
    }
    both = sums["cumulative_uplink_bytes"] + sums["cumulative_downlink_bytes"]
    return rounds.assign(**sums, cumulative_total_bytes=both)


def _wide(values: pd.Series) -> pd.Series:
    """The values in a type that holds their sum: 64 bits hold the FLOPs of days on many GPUs."""
    numbers = values.astype(float)
    return numbers if numbers.abs().sum() > _MOST_INTEGER else values


def _energy(run: dict[str, Any], rounds: pd.DataFrame) -> dict[str, Any]:
    """energy_source and energy_joules of a whole run; empty where they are not known."""
    counted = rounds.get("energy_source", pd.Series([None]))
    if counted.notna().all() and "total_joules" in rounds:
        sources = THEN.join(counted.unique())  # several if a source was lost in between
        return {
            "energy_source": sources,
            "energy_joules": rounds["total_joules"].sum(skipna=False),
        }
    joules = [value for key, value in run.items() if key.startswith("energy_joules.")]
    return {"energy_joules": sum(joules)} if joules else {}


def _runs_frame(runs: list[dict[str, Any]]) -> pd.DataFrame:
    if not runs:
        return pd.DataFrame(columns=["run_id", "seed", *SERIES, "partition.scheme", *_RUN_COLUMNS])
    frame = with_versions(_with_columns(pd.DataFrame(runs), _RUN_COLUMNS))
    frame["setting"] = ""
    for _, group in frame.groupby([*PANEL, "method"]):
        frame.loc[group.index, "setting"] = setting_texts(group, differing_keys(group))
    return frame


def _partition_label(run: dict[str, Any]) -> str:
    scheme = str(run["partition.scheme"])
    if scheme == "shards" and "partition.labels_per_client" in run:
        return f"shards, {run['partition.labels_per_client']} labels per client"
    if scheme in ("dirichlet", "quantity") and "partition.alpha" in run:
        return f"{scheme}, alpha {run['partition.alpha']:g}"
    return scheme  # every config has an alpha, but the other schemes do not use it


def _flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            flat[f"{prefix}{key}"] = json.dumps(value)  # hashable, so that pandas can compare it
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def _with_columns(frame: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    return frame.reindex(columns=[*dict.fromkeys([*frame, *names])])
