"""Wrong input: exit code 2 and one line that names the value and what is allowed; nobody hangs."""

import json
from pathlib import Path

import numpy as np
import pytest

from fedara_core.method import method_names
from support.launch import CLI, TINY, fedara_here, launch
from support.refused import check_refused, refuse_here, sets, write_data

pytestmark = pytest.mark.xdist_group("jobs")

METHODS = ", ".join(method_names())

# What is wrong -> the overrides, and what the line must say.
SETTINGS: dict[str, tuple[list[str], list[str]]] = {
    "unknown key": (["turbo=1"], ["unknown key turbo", "allowed here: seed, method"]),
    "unknown section key": (["train.speed=1"], ["unknown key train.speed", "optimizer, lr"]),
    "unknown method": (["method.name=nosuch"], ["'nosuch'", METHODS]),
    "unknown hyperparameter": (["method.density=0.1"], ["method.density", "vote_threshold"]),
    "hyperparameter where there is none": (
        ["method.name=head_only", "method.density=0.1"],
        ["method.density", "no hyperparameters"],
    ),
    "wrong hyperparameter type": (
        ["method.final_budget=half"],
        ["method.final_budget", "'half'", "valid number"],
    ),
    "hyperparameter out of range": (["method.final_budget=2.5"], ["2.5", "[0, 1]"]),
    "hyperparameter not a choice": (["method.importance=fame"], ["'fame'", "'sensitivity'"]),
    "a method that is no table": (["method=fedara"], ["method = 'fedara'", "dictionary"]),
    "unknown data set": (["dataset.name=nobody/nothing"], ["'nobody/nothing'", "docstrings, toy"]),
    "no data set": (["dataset.name="], ["dataset.name = ''", "at least 1 character"]),
    "a data set of two lines": (['dataset.name="a\\nb"'], ["dataset.name = 'a\\nb'", "pattern"]),
    "no model": (["model.name="], ["model.name = ''", "at least 1 character"]),
    "unknown model": (["model.name=nobody/nothing"], ["'nobody/nothing'", "minilm, tiny"]),
    "target that matches nothing": (["adapter.targets=['nosuch']"], ["'nosuch'", "all-linear"]),
    "no target at all": (["adapter.targets=[]"], ["targets = []", "allowed: all-linear"]),
    "a batch that no memory holds": (["train.batch_size=100000000000000000000"], ["1048576"]),
    "more threads than there can be": (["system.threads=10000000000"], ["allowed: auto, or 1 to"]),
    "an alpha that overflows": (["partition.alpha=1e308"], ["partition.alpha = 1e+308", "1000000"]),
    "a number that is a word": (["train.lr=fast"], ["train.lr", "'fast'", "valid number"]),
    "a fraction for a count": (["federation.cohort=2.5"], ["federation.cohort", "2.5", "integer"]),
    "not a choice": (["partition.scheme=even"], ["'even'", "'iid', 'dirichlet'"]),
    "too small": (["train.lr=0"], ["train.lr = 0", "greater than 0"]),
    "too large": (["dataset.validation_fraction=1.0"], ["1.0", "less than 1"]),
    "no finite number": (["train.lr=nan"], ["train.lr = nan", "finite"]),
    "no threads": (["system.threads=0"], ["threads = 0", "allowed: auto"]),
    "a country by its name": (
        ["energy.country_iso_code=Germany"],
        ["energy.country_iso_code = 'Germany'", "[A-Z]{3}"],
    ),
    "unknown device": (["devices.names=['toaster']"], ["'toaster'", "allowed: agx_orin"]),
    "shares of devices that are no whole": (
        ["devices.shares={agx_orin=0.5}"],
        ["add up to 0.5", "allowed: 1"],
    ),
    "no file of devices": (["devices.file=nowhere.toml"], ["devices nowhere.toml", "allowed"]),
    "empty client": (["partition.min_examples=1000"], ["1000", "allowed: at least 8000"]),
    "more clients than examples": (
        ["federation.num_clients=1000"],
        ["1000 clients", "allowed: at least 1000"],
    ),
    "more labels than there are": (
        ["partition.scheme=shards", "partition.labels_per_client=5"],
        ["labels_per_client = 5", "allowed: 1 to 4"],
    ),
    "cohort above num_clients": (["federation.cohort=9"], ["cohort = 9", "allowed: 1 to 8"]),
    "clients that always vanish": (["clients.dropout=1.0"], ["clients.dropout = 1.0", "than 1"]),
    "a negative dropout": (["clients.dropout=-0.1"], ["clients.dropout = -0.1", "or equal to 0"]),
    "no time for a round": (["clients.deadline_seconds=0"], ["deadline_seconds = 0", "than 0"]),
    "a deadline without devices": (
        ["clients.deadline_seconds=1.0"],
        ["clients.deadline_seconds", "devices.shares is empty; allowed: the clients' devices"],
    ),
    "under-selection": (["clients.over_selection=0.5"], ["over_selection = 0.5", "equal to 1"]),
    "more drawn than there are": (
        ["clients.over_selection=2.0"],
        ["clients.over_selection = 2 draws 10", "num_clients = 8; allowed: 1 to 1.6"],
    ),
    "speeds that spread too far": (["clients.speed_spread=4.0"], ["speed_spread = 4.0", "to 3"]),
    "lora_rank above a layer": (["adapter.lora_rank=33"], ["lora_rank = 33", "allowed: 1 to 32"]),
    "client_lora_ranks for a method without a use for them": (
        ["adapter.client_lora_ranks=[{lora_rank=2, share=1.0}]"],
        ["adapter.client_lora_ranks", "'fedara'", "same lora_rank at every client"],
    ),
    "a client's lora_rank above all": (
        ["adapter.client_lora_ranks=[{lora_rank=9, share=1.0}]"],
        ["client_lora_ranks: 9", "lora_rank = 4", "allowed: 1 to 4"],
    ),
    "shares that are no whole": (
        ["adapter.client_lora_ranks=[{lora_rank=2, share=0.5}]"],
        ["client_lora_ranks", "add up to 0.5", "allowed: 1"],
    ),
    "a sum on the way for a method that needs factors": (
        ["method.name=flora", "federation.merge_path=split"],
        ["federation.merge_path = 'split'", "'flora' needs every client's factors", "allgather"],
    ),
    "hyperparameter not finite": (["method.init_std=inf"], ["method.init_std", "finite"]),
    "no validation part": (
        ["evaluate.split=validation", "dataset.validation_fraction=0"],
        ["evaluate.split = 'validation'", "validation_fraction above 0"],
    ),
    "set without equals": (["train.lr"], ["--set 'train.lr'", "section.key=value"]),
    "set without a key": (["=3"], ["--set '=3'", "section.key=value"]),
    "set below a value": (["train.lr.max=3"], ["train.lr", "{'max': 3}", "valid number"]),
}

# A setting that is not refused before the data or the model is met, or by one process only.
UNDER_MPI = {
    "unknown method": SETTINGS["unknown method"],
    "empty client": SETTINGS["empty client"],
    "target that matches nothing": SETTINGS["target that matches nothing"],
}
DIVERGING = ["train.optimizer=sgd", "train.lr=1e30"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where another test module imported the hub's client first."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("what", SETTINGS)
def test_a_wrong_setting_is_refused(what: str, tmp_path: Path) -> None:
    overrides, words = SETTINGS[what]
    refuse_here(TINY, tmp_path / "results", words, *sets(overrides))
    assert not list(tmp_path.glob("results/*")), "a refused run leaves no record"


@pytest.mark.parametrize("what", UNDER_MPI)
@pytest.mark.slow
def test_a_wrong_setting_is_refused_under_mpiexec(what: str, tmp_path: Path) -> None:
    overrides, words = UNDER_MPI[what]
    check_refused(launch("mpi", 3, *CLI, TINY, "--results", tmp_path, *sets(overrides)), words)


@pytest.mark.slow
def test_a_missing_config_is_refused_under_mpiexec(tmp_path: Path) -> None:
    config = tmp_path / "absent.toml"
    job = launch("mpi", 3, *CLI, config, "--results", tmp_path / "results")
    check_refused(job, [str(config), "No such file"])


# ---- the config file ----


def test_a_missing_config_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "absent.toml"
    refuse_here(config, tmp_path / "results", [str(config), "No such file"])


def test_a_folder_for_a_config_is_refused(tmp_path: Path) -> None:
    refuse_here(tmp_path, tmp_path / "results", [str(tmp_path), "directory"])


@pytest.mark.parametrize(
    "content", [b"seed = \n", b"seed = 1\nseed = 2\n", b"\xff\xfe", b"[train\nlr = 1"]
)
def test_invalid_toml_is_refused(content: bytes, tmp_path: Path) -> None:
    config = tmp_path / "bad.toml"
    config.write_bytes(content)
    refuse_here(config, tmp_path / "results", [str(config), "not valid TOML"])


@pytest.mark.parametrize("lengths", ["", "local_steps = 4\nlocal_epochs = 1"])
def test_neither_or_both_lengths_are_refused(lengths: str, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(TINY.read_text().replace("local_steps = 4", lengths))
    refuse_here(config, tmp_path / "results", ["exactly one of local_steps and local_epochs"])


@pytest.mark.parametrize(
    ("content", "key"), [("seed = 1", "method"), ("method.name='lora'", "train")]
)
def test_a_missing_section_is_refused(content: str, key: str, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(content)
    refuse_here(config, tmp_path / "results", [f"{key} is missing"])


# ---- the data ----


def test_good_data_is_not_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    args = sets([write_data(data), "federation.num_rounds=1"])
    assert fedara_here("run", TINY, "--results", tmp_path / "results", *args).code == 0


def test_a_missing_data_folder_is_refused(tmp_path: Path) -> None:
    overrides = sets([f"dataset.name=file:{tmp_path}/absent"])
    refuse_here(TINY, tmp_path / "results", [f"{tmp_path}/absent", "allowed: file:DIR"], *overrides)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_jsonl": "{'text': 1"}, ["train.jsonl", "cannot be read", "valid .jsonl"]),
        ({"test_jsonl": '{"text": "x", "label": "c"}'}, ["test.jsonl", "'c'", "allowed: a, b"]),
        ({"test_jsonl": '{"text": "x", "label": 2}'}, ["test.jsonl", "label 2", "0 to 1"]),
        ({"test_jsonl": '{"words": "x", "label": "a"}'}, ["'text'", "allowed: words, label"]),
        ({"test_jsonl": '{"text": "x", "topic": "a"}'}, ["'label'", "allowed: text, topic"]),
        ({"test_jsonl": ""}, ["test.jsonl", "no rows"]),
        (
            {"test_jsonl": r'{"text": "x \ud83d y", "label": "a"}'},
            ["test.jsonl: row 0: text = 'x \\ud83d y'", "lone surrogate"],
        ),
        (
            {"test_jsonl": r'{"text": "x", "label": "a\udfff"}'},
            ["test.jsonl: row 0: label = 'a\\udfff'", "lone surrogate"],
        ),
        ({"labels_json": r'["a", "b", "\ud83d"]'}, ["labels.json: name 2", "lone surrogate"]),
        ({"labels_json": 5000 * "["}, ["labels.json", "cannot be read"]),
        (
            {"labels_json": '["0", "2", "1", "a", "b"]', "test_jsonl": '{"text": "x", "label": 1}'},
            ["label 1 is the name '1'", "as an index it is '2'"],
        ),
        ({"test_jsonl": '{"text": "x", "label": "a", "label": "b"}'}, ["'label' occurs 2 times"]),
        ({"test_jsonl": '{"text": "x", "label": "a"}\n' + 100_000 * "["}, ["test.jsonl", "valid"]),
        ({"labels_json": '{"names": []}'}, ["labels.json", "allowed: a JSON list"]),
        ({"train_csv": "text,label\nx,a\n"}, ["train.csv, train.jsonl", "exactly one train file"]),
    ],
)
def test_wrong_data_is_refused(changes: dict[str, str], words: list[str], tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    overrides = sets([write_data(data, **changes)])
    refuse_here(TINY, tmp_path / "results", words, *overrides)


def test_an_unreadable_parquet_file_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "test"):
        (data / f"{name}.parquet").write_bytes(np.arange(100).tobytes())
    words = ["train.parquet", "cannot be read", "valid .parquet"]
    refuse_here(TINY, tmp_path / "results", words, *sets([f"dataset.name=file:{data}"]))


def test_a_max_length_above_the_model_s_positions_is_refused(tmp_path: Path) -> None:
    """The tiny model has 128 positions; a text of 200 words would index beyond them."""
    data = tmp_path / "data"
    data.mkdir()
    long = json.dumps({"text": "word " * 200, "label": "a"})
    overrides = sets([write_data(data, test_jsonl=long), "model.max_length=200"])
    refuse_here(TINY, tmp_path / "results", ["model.max_length", "200", "128"], *overrides)


# ---- options ----


def test_an_unknown_comm_is_refused(tmp_path: Path) -> None:
    words = ["'nonsense'", "auto, serial, mpi, mpi-node, torch"]
    refuse_here(TINY, tmp_path / "results", words, "--comm", "nonsense")


@pytest.mark.parametrize("below", ["", "folder"])
def test_results_that_are_a_file_are_refused(below: str, tmp_path: Path) -> None:
    results = tmp_path / "file" / below
    (tmp_path / "file").write_text("mine")
    refuse_here(TINY, results, [f"--results {results}", "allowed: a folder"])
    assert (tmp_path / "file").read_text() == "mine"


# ---- training that diverges ----


def check_diverged(results: Path) -> list[Path]:
    """The records say what ran, and are incomplete."""
    run_dirs = list(results.iterdir())
    for run_dir in run_dirs:
        assert not (run_dir / "DONE").exists()
        assert json.loads((run_dir / "run.json").read_text())["config"]["train"]["lr"] == 1e30
        assert (run_dir / "rounds.jsonl").read_text() == ""
    return run_dirs


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    words = ["client 0, round 0", "allowed: finite losses"]
    refuse_here(TINY, tmp_path / "results", words, *sets(DIVERGING))
    assert len(check_diverged(tmp_path / "results")) == 1


@pytest.mark.slow
def test_losses_that_are_not_finite_stop_the_runs_of_an_mpi_job(tmp_path: Path) -> None:
    """By either way to merge: each run stops for itself, and the job ends with one line."""
    config, results = tmp_path / "paths.toml", tmp_path / "results"
    paths = '"federation.merge_path" = ["allgather", "allreduce"]'
    config.write_text(f"{TINY.read_text()}\n[sweep]\n{paths}\n")
    job = launch("mpi", 3, *CLI, config, "--results", results, *sets(DIVERGING))
    check_refused(job, ["client 0, round 0", "allowed: finite losses"])
    assert job.out.count("client 0, round 0") == 2
    assert len(check_diverged(results)) == 2


def test_a_state_that_only_evaluates_to_nan_stops_the_run(tmp_path: Path) -> None:
    """One local step: its loss is finite, since it is taken before the parameters move."""
    args = sets([*DIVERGING, "train.local_steps=1", "train.max_grad_norm=1e30"])
    refuse_here(TINY, tmp_path / "results", ["round 0"], *args)
    assert len(check_diverged(tmp_path / "results")) == 1
