"""Read a campaign's records (run.json, rounds.jsonl, DONE) into two tidy data frames."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

SCHEMA_VERSION = 1

# What one panel of a figure, or one block of a table, shares; and what one line or row shares.
PANEL = ["dataset", "partition"]
SERIES = [*PANEL, "method", "setting"]

_REQUIRED_IN_RUN = [
    "run_id",
    "seed",
    "method.name",
    "dataset.name",
    "partition.scheme",
    "federation.num_rounds",
]
_REQUIRED_IN_ROUND = ["round_index", "uplink_bytes", "downlink_bytes"]

# Settings that older records lack, since they ran at these values, as most runs do.
USUAL_SETTINGS = {
    "clients.dropout": 0.0,
    "clients.over_selection": 1.0,
    "clients.speed_spread": 0.0,
}

# Columns that figures and tables name; one that no run measured is there, and empty.
_RUN_COLUMNS = ["total_seconds", "partition.alpha", "energy_source", "energy_joules"]
_ROUND_COLUMNS = ["accuracy", "macro_f1", "live_triplets", "local_train_seconds", "flops"]

_THEN = " then "  # joins what a run that was interrupted has in two ways

_ADAPTER_COLUMNS = ["run_id", "round_index", "adapter", "live_triplets"]
_CLIENT_COLUMNS = ["run_id", "client_id", "label", "num_examples"]

# Nested keys of a round become columns that carry their unit.
_UNITS = {
    "seconds": "seconds",
    "energy_joules": "joules",
    "energy_net_joules": "net_joules",
    "peak_memory_bytes_by_phase": "peak_memory_bytes",
    "peak_device_memory_bytes_by_phase": "peak_device_memory_bytes",
}

# What is summed up over a run's rounds, and the name that the sum has.
_CUMULATIVE = {
    "uplink_bytes": "cumulative_uplink_bytes",
    "downlink_bytes": "cumulative_downlink_bytes",
    "total_seconds": "cumulative_seconds",
    "total_joules": "cumulative_joules",
    "local_train_seconds": "cumulative_local_train_seconds",
    "local_train_joules": "cumulative_local_train_joules",
    "flops": "cumulative_flops",
}
_MODELLED = ("modelled_seconds.", "modelled_joules.")


class AnalysisError(ValueError):
    """The records can not be read or compared as they are; the message is one line for the user."""


class NotDrawn(ValueError):
    """The records do not hold what one figure or table needs; the message says what."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Campaign:
    """The records below one folder.

    runs: one row per finished run. Keys of run.json keep their names, nested ones are joined by a
        dot, and those of the config lose "config.": "train.lr", "federation.cohort", "comm". Added:
        method, dataset, partition (labels), device (cpu, cuda), world_size as "2 then 4" where a
        run went on with another number of processes, setting (what tells runs of one method apart
        within a panel, seeds aside; "" when nothing does), and energy_joules of the whole run with
        its energy_source: of the rounds' counters where every round has them, else of run.json.
        Compare energy only after `one_energy_source`.
    rounds: one row per (run_id, round_index) of the finished runs. Scalar keys keep their names;
        seconds.X is X_seconds, energy_joules.X is X_joules, energy_net_joules.X is X_net_joules,
        peak_memory_bytes_by_phase.X is X_peak_memory_bytes, of a GPU X_peak_device_memory_bytes,
        and modelled_by_device.D.modelled_X is modelled_X.D. Added, each up to and including this
        round, and missing from the first round on that does not hold it: cumulative_uplink_bytes,
        cumulative_downlink_bytes, cumulative_total_bytes (up and down), cumulative_seconds and
        cumulative_joules (of whole rounds), cumulative_local_train_seconds and
        cumulative_local_train_joules, cumulative_flops, cumulative_modelled_seconds.D and
        cumulative_modelled_joules.D.
    adapters: live_triplets by run_id, round_index and adapter; empty where no run recorded it.
    clients: num_examples by run_id, client_id and label, of partition.json; empty without one.
    incomplete: folder names of the runs without DONE; they never enter a figure.
    """

    runs: pd.DataFrame
    rounds: pd.DataFrame
    adapters: pd.DataFrame
    clients: pd.DataFrame
    incomplete: list[str]


def load_campaign(path: Path) -> Campaign:
    """Read all records below `path`, any number of levels down.

    Raises AnalysisError when there is none, when a run id comes twice, or when the record of a
    finished run is corrupt or has lost rounds.
    """
    folders = _record_folders(Path(path))
    runs: dict[str, dict[str, Any]] = {}
    rounds: list[pd.DataFrame] = []
    adapters: list[dict[str, Any]] = []
    clients: list[dict[str, Any]] = []
    found_in: dict[str, Path] = {}
    incomplete = []
    for folder in folders:
        if not (folder / "DONE").exists():
            incomplete.append(folder.name)
            continue
        run = _read_run(folder / "run.json")
        run_id = run["run_id"]
        if run_id in runs:
            raise AnalysisError(f"run {run_id} comes twice: {found_in[run_id]} and {folder}")
        runs[run_id], found_in[run_id] = run, folder
        frame, by_adapter = _read_rounds(folder / "rounds.jsonl", run)
        run |= _energy(run, frame)
        rounds.append(frame)
        adapters += by_adapter
        clients += _read_clients(folder / "partition.json", run_id)
    return Campaign(
        runs=_runs_frame(list(runs.values())),
        rounds=_with_columns(pd.concat(rounds, ignore_index=True), _ROUND_COLUMNS)
        if rounds
        else pd.DataFrame(columns=["run_id", *_REQUIRED_IN_ROUND, *_ROUND_COLUMNS]),
        adapters=pd.DataFrame(adapters, columns=_ADAPTER_COLUMNS),
        clients=pd.DataFrame(clients, columns=_CLIENT_COLUMNS),
        incomplete=incomplete,
    )


def one_energy_source(campaign: Campaign) -> str | None:
    """The source of all the energy in these records; None where no run has any.

    Raises AnalysisError where runs, or parts of one run, differ in it: counted and modelled joules,
    or joules of different counters, are never compared, averaged or put into one column.
    """
    found = campaign.runs.dropna(subset=["energy_source"]).groupby("energy_source")["run_id"]
    examples = [f"{source} ({run_ids.iloc[0]})" for source, run_ids in found]
    if len(examples) > 1 or any(_THEN in example for example in examples):
        raise AnalysisError(
            f"energy of different sources is not compared: {' and '.join(examples)}; "
            "analyse the runs of each source by themselves"
        )
    return str(next(iter(found))[0]) if examples else None


def known_energy(campaign: Campaign) -> tuple[str | None, str]:
    """`one_energy_source`, and "" or, instead of a source, why no energy can be shown."""
    try:
        source = one_energy_source(campaign)
    except AnalysisError as error:
        return None, str(error)
    return source, "" if source else "not measured in these runs"


def energy_kind(source: str) -> str:
    """Whether joules of this source are counted, modelled or partly modelled."""
    modelled = [part.endswith("-model") for part in source.split("+")]
    if not any(modelled):
        return "counted"
    return "modelled" if all(modelled) else "partly modelled"


def panels(campaign: Campaign) -> list[tuple[str, str]]:
    """(dataset, partition) pairs in the order to show them: by data set, scheme, then alpha."""
    order = campaign.runs.sort_values(["dataset", "partition.scheme", "partition.alpha"])
    return list(order[PANEL].drop_duplicates().itertuples(index=False, name=None))


def is_panel(frame: pd.DataFrame, panel: tuple[str, str]) -> pd.Series:
    """Which rows are of this data set and partition."""
    return (frame["dataset"] == panel[0]) & (frame["partition"] == panel[1])


def by_series(frame: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(method, setting, its rows), of rows of one panel."""
    for (method, setting), group in frame.groupby(["method", "setting"]):
        yield str(method), str(setting), group


def series_name(method: str, setting: str) -> str:
    """What a row or line of one method and setting is called, in one line."""
    return f"{method} ({setting})" if setting else method


def modelled_devices(campaign: Campaign) -> list[str]:
    """Names of the devices that rounds are modelled on, in the order of the records."""
    first = _MODELLED[0]
    names = map(str, campaign.rounds)
    return [name.removeprefix(first) for name in names if name.startswith(first)]


def has_rounds(path: Path) -> bool:
    """Whether there is a run's record below `path`, finished or not."""
    return bool(_run_folders(path))


def _run_folders(path: Path) -> list[Path]:
    names = ("run.json", "rounds.jsonl")
    found = {file.parent for name in names for file in path.rglob(name)}
    # A folder with rows.jsonl is a micro-benchmark's, which has no rounds.
    return sorted(folder for folder in found if not (folder / "rows.jsonl").exists())


def _record_folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise AnalysisError(f"{path}: no such folder")
    folders = _run_folders(path)
    if not folders:
        raise AnalysisError(f"{path}: no records here (looked for */run.json at any depth)")
    return folders


def _read_run(file: Path) -> dict[str, Any]:
    record = parse_json(read_text(file), file, first_line=1)
    run = _flatten(record)
    version = run.get("schema_version")
    if version != SCHEMA_VERSION:
        raise AnalysisError(f"{file}: schema_version {version}, this code reads {SCHEMA_VERSION}")
    run = {key.removeprefix("config."): value for key, value in run.items()}
    missing = [key for key in _REQUIRED_IN_RUN if key not in run]
    if missing:
        raise AnalysisError(f"{file}: missing {', '.join(missing)}")
    run["method"] = run["method.name"]
    run["dataset"] = run["dataset.name"].removeprefix("file:").rstrip("/").split("/")[-1]
    run["partition"] = _partition_label(run)
    sizes = dict.fromkeys(part.get("world_size") for part in (record, *record.get("parts", [])))
    if len(sizes) > 1:
        run["world_size"] = _THEN.join(map(str, sizes))
    devices = {process.get("device", "").split(":")[0] for process in record.get("processes", [])}
    run["device"] = " and ".join(sorted(devices - {""})) or None
    return run


def _read_rounds(file: Path, run: dict[str, Any]) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """One row per round, and one per round and adapter."""
    rows, by_adapter = [], []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        record = parse_json(line, file, first_line=number)
        missing = [key for key in _REQUIRED_IN_ROUND if key not in record]
        if missing:
            raise AnalysisError(f"{file}:{number}: missing {', '.join(missing)}")
        rows.append({"run_id": run["run_id"], **_round_columns(record)})
        place = {"run_id": run["run_id"], "round_index": record["round_index"]}
        by_adapter += [
            {**place, "adapter": name, "live_triplets": live}
            for name, live in record.get("live_triplets_by_adapter", {}).items()
        ]
    # Cumulative bytes are wrong when a round is lost or written twice, so neither may pass.
    if [row["round_index"] for row in rows] != list(range(run["federation.num_rounds"])):
        raise AnalysisError(
            f"{file}: a finished run must hold rounds 0 to {run['federation.num_rounds'] - 1}, "
            f"each once and in order"
        )
    frame = pd.DataFrame(rows)
    summed = {name: to for name, to in _CUMULATIVE.items() if name in frame}
    modelled = [name for name in map(str, frame) if name.startswith(_MODELLED)]
    summed |= {name: f"cumulative_{name}" for name in modelled}
    # A sum that passed over a round without the number would look like a small one.
    sums = {to: frame[name].cumsum(skipna=False) for name, to in summed.items()}
    both = sums["cumulative_uplink_bytes"] + sums["cumulative_downlink_bytes"]
    return frame.assign(**sums, cumulative_total_bytes=both), by_adapter


def _read_clients(file: Path, run_id: str) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    try:
        entries = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise AnalysisError(f"{file}:{error.lineno}: not valid JSON: {error.msg}") from None
    return [
        {"run_id": run_id, "client_id": entry["client_id"], "label": label, "num_examples": number}
        for entry in entries
        for label, number in entry.get("label_counts", {}).items()
    ]


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


def _energy(run: dict[str, Any], rounds: pd.DataFrame) -> dict[str, Any]:
    """energy_source and energy_joules of a whole run; nothing where they are not known."""
    counted = rounds.get("energy_source", pd.Series([None]))
    if counted.notna().all():
        sources = _THEN.join(counted.unique())  # a source was lost, or another part had another
        return {"energy_source": sources, "energy_joules": rounds["total_joules"].sum()}
    parts = [value for key, value in run.items() if key.startswith("energy_joules.")]
    return {"energy_joules": sum(parts)} if parts else {}


def _runs_frame(runs: list[dict[str, Any]]) -> pd.DataFrame:
    if not runs:
        return pd.DataFrame(columns=["run_id", "seed", *SERIES, "partition.scheme", *_RUN_COLUMNS])
    frame = _with_columns(pd.DataFrame(runs), _RUN_COLUMNS)
    frame["setting"] = ""
    for _, group in frame.groupby([*PANEL, "method"]):
        frame.loc[group.index, "setting"] = setting_texts(group, differing_keys(group))
    return frame


def differing_keys(group: pd.DataFrame) -> list[str]:
    """Keys of the config, seeds aside, that change results and in which these runs differ."""
    # [system] and evaluate.batch_size do not change results; dotted columns of other sections of
    # run.json (package versions, hosts) are no settings.
    sections = (
        *("method", "adapter", "model", "dataset", "partition", "federation", "train"),
        *("codec", "clients"),
    )
    for key, usual in USUAL_SETTINGS.items():
        group = group.assign(**{key: group[key].fillna(usual) if key in group else usual})
    names = list(map(str, group))
    keys = [name for name in names if name.split(".")[0] in sections and "." in name]
    keys += ["evaluate.every", "evaluate.split", "evaluate.eval_examples"]
    if "clients.deadline_seconds" in group or (group["clients.over_selection"] > 1).any():
        # Devices decide who is late.
        keys += [name for name in names if name.startswith("devices.shares.")]
    return [key for key in keys if key in group and group[key].nunique(dropna=False) > 1]


def setting_texts(group: pd.DataFrame, keys: list[str]) -> pd.Series:
    """What tells each of these runs apart, such as "lr=0.01".

    Without it, runs at different settings would be averaged as if they were seeds.
    """
    texts = [
        ", ".join(f"{key.split('.')[-1]}={setting_text(row.get(key), key)}" for key in keys)
        for _, row in group.iterrows()
    ]
    return pd.Series(texts, index=group.index, dtype=object)


def _partition_label(run: dict[str, Any]) -> str:
    scheme = str(run["partition.scheme"])
    if scheme == "shards" and "partition.labels_per_client" in run:
        return f"shards, {run['partition.labels_per_client']} labels per client"
    if scheme in ("dirichlet", "quantity") and "partition.alpha" in run:
        return f"{scheme}, alpha {run['partition.alpha']:g}"
    return scheme  # the config writes alpha for every scheme, also where it plays no part


def _flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            flat[f"{prefix}{key}"] = json.dumps(value)  # hashable, so that values can be compared
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def _with_columns(frame: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    absent = [name for name in names if name not in frame]
    return frame.assign(**dict.fromkeys(absent, float("nan")))


def setting_text(value: Any, key: str) -> str:
    """A value of the config as a reader writes it; records from before the key meant the usual."""
    value = USUAL_SETTINGS.get(key) if pd.isna(value) else value
    if value is None:
        return "unset"
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_text(file: Path) -> str:
    """A record's file. Raises AnalysisError."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AnalysisError(f"{file}: cannot be read: {error}") from None


def parse_json(text: str, file: Path, *, first_line: int) -> dict[str, Any]:
    """A JSON object that starts in this line of `file`. Raises AnalysisError."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise AnalysisError(f"{file}:{line}: not valid JSON: {error.msg}") from None
    if not isinstance(value, dict):
        raise AnalysisError(f"{file}:{first_line}: a JSON object was expected")
    return value
