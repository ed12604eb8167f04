"""What a round and a run cost, in the record: phases, energy once per host, memory, FLOPs, models.

The host of these tests has one counter of 10 watts, or none; codecarbon is real where it is on.
"""

import json
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.config.load import load_runs
from bench.config.sections import ModelConfig
from bench.metering.client_cost import MIX, ClientCost, model_devices, reduce_clients
from bench.metering.codecarbon import HostEnergy, NullEnergy
from bench.metering.devices import load_devices
from bench.metering.meter import PHASES, Meter
from bench.metering.reduce import reduce_memory
from bench.models.encoders import build_model
from bench.run.job import prepare
from bench.run.provenance import library_fact, surroundings
from bench.run.record import Recorder
from bench.run.rounds import run
from fedara_core.comm.base import Communicator
from support.documented import documented
from support.energy_job import WATTS
from support.launch import ROOT, TINY, Finished, fedara_here, launch, rounds_of
from support.rounds import make_tiny_job, play_rounds

pytestmark = pytest.mark.xdist_group("jobs")

ENERGY_JOB = ROOT / "tests" / "support" / "energy_job.py"
SHORT = ("--set", "federation.num_rounds=3", "--set", "train.local_steps=2")
ENERGY = ("--set", "energy.enabled=true", "--set", "energy.idle_seconds=0.3")
MODELLED = {
    "energy_joules": {"cpu": 3.0, "ram": 1.0},
    "energy_part_sources": {"cpu": "load-model", "ram": "ram-model"},
    "energy_source": "codecarbon-load-model+ram-model",
    "energy_scope": "host:cpu+ram",
    "co2_grams": 0.5,
}


def facts_of(run_dir: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((run_dir / "run.json").read_text())
    return facts


def only_run(results: Path) -> Path:
    (run_dir,) = results.iterdir()
    return run_dir


# ---- phases ----


def test_phases_of_a_meter_take_the_whole_time() -> None:
    times = iter(range(100))
    meter = Meter(torch.device("cpu"), lambda: next(times))
    for name in ("download", "local_train", "download"):
        with meter.phase(name):
            pass
    seconds = meter.take().seconds
    total = seconds.pop("total")
    assert seconds["download"] == 2 * seconds["local_train"] > 0
    assert sum(seconds.values()) == total
    assert meter.take().seconds.keys() == {"meter", "total"}


def check_phases(row: dict[str, Any], world_size: int) -> None:
    """Every process's phases add up to its round, within 1 %."""
    by_process = dict(row["seconds_by_process"])
    totals = by_process.pop("total")
    assert len(totals) == world_size
    assert set(by_process) <= set(PHASES)
    for world_rank, total in enumerate(totals):
        phases = sum(seconds[world_rank] for seconds in by_process.values())
        assert phases == pytest.approx(total, rel=0.01)


# ---- energy of a job, counted once per host ----


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Finished]]:
    """jobs(launcher, world_size, nodes): the record of a job on the host with a counter."""
    done: dict[tuple[str, int, str], tuple[Path, Finished]] = {}

    def job(launcher: str, world_size: int, nodes: str = "one") -> tuple[Path, Finished]:
        key = launcher, world_size, nodes
        if key not in done:
            results = tmp_path_factory.mktemp("energy")
            words = (ENERGY_JOB, nodes, "run", TINY, *SHORT, *ENERGY, "--results", results)
            finished = launch(launcher, world_size, *words)
            assert finished.code == 0, finished.err
            done[key] = only_run(results), finished
        return done[key]

    return job


HOSTS = [("plain", 1, "one"), ("mpi", 2, "one"), ("mpi", 4, "one"), ("mpi", 2, "apart")]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "world_size", "nodes"), HOSTS)
def test_a_host_counts_once(
    launcher: str, world_size: int, nodes: str, jobs: Callable[..., tuple[Path, Finished]]
) -> None:
    run_dir, finished = jobs(launcher, world_size, nodes)
    for row in rounds_of(run_dir):
        check_phases(row, world_size)
        (seconds, *_) = row["seconds_by_process"]["total"]
        assert row["energy_joules"]["total"] == pytest.approx(WATTS * seconds, rel=0.02)
        assert row["energy_source"] == "rapl"
        assert row["energy_scope"] == "host:package"
        assert row["energy_joules_by_source"]["rapl"] == pytest.approx(
            row["energy_joules"]["total"], abs=1e-5
        )
        # The fake host takes as much when idle.
        assert abs(row["energy_net_joules"]["total"]) < 0.02 * WATTS * seconds
        phases = dict(row["energy_joules"])
        assert phases.pop("total") == pytest.approx(sum(phases.values()), abs=1e-4)
    facts = facts_of(run_dir)
    idle = [process.get("idle_watts") for process in facts["processes"]]
    assert idle[0]["rapl"] == pytest.approx(WATTS, rel=0.01)
    assert idle[1:] == [None] * (world_size - 1)
    assert facts["energy_scope"] == "host:cpu+ram"  # codecarbon's: one host, not several
    assert facts["energy_source"].startswith("codecarbon-")
    assert "co2_grams" not in facts  # no country was named
    assert "energy: rapl, counted, host:package" in finished.out
    assert "Warning" not in finished.err


@pytest.mark.slow
def test_energy_changes_no_bit(jobs: Callable[..., tuple[Path, Finished]], tmp_path: Path) -> None:
    assert fedara_here("run", TINY, *SHORT, "--no-energy", "--results", tmp_path).code == 0
    expected = [row["state_digest"] for row in rounds_of(only_run(tmp_path))]
    for host in HOSTS[:2]:
        assert [row["state_digest"] for row in rounds_of(jobs(*host)[0])] == expected


# ---- a run without counters, without codecarbon, without energy ----


def runtime_warnings(caught: pytest.WarningsRecorder) -> list[str]:
    return [str(w.message) for w in caught if w.category is RuntimeWarning]


def test_without_powercap_codecarbon_models_the_run(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    country = ("--set", "energy.country_iso_code=DEU")
    job = fedara_here("run", TINY, *SHORT, *ENERGY, *country, "--results", tmp_path)
    facts = facts_of(only_run(tmp_path))
    if facts["energy_source"] != MODELLED["energy_source"]:
        pytest.skip("this host has counters")
    (text,) = runtime_warnings(recwarn)
    assert "no rapl energy" in text
    assert facts["co2_grams"] > 0
    assert f"energy: {MODELLED['energy_source']}, host:cpu+ram" in job.out
    for row in rounds_of(only_run(tmp_path)):
        assert not [key for key in row if key.startswith("energy")]


def test_codecarbon_does_not_start_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr("bench.metering.codecarbon.EnergyCounters", lambda gpus: NullEnergy())
    failing = "codecarbon.OfflineEmissionsTracker.get_detected_hardware"
    monkeypatch.setattr(failing, lambda tracker: 1 / 0)
    job = fedara_here("run", TINY, *SHORT, *ENERGY, "--results", tmp_path)
    assert job.code == 0
    (text,) = runtime_warnings(recwarn)
    assert text.startswith("no codecarbon energy: ZeroDivisionError")
    facts = facts_of(only_run(tmp_path))
    assert facts["energy_missing"] == text
    assert not facts.keys() & {"energy_joules", "energy_source", "energy_parts"}
    assert f"energy: not measured here: {text}" in job.out


def test_a_slurm_job_without_scontrol(tmp_path: Path) -> None:
    words = ("run", TINY, *SHORT, *ENERGY, "--comm", "serial", "--results", tmp_path)
    job = launch("plain", 1, ENERGY_JOB, "no-scontrol", *words)
    assert job.code == 0, job.err
    (line,) = job.err.splitlines()
    assert line.startswith("warning: no codecarbon energy: ")
    facts = facts_of(only_run(tmp_path))
    assert "scontrol" in facts["energy_missing"]
    assert "energy_source" not in facts
    # The counters of the host count all the same.
    assert {row["energy_source"] for row in rounds_of(only_run(tmp_path))} == {"rapl"}


def test_no_energy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.run.runner.open_energy", lambda **_: pytest.fail("asked for energy"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        words = ("--set", "energy.enabled=true", "--no-energy", "--results", tmp_path)
        job = fedara_here("run", TINY, *SHORT, *words)
    assert "energy: not measured here: energy.enabled = false" in job.out
    assert facts_of(only_run(tmp_path))["energy_missing"] == "energy.enabled = false"


# ---- a run in several parts ----


class FakeRun:
    """codecarbon with one answer for every part."""

    samples, missing = True, ""

    def start(self) -> None:
        pass

    def stop(self) -> dict[str, Any]:
        return MODELLED


def run_in_two_parts(results: Path) -> Recorder:
    (config,) = load_runs(TINY, ["federation.num_rounds=3", "train.local_steps=1"])
    recorder = Recorder(results, config)
    energy = HostEnergy(run=FakeRun(), num_hosts=1)  # type: ignore[arg-type]

    def stop_after_two(row: dict[str, Any]) -> None:
        if row["round_index"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(prepare(config, Communicator()), Communicator(), recorder, stop_after_two, energy)
    return recorder


def go_on(recorder: Recorder) -> dict[str, Any]:
    (config,) = load_runs(TINY, ["federation.num_rounds=3", "train.local_steps=1"])
    energy = HostEnergy(run=FakeRun(), num_hosts=1)  # type: ignore[arg-type]
    run(prepare(config, Communicator()), Communicator(), recorder, energy=energy)
    return facts_of(recorder.run_dir)


def test_a_resumed_run_adds_up_its_parts(tmp_path: Path) -> None:
    facts = go_on(run_in_two_parts(tmp_path))
    first, second = facts["energy_parts"]
    assert first == {"first_round_index": 0, **MODELLED}
    assert second == {"first_round_index": 2, **MODELLED}
    assert facts["energy_joules"] == {"cpu": 6.0, "ram": 2.0}
    assert facts["co2_grams"] == 1.0
    assert facts["energy_scope"] == "host:cpu+ram"
    assert [part["first_round_index"] for part in facts["parts"]] == [2]


def test_a_part_that_nobody_knows_leaves_the_sum_absent(tmp_path: Path) -> None:
    recorder = run_in_two_parts(tmp_path)
    path = recorder.run_dir / "run.json"
    facts = facts_of(recorder.run_dir)
    del facts["energy_parts"]  # as after SIGKILL
    path.write_text(json.dumps(facts))
    facts = go_on(recorder)
    assert len(facts["energy_parts"]) == 1
    assert "energy_joules" not in facts
    assert facts["energy_missing"] == "not known of every part of the run"


# ---- memory, FLOPs, devices ----


def test_a_phase_has_a_peak_of_its_own() -> None:
    meter = Meter(torch.device("cpu"))
    for name, size in (("pack", 0), ("local_train", 1 << 26), ("evaluate", 0)):
        with meter.phase(name):
            torch.ones(size)
    peaks = meter.take().memory.get("peak_memory_bytes_by_phase")
    if peaks is None:
        pytest.skip("this platform keeps no peak that can be reset")
    assert peaks["local_train"] > peaks["evaluate"] + 200e6
    assert peaks["local_train"] > peaks["pack"] + 200e6


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """A run of FedARA that prunes, with an upload codec and a mix of devices."""
    results = tmp_path_factory.mktemp("record")
    shares = "devices.shares={agx_orin=0.5,raspberry_pi_5=0.5}"
    settings = ("--set", "codec.up=int8", "--set", shares, "--set", "devices.names=['orin_nano']")
    job = fedara_here("run", TINY, "--set", "train.local_steps=2", *settings, "--results", results)
    assert job.code == 0
    return only_run(results), job


def test_costs_of_clients_in_the_record(record: tuple[Path, Finished]) -> None:
    rows = rounds_of(record[0])
    for row in rows:
        for key in ("flops", "uplink_bytes", "downlink_bytes"):
            assert len(row[f"{key}_by_client"]) == len(row["cohort"])
            assert row[key] == sum(row[f"{key}_by_client"]) > 0
        assert 0 < row["num_backward_layers"] <= row["num_layers"] == 12
        # AdamW: two moments of what trains, and a step count for each tensor.
        assert row["optimizer_bytes"] > 2 * row["adapter_bytes"]
        assert "activation_bytes" not in row  # on a CPU nobody counts them
    assert rows[0]["lowest_trained_layer"] == "encoder.encoder.layer.0.attention.self.query"
    for before, row in pairwise(rows):  # the record has what is left after its round
        live = before["live_triplets_by_adapter"]
        assert live[row["lowest_trained_layer"]] > 0
    assert rows[-1]["flops"] < rows[0]["flops"]
    assert rows[-1]["adapter_bytes"] < rows[0]["adapter_bytes"]
    facts = facts_of(record[0])
    assert facts["prepare_seconds"] == facts["processes"][0]["prepare_seconds"] > 0
    assert set(facts["device_profiles"]) == {"agx_orin", "orin_nano", "raspberry_pi_5"}


def test_devices_are_modelled_from_the_record(record: tuple[Path, Finished]) -> None:
    devices = load_devices()
    for row in rounds_of(record[0]):
        by_device = row["modelled_by_device"]
        assert set(by_device) == {"orin_nano", MIX}
        slowest = max(row["flops_by_client"])
        compute = slowest / devices["orin_nano"].fp32_flops_per_second
        # Clients send equal bytes, so that the one with most FLOPs is the slowest.
        assert by_device["orin_nano"]["modelled_compute_seconds"] == round(compute, 6)
        assert by_device[MIX]["modelled_straggler"] in row["cohort"]
        assert all(key.startswith("modelled_") for key in by_device[MIX])


def test_nothing_is_modelled_without_flops() -> None:
    assert model_devices({"cohort": [0]}, load_devices(), ["agx_orin"], [], [1.0], "fp32") == {}


def test_a_model_whose_flops_can_not_be_counted(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr("bench.metering.client_cost.StepFlops", lambda model: 1 / 0)
    job = make_tiny_job("train.local_steps=1")
    (played,) = play_rounds(job, num_rounds=1)
    (text,) = runtime_warnings(recwarn)
    assert text.startswith("FLOPs are not counted: ZeroDivisionError")
    found = reduce_clients([[vars(cost) for cost in played.row["clients"]]])
    assert "flops" not in found
    assert found["adapter_bytes"] > 0


def test_the_counter_is_no_part_of_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    with_counter = play_rounds(make_tiny_job(), num_rounds=2)[-1].row["state_digest"]
    monkeypatch.setattr("bench.run.job.ClientCounter", lambda model: None)
    assert play_rounds(make_tiny_job(), num_rounds=2)[-1].row["state_digest"] == with_counter


# ---- what people read ----


def test_a_run_ends_with_its_costs(record: tuple[Path, Finished]) -> None:
    lines = record[1].out.splitlines()
    start = lines.index("cost, all rounds; seconds of the slowest process")
    assert len(lines) - start <= 8
    assert max(map(len, lines[start:])) <= 120
    assert "TFLOP" in lines[start + 1]
    assert lines[start + 3] == "energy: not measured here: energy.enabled = false"
    assert "orin_nano s" in lines[start + 5]
    assert MIX in lines[start + 5]


# ---- results/README.md against the records ----


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device whose calls to torch.cuda have answers."""
    answers = {"is_available": True, "get_device_name": "a GPU", "synchronize": None}
    answers |= {"max_memory_allocated": 9, "memory_allocated": 1, "reset_peak_memory_stats": None}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    return torch.device("cuda", 0)


def round_on(device: torch.device) -> dict[str, Any]:
    """The keys of a round that come from its device's memory."""
    meter = Meter(device)
    with meter.phase("local_train"):
        pass
    cost = ClientCost(
        client_id=0,
        uplink_bytes=1,
        downlink_bytes=1,
        activation_bytes=meter.device_bytes_above_rest(),
    )
    return reduce_clients([[vars(cost)]]) | reduce_memory([meter.take().memory])


@pytest.fixture
def records(
    record: tuple[Path, Finished],
    jobs: Callable[..., tuple[Path, Finished]],
    tmp_path: Path,
) -> list[Path]:
    """Runs without energy, with counters on two processes, in two parts, of clients that fail."""
    recorder = run_in_two_parts(tmp_path / "parts")
    go_on(recorder)
    failing = [
        *("devices.shares={orin_nano=1.0}", "clients.speed_spread=0.5"),
        *("clients.deadline_seconds=1e6", "federation.num_rounds=1", "train.local_steps=1"),
    ]
    words = [word for setting in failing for word in ("--set", setting)]
    assert fedara_here("run", TINY, *words, "--results", tmp_path / "failing").code == 0
    return [record[0], jobs("mpi", 2)[0], recorder.run_dir, only_run(tmp_path / "failing")]


def test_the_keys_of_run_json_are_those_documented(
    records: list[Path], fake_gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = [facts_of(run_dir) for run_dir in records]
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    elsewhere = [surroundings(), library_fact("mpi-node", "MPICH"), library_fact("torch", "gloo")]
    found = {key for run in (*facts, *elsewhere) for key in run}
    # An installed copy has no checkout, and so no commit; the toy model has no tokeniser's files,
    # and is none of transformers.
    found |= {"git_commit", "git_dirty", "tokenizer_digest"}
    found |= build_model(ModelConfig(name="tiny"), num_classes=2, seed=0).facts.keys()
    assert found == documented("## run.json")
    processes = [process for run in facts for process in run["processes"]]
    assert {key for p in processes for key in p} == documented("### Entries of `processes`")
    parts = [part for run in facts for part in run.get("parts", [])]
    assert {key for part in parts for key in part} <= found | {"first_round_index"}


def test_the_keys_of_rounds_are_those_documented(
    records: list[Path], fake_gpu: torch.device
) -> None:
    rows = [row for run_dir in records for row in rounds_of(run_dir)]
    found = {key for row in (*rows, round_on(fake_gpu)) for key in row} - {"seconds"}
    found |= {f"seconds.{phase}" for row in rows for phase in row["seconds"]}
    assert found == documented("## rounds.jsonl")
    modelled = [device for row in rows for device in row["modelled_by_device"].values()]
    assert {k for m in modelled for k in m} == documented("### Entries of `modelled_by_device`")


def test_the_keys_of_partition_json_are_those_documented(records: list[Path]) -> None:
    texts = [(run_dir / "partition.json").read_text() for run_dir in records]
    clients = [client for text in texts for client in json.loads(text)]
    assert {key for client in clients for key in client} == documented("## partition.json")
