"""Configs (overrides, sweeps, run ids), the files of a record, and checkpoints that are damaged."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from analysis.records.settings import USUAL_SETTINGS
from bench.config.load import load_runs, parse_run, read_toml
from bench.config.schema import YOUNGER_KEYS, RunConfig, make_method
from bench.run.checkpoint import FILE, write_atomically
from bench.run.record import Recorder
from fedara_core.errors import InputError
from fedara_core.method import load_method, method_names
from support.launch import ROOT, TINY

# One other value for each key of a config but [system]; a new key needs a line here.
OTHER_VALUES = {
    "seed": "1",
    "federation.merge_path": "split",
    "method.name": "lora",
    "adapter.lora_rank": "3",
    "adapter.lora_alpha": "5.0",
    "adapter.dropout": "0.1",
    "adapter.fused": "false",
    "adapter.targets": "['query']",
    "model.name": "minilm",
    "model.attention": "eager",
    "model.packing": "false",
    "model.dropout_masks": "torch",
    "model.pooling": "model",
    "model.max_length": "17",
    "model.dropout": "0.2",
    "dataset.name": "docstrings",
    "dataset.text_column": "sentence",
    "dataset.label_column": "topic",
    "dataset.validation_fraction": "0.2",
    "partition.scheme": "iid",
    "partition.alpha": "0.6",
    "partition.labels_per_client": "3",
    "partition.min_examples": "2",
    "clients.dropout": "0.2",
    "clients.speed_spread": "0.5",
    "clients.over_selection": "1.6",
    "clients.deadline_seconds": "9.0",
    "federation.num_clients": "9",
    "federation.cohort": "4",
    "federation.num_rounds": "7",
    "federation.server_optimizer": "fedavgm",
    "federation.server_lr": "0.5",
    "federation.server_momentum": "0.8",
    "federation.server_beta2": "0.9",
    "federation.server_tau": "0.01",
    "codec.up": "int8",
    "codec.down": "bf16",
    "codec.error_feedback": "true",
    "train.optimizer": "sgd",
    "train.lr": "6e-3",
    "train.weight_decay": "0.1",
    "train.warmup_rounds": "1",
    "train.schedule": "linear",
    "train.round_schedule": "cosine",
    "train.proximal_mu": "0.01",
    "train.max_grad_norm": "2.0",
    "train.local_steps": "5",
    "train.batch_size": "9",
    "train.frozen_prefix": "cache",
    "train.precision": "bf16",
    "evaluate.every": "2",
    "evaluate.split": "validation",
    "evaluate.eval_examples": "50",
    "evaluate.batch_size": "32",
}
SHARES = "devices.shares={orin_nano=0.5, agx_orin=0.5}"
NEEDED = {  # what some keys only go with
    "codec.error_feedback": ("codec.up=int4",),
    "federation.server_optimizer": ("method.name=lora",),
    "federation.server_lr": ("method.name=lora",),
    "clients.over_selection": (SHARES,),
    "clients.deadline_seconds": (SHARES,),
}


def write(folder: Path, sweep: str = "", base: str | None = None) -> Path:
    path = folder / "config.toml"
    path.write_text((TINY.read_text() if base is None else base) + "\n" + sweep)
    return path


def only(path: Path, *overrides: str) -> RunConfig:
    (config,) = load_runs(path, list(overrides))
    return config


def leaves(table: dict[str, Any], prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for key, value in table.items():
        keys |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
    return keys


# ---- load_runs ----


def test_a_file_is_read_and_the_rest_is_default() -> None:
    config = only(TINY)
    assert (config.method.name, config.seed) == ("fedara", 0)
    assert (config.federation.cohort, config.train.lr) == (5, 5e-3)
    assert (config.train.optimizer, config.partition.min_examples) == ("adamw", 1)


def test_set_beats_the_file_and_the_last_set_wins() -> None:
    config = only(TINY, "train.lr=1e-4", "federation.cohort=3", "federation.cohort = 2")
    assert config.train.lr == 1e-4
    assert config.federation.cohort == 2
    assert config.federation.num_clients == 8  # its neighbours stay


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("adapter.targets=['query', 'key']", ["query", "key"]),
        ("adapter.targets='query'", "query"),
        ("adapter.targets=query", "query"),  # a bare word is a string
    ],
)
def test_set_values_are_toml(text: str, value: Any) -> None:
    assert only(TINY, text).adapter.targets == value


def test_set_reaches_method_hyperparameters() -> None:
    config = only(TINY, "method.final_budget=0.5", "method.module_pruning=false")
    assert config.method.hyperparameters == {"final_budget": 0.5, "module_pruning": False}
    assert config.run_id != only(TINY).run_id


def test_sweep_is_points_times_grid_in_the_order_written(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '[sweep]\n"train.lr" = [1e-3, 2e-3]\nseed = [7, 8]\n'
        'points = [{ method.name = "lora" }, { federation.cohort = 2 }]\n',
    )
    found = [(c.method.name, c.federation.cohort, c.train.lr, c.seed) for c in load_runs(path, [])]
    lrs_and_seeds = [(1e-3, 7), (1e-3, 8), (2e-3, 7), (2e-3, 8)]
    assert found == [
        (name, cohort, *pair)
        for name, cohort in (("lora", 5), ("fedara", 2))
        for pair in lrs_and_seeds
    ]


def test_equal_points_are_run_once(tmp_path: Path) -> None:
    path = write(tmp_path, "[sweep]\nseed = [3, 4, 3]\npoints = [{}, { seed = 4 }, {}]\n")
    assert [config.seed for config in load_runs(path, [])] == [3, 4]
    path = write(tmp_path, "[sweep]\npoints = [{}, { method.final_budget = 0.25 }]\n")
    assert len(load_runs(path, [])) == 1  # the second writes its default out


def test_set_fixes_a_swept_key(tmp_path: Path) -> None:
    path = write(tmp_path, '[sweep]\nseed = [1, 2]\n"train.lr" = [1e-3, 2e-3]\n')
    configs = load_runs(path, ["train.lr=9e-3"])
    assert [(config.seed, config.train.lr) for config in configs] == [(1, 9e-3), (2, 9e-3)]


def test_set_fixes_a_key_of_the_points(tmp_path: Path) -> None:
    path = write(tmp_path, "[sweep]\npoints = [{ seed = 1 }, { seed = 2 }]\n")
    assert [config.seed for config in load_runs(path, ["seed=5"])] == [5]


def test_set_picks_the_points_that_agree(tmp_path: Path) -> None:
    points = (
        '[{ method.name = "lora", train.lr = 1e-3 }, { method.name = "slora", train.lr = 2e-3 }]'
    )
    path = write(tmp_path, f"[sweep]\npoints = {points}\n")
    configs = load_runs(path, ["method.name=slora"])
    assert [(config.method.name, config.train.lr) for config in configs] == [("slora", 2e-3)]


def test_set_of_one_length_replaces_the_other() -> None:
    train = only(TINY, "train.local_epochs=2").train
    assert (train.local_epochs, train.local_steps) == (2, None)


def test_clipping_can_be_left_out() -> None:
    assert only(TINY, "train.max_grad_norm=none").train.max_grad_norm is None


def test_a_default_or_whole_number_written_out_is_the_same_run() -> None:
    same = ["method.final_budget=0.25", "method.e_lr_factor=1"]
    assert only(TINY, *same).run_id == only(TINY).run_id


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ("[sweep]\nseed = 3", ["sweep.seed", "3", "list"]),
        ('[sweep]\n"system.threads" = [1, 2]', ["differ only in system.threads", "--results"]),
        ("[sweep]\nseed = []", ["sweep.seed", "[]", "list"]),
        ("[sweep]\nmethod.name = ['lora']", ["sweep.method", "list"]),  # the key needs quotes
        ("[sweep]\nsede = [1]", ["unknown key sede", "seed"]),
        ("[sweep]\npoints = 3", ["sweep.points", "3"]),
        ("[sweep]\npoints = [3]", ["sweep.points", "3"]),
        ("[sweep]\npoints = []", ["sweep.points", "[]"]),
    ],
)
def test_a_wrong_sweep_is_refused(sweep: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_runs(write(tmp_path, sweep), [])
    assert all(word in str(caught.value) for word in words), caught.value


# ---- run_id ----


def test_the_same_config_has_the_same_id() -> None:
    config = only(TINY)
    assert only(TINY).run_id == config.run_id
    assert parse_run(config.model_dump()).run_id == config.run_id
    assert RunConfig.model_validate_json(config.model_dump_json()).run_id == config.run_id
    # A default that is written down, and an integer for a float, say the same.
    assert only(TINY, "train.weight_decay=0.0", "adapter.lora_alpha=4").run_id == config.run_id
    assert config.run_id.startswith("toy-fedara-seed0-")


def test_where_a_folder_lies_does_not_change_the_id() -> None:
    here, there = only(TINY, "dataset.name=file:a/set"), only(TINY, "dataset.name=file:/b/set/")
    assert here.run_id == there.run_id
    assert here.run_id.startswith("set-")
    assert here.run_id != only(TINY, "dataset.name=file:a/other").run_id


@pytest.mark.parametrize(
    "text",
    [
        *("system.threads=2", "system.device=auto"),
        *("energy.enabled=true", "energy.country_iso_code=DEU", "energy.idle_seconds=9"),
        *("devices.names=['agx_orin']", "devices.shares={agx_orin=1.0}", "devices.file=a/b.toml"),
    ],
)
def test_what_changes_no_result_does_not_change_the_id(text: str) -> None:
    config = only(TINY, text)
    assert config != only(TINY)
    assert config.run_id == only(TINY).run_id


def test_where_a_file_of_devices_lies_is_not_recorded() -> None:
    assert only(TINY, "devices.file=/a/b.toml").canonical()["devices"]["file"] == "b.toml"


def test_there_is_another_value_for_every_key() -> None:
    keys = leaves(only(TINY).model_dump(exclude={"system", "energy", "devices"}))
    # These two have a test of their own, below and with the methods that use client_lora_ranks.
    assert keys - {"train.local_epochs", "adapter.client_lora_ranks"} == set(OTHER_VALUES)


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_any_other_key_changes_the_id(key: str) -> None:
    same = NEEDED.get(key, ())
    config = only(TINY, *same, f"{key}={OTHER_VALUES[key]}")
    assert config.config_hash != only(TINY, *same).config_hash
    assert config.run_id != only(TINY, *same).run_id


def test_younger_keys_at_their_defaults_are_no_part_of_the_id() -> None:
    """Clients that do not fail, no dropout of adapters, ...: the ids of older records stay."""
    config = only(TINY)
    settings = {k: v for k, v in config.canonical().items() if k != "clients"}
    for section, keys in YOUNGER_KEYS.items():
        for key in keys:
            del settings[section][key]
    for key in make_method(config.method).younger:
        del settings["method"][key]
    for section in ("system", "energy", "devices"):
        del settings[section]
    text = json.dumps(settings, sort_keys=True)
    assert config.config_hash == hashlib.sha256(text.encode()).hexdigest()
    assert only(TINY, "clients.dropout=0", "clients.deadline_seconds=none").run_id == config.run_id


def test_published_records_keep_their_ids() -> None:
    """Of a method without hyperparameters, whose defaults could change."""
    paths = sorted((ROOT / "results/published/campaign").rglob("*-lora-seed*/run.json"))
    assert paths
    for path in paths:
        record = json.loads(path.read_text(encoding="utf-8"))
        assert parse_run(record["config"]).config_hash == record["config_hash"], path


def test_reports_know_the_usual_values_of_younger_keys() -> None:
    """Else an old record and a new one at the defaults would look like two settings."""
    config = only(TINY, "model.attention='sdpa'").canonical()  # what ran before there was "auto"
    for section, keys in YOUNGER_KEYS.items():
        for key in keys:
            assert USUAL_SETTINGS[f"{section}.{key}"] == config[section][key]
    for name in method_names():
        method = load_method(name)
        for key in method.younger:
            assert USUAL_SETTINGS[f"method.{key}"] == getattr(method(), key)


@pytest.mark.parametrize(
    "devices",
    [
        ["devices.shares={orin_nano=0.4, agx_orin=0.6}"],
        ["devices.shares={agx_orin=0.5, orin_nano=0.5}"],  # the other half of the clients has which
        [SHARES, "devices.file=a/b.toml"],
    ],
)
def test_devices_that_decide_who_is_late_change_the_id(devices: list[str]) -> None:
    for clients, same in (("clients.deadline_seconds=9.0", False), ("clients.dropout=0.1", True)):
        found = only(TINY, clients, *devices).run_id
        assert (found == only(TINY, clients, SHARES).run_id) == same


def test_over_selection_rounds_up_the_number_as_written() -> None:
    common = ("federation.num_clients=20", "federation.cohort=10", SHARES)
    for factor, drawn in (("1.0", 10), ("1.1", 11), ("1.11", 12), ("2", 20)):
        assert only(TINY, *common, f"clients.over_selection={factor}").num_drawn == drawn


def test_local_epochs_changes_the_id(tmp_path: Path) -> None:
    base = TINY.read_text().replace("local_steps = 4", "local_epochs = 4")
    assert only(write(tmp_path, base=base)).run_id != only(TINY).run_id


def run_of(dataset: str) -> RunConfig:
    return only(TINY, f"dataset.name={dataset}")


@pytest.mark.parametrize("name", [240 * "d", 250 * "x", 85 * "\u6c34", 70 * "\U0001f600"])
def test_a_long_data_name_makes_a_run_id_that_is_a_file_name(name: str, tmp_path: Path) -> None:
    run_id = run_of(f"file:/data/{name}").run_id
    assert len(run_id.encode()) < 255
    assert run_id.startswith(name[:10])
    (tmp_path / run_id).mkdir()
    other = run_of(f"file:/data/{name[:-1]}y").run_id
    assert other.rpartition("-fedara-")[0] != run_id.rpartition("-fedara-")[0]


def test_a_name_that_just_fits_stays_whole() -> None:
    rest = len("-fedara-seed0-0123456789")
    name = (255 - rest) * "d"
    assert run_of(f"file:/data/{name}").run_id.startswith(name + "-fedara-seed0-")
    assert not run_of(f"file:/data/{name}d").run_id.startswith(name)


@pytest.mark.parametrize("bad", ["", "a\nb", "a\0b", "file:\udcff"])
@pytest.mark.parametrize("section", ["dataset", "model"])
def test_a_name_that_names_nothing_is_refused(section: str, bad: str) -> None:
    table = only(TINY).model_dump()
    table[section]["name"] = bad
    with pytest.raises(InputError, match=rf"^{section}.name = .* is not allowed") as caught:
        parse_run(table)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_before_a_config_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(TINY.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert only(path).run_id == only(TINY).run_id


def test_a_byte_order_mark_before_a_device_file_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    path.write_text("seed = 1", encoding="utf-8-sig")
    assert read_toml(path, "devices") == {"seed": 1}


# ---- the record ----


def row(round_index: int) -> dict[str, Any]:
    return {"round_index": round_index, "seconds": {"total": 0.5}}


def test_recorder_drops_a_torn_last_line(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, only(TINY))
    assert recorder.rounds() == []
    recorder.start({"config": {}, "schema_version": 1}, [], [])
    recorder.add_round(row(0))
    recorder.add_round(row(1))
    path = recorder.run_dir / "rounds.jsonl"
    whole = path.read_bytes()
    line = (json.dumps(row(2)) + "\n").encode()
    for cut in range(1, len(line)):  # a line without its newline is torn, too
        path.write_bytes(whole + line[:cut])
        assert recorder.rounds() == [row(0), row(1)], cut
    path.write_bytes(whole + line)
    assert recorder.rounds() == [row(0), row(1), row(2)]


def test_start_keeps_the_given_rounds_only(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, only(TINY))
    recorder.start({"config": {}}, [], [])
    for round_index in range(3):
        recorder.add_round(row(round_index))
    recorder.start({"config": {}}, [], recorder.rounds()[:1])
    recorder.add_round(row(1))
    assert recorder.rounds() == [row(0), row(1)]


def test_done_is_written_by_finish_and_the_last_state_stays(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, only(TINY))
    recorder.start({"config": {}, "schema_version": 1}, [], [])
    recorder.add_round(row(0))
    recorder.add_round(row(1))
    write_atomically(recorder.run_dir / FILE, b"state")
    assert not recorder.done
    recorder.finish()
    assert recorder.done
    assert {path.name for path in recorder.run_dir.iterdir()} == {
        *("run.json", "partition.json", "rounds.jsonl", "checkpoint.safetensors", "DONE")
    }
    facts = json.loads((recorder.run_dir / "run.json").read_text())
    assert (facts["schema_version"], facts["total_seconds"]) == (1, 1.0)


@pytest.mark.parametrize(
    "value", [3000 * "[", 5000 * "9", f"[{5000 * '9'}]"], ids=["brackets", "digits", "list"]
)
def test_what_python_can_not_read_is_no_toml(value: str, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f"seed = {value}\n")
    with pytest.raises(InputError, match=f"config {config} is not valid TOML"):
        load_runs(config, [])
    with pytest.raises(InputError, match=r"--set seed: .*allowed: a value of TOML"):
        load_runs(TINY, [f"seed={value}"])


@pytest.mark.parametrize("override", ["train.lr=0x" + 5000 * "f", "train.lr" + 3000 * ".a" + "=1"])
def test_what_python_can_not_write_is_refused(override: str) -> None:
    with pytest.raises(InputError, match="too large to show is not allowed"):
        load_runs(TINY, [override])
