"""The determinism contract: the same rounds for any processes, back end and interruption."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.config.load import load_runs
from bench.config.schema import RunConfig
from bench.config.sections import ClientsConfig
from fedara_core.method import Method, load_method, method_names
from support.launch import (
    CLI,
    ROOT,
    TINY,
    Finished,
    Launched,
    fedara_here,
    launch,
    rounds_of,
    wait_for,
)

pytestmark = [pytest.mark.xdist_group("jobs"), pytest.mark.slow]

# What may not depend on where the clients ran.
SAME = (
    *("round_index", "cohort", "train_loss", "accuracy", "macro_f1", "test_loss"),
    *("uplink_bytes", "downlink_bytes", "live_triplets", "state_digest"),
    *("client_accuracy_mean", "client_accuracy_std", "client_accuracy_p10"),
)
WHERE_CLIENTS_FAIL = (
    *("arrived", "dropped", "late", "late_uplink_bytes"),
    *("modelled_round_seconds", "modelled_seconds_by_client"),
)
FAILING = (
    '{ method.name = "lora", clients.dropout = 0.1, clients.speed_spread = 3.0, '
    "clients.over_selection = 1.6, clients.deadline_seconds = 0.05, "
    'devices.shares.raspberry_pi_5 = 1.0, federation.merge_path = "allgather" }'
)
COHORTS = COHORT, SMALL_COHORT = 5, 2
NUM_ROUNDS = 6
MERGE_PATHS = ("split", "allreduce", "auto")  # beside allgather
# Leaves fedara by allgather, with both cohorts of the points.
FEDARA = ("--set", "method.name=fedara", "--set", "federation.merge_path=allgather")
TWO_HOSTS = ROOT / "tests" / "support" / "two_hosts.py"
Job = tuple[Path, Finished]  # the results folder, and how the job ended


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny.toml with a point for each method, fedara with a cohort of 2 and by each merge path, and
    a point whose clients fail: one start-up for all."""
    points = [(name, COHORT, "allgather") for name in method_names()]
    points.append(("fedara", SMALL_COHORT, "allgather"))
    points += [("fedara", cohort, path) for path in MERGE_PATHS for cohort in COHORTS]
    tables = [
        f'{{ method.name = "{name}", federation = {{ cohort = {cohort}, merge_path = "{path}" }} }}'
        for name, cohort, path in points
    ]
    tables.append(FAILING)
    text = TINY.read_text().replace("local_steps = 4", "local_steps = 2")
    path = tmp_path_factory.mktemp("config") / "all.toml"
    path.write_text(f"{text}\n[sweep]\npoints = [{', '.join(tables)}]\n")
    return path


@pytest.fixture(scope="session")
def jobs(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    """jobs(launcher, world_size, *options): each runs once. Four processes play two hosts."""
    done: dict[tuple[object, ...], Job] = {}

    def job(launcher: str, world_size: int, *options: str) -> Job:
        key = launcher, world_size, options
        if key not in done:
            results = tmp_path_factory.mktemp("results")
            program = (TWO_HOSTS, "run") if world_size == 4 else CLI
            words = (*program, config_file, "--results", results, *options)
            finished = launch(launcher, world_size, *words)
            assert finished.code == 0, finished.err
            done[key] = results, finished
        return done[key]

    return job


@pytest.fixture(scope="session")
def reference(jobs: Callable[..., Job]) -> Path:
    """The results folder of all points on one plain process."""
    return jobs("plain", 1)[0]


def fedara_config(config_file: Path) -> RunConfig:
    """The fedara point with the cohort of 5."""
    return load_runs(config_file, list(FEDARA[1::2]))[0]


def compared(run_dir: Path) -> list[dict[str, Any]]:
    rows = rounds_of(run_dir)
    failing = [{key: row.get(key) for key in WHERE_CLIENTS_FAIL} for row in rows]
    return [{key: row[key] for key in SAME} | more for row, more in zip(rows, failing, strict=True)]


def run_facts(run_dir: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((run_dir / "run.json").read_text())
    return facts


def wire_bytes_by_hand(kind: str, world_size: int, uplink_bytes: int, cohort: int) -> int:
    """All processes' bytes of one exchange by allgather, of clients that upload equally much.

    Whole messages in one call; or their headers and bits in one, and in another the values, whose
    size these tell.
    """
    per_process = 8  # the first call's size
    if kind == "torch":  # padded to the process with most clients
        longest = uplink_bytes // cohort * -(-cohort // world_size)
        return world_size * (world_size - 1) * (longest + per_process)
    return (world_size - 1) * (uplink_bytes + world_size * per_process)


def test_the_reference_is_worth_comparing_with(reference: Path, config_file: Path) -> None:
    configs = load_runs(config_file, [])
    assert len(configs) == len(method_names()) + 2 + len(COHORTS) * len(MERGE_PATHS)
    assert {path.name for path in reference.iterdir()} == {config.run_id for config in configs}
    for config in configs:
        rows = rounds_of(reference / config.run_id)
        assert [row["round_index"] for row in rows] == list(range(NUM_ROUNDS))
        assert len({row["state_digest"] for row in rows}) == NUM_ROUNDS
        assert all(row["wire_bytes_sent"] == row["wire_bytes_received"] == 0 for row in rows)
        assert run_facts(reference / config.run_id)["world_size"] == 1
    failing = rounds_of(reference / configs[-1].run_id)
    for what in ("arrived", "dropped", "late"):
        assert sum(row[f"num_{what}"] for row in failing) > 0, what
    live = [
        row["live_triplets"] for row in rounds_of(reference / fedara_config(config_file).run_id)
    ]
    assert live[-1] < live[0]  # pruning happened


@pytest.mark.parametrize(
    ("launcher", "world_size", "options"),
    [
        ("mpi", 1, FEDARA),
        ("mpi", 2, FEDARA),
        ("mpi", 3, ()),
        ("mpi", 4, FEDARA),
        ("torch", 2, ()),
        ("torch", 3, FEDARA),
    ],
)
def test_same_bits_on_any_processes(
    launcher: str,
    world_size: int,
    options: tuple[str, ...],
    jobs: Callable[..., Job],
    reference: Path,
    config_file: Path,
) -> None:
    results, job = jobs(launcher, world_size, *options)
    configs = load_runs(config_file, [word for word in options if "=" in word])
    assert {path.name for path in results.iterdir()} == {config.run_id for config in configs}
    for config in configs:
        run_dir, cohort = results / config.run_id, config.federation.cohort
        assert (run_dir / "DONE").exists()
        facts = run_facts(run_dir)
        assert (facts["comm"], facts["world_size"]) == (launcher, world_size)
        assert [entry["world_rank"] for entry in facts["processes"]] == list(range(world_size))
        if config.federation.merge_path != "allgather":
            continue  # see the next test
        assert compared(run_dir) == compared(reference / config.run_id), config.run_id
        for row in rounds_of(run_dir) if config.clients == ClientsConfig() else ():
            assert row["merge_path"] == "allgather"
            assert row["wire_bytes_sent"] == row["wire_bytes_received"]
            method = load_method(config.method.name)
            sent = row["uplink_bytes"]
            if method.row_weight is not Method.row_weight:
                sent += 4 * cohort  # which the server derives, and processes tell each other
            wanted = wire_bytes_by_hand(launcher, world_size, sent, cohort)
            if launcher == "torch" and (method.combine != "mean" or method.stateful):
                # Messages, or clients per process, may be uneven; all are padded to the longest,
                # which no process is below on average.
                longest = row["wire_bytes_sent"] / (world_size * (world_size - 1)) - 8
                assert sent / world_size <= longest <= sent
            else:
                assert row["wire_bytes_sent"] == wanted
    # Of the points only the small cohort is smaller than some jobs.
    small = [config for config in configs if config.federation.cohort == SMALL_COHORT]
    idle = f"{world_size} processes share a cohort of {SMALL_COHORT} clients:"
    assert job.out.count(idle) == (len(small) if world_size > SMALL_COHORT else 0)
    assert f"share a cohort of {COHORT}" not in job.out


@pytest.mark.parametrize(("launcher", "world_size"), [("plain", 1), ("mpi", 3), ("torch", 2)])
@pytest.mark.parametrize("path", MERGE_PATHS)
def test_merge_paths_that_sum_on_the_way(
    path: str,
    launcher: str,
    world_size: int,
    jobs: Callable[..., Job],
    reference: Path,
    config_file: Path,
) -> None:
    """split gives the reference's bits; allreduce what rounding of sums can change; both fewer
    bytes on the wire than the reference, and the same bytes up and down."""
    results, _ = jobs(launcher, world_size)
    by_path = ["method.name=fedara", f"federation.merge_path={path}"]
    config, small = load_runs(config_file, by_path)
    by_allgather, small_by_allgather = load_runs(config_file, list(FEDARA[1::2]))
    if path != "allreduce":
        assert compared(results / small.run_id) == compared(reference / small_by_allgather.run_id)
    rows = rounds_of(results / config.run_id)
    expected = rounds_of(reference / by_allgather.run_id)
    chosen = {"auto": "allgather" if world_size == 1 else "split"}.get(path, path)
    assert {row["merge_path"] for row in rows} == {chosen}
    for row, wanted in zip(rows, expected, strict=True):
        if chosen != "allreduce":
            assert {key: row[key] for key in SAME} == {key: wanted[key] for key in SAME}
        assert row["train_loss"] == pytest.approx(wanted["train_loss"], rel=1e-4)
        assert row["live_triplets"] == wanted["live_triplets"]
        assert row["uplink_bytes"] == wanted["uplink_bytes"]
        assert row["downlink_bytes"] == wanted["downlink_bytes"]
        gathered = wire_bytes_by_hand(launcher, world_size, row["uplink_bytes"], COHORT)
        if world_size > 2:  # of two processes each has half of the cohort: nothing to save
            assert 0 < row["wire_bytes_sent"] < gathered


@pytest.mark.parametrize(("kind", "options"), [("mpi", ()), ("mpi-node", ("--comm", "mpi-node"))])
def test_one_copy_to_each_host_gives_the_same_bits(
    kind: str,
    options: tuple[str, ...],
    jobs: Callable[..., Job],
    reference: Path,
    config_file: Path,
) -> None:
    """Four processes on two hosts that one plays: by node, fewer bytes cross between them."""
    results, _ = jobs("mpi", 4, *FEDARA, *options)
    run_id = fedara_config(config_file).run_id
    assert run_facts(results / run_id)["comm"] == kind
    rows, expected = rounds_of(results / run_id), rounds_of(reference / run_id)
    for row, wanted in zip(rows, expected, strict=True):
        assert {key: row[key] for key in SAME} == {key: wanted[key] for key in SAME}
        assert row["network_bytes_received"] <= row["wire_bytes_received"]
        crossed = row["network_bytes_received"] / row["uplink_bytes"]
        # Each process gets what the other host's two have; or each host does, once.
        assert 1.9 < crossed < 2.2 if kind == "mpi" else 0.9 < crossed < 1.3


def test_serial_under_mpiexec_is_refused(config_file: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    job = launch("mpi", 2, *CLI, config_file, "--results", results, "--comm", "serial")
    assert job.code == 2
    assert job.refusals
    assert all("--comm serial" in line and "2 processes" in line for line in job.refusals)
    assert "Traceback" not in job.err
    assert not results.exists()


@pytest.mark.parametrize("name", ["fedara", "fedsa_lora"])  # the second keeps tensors at clients
def test_a_killed_run_goes_on_with_other_processes(
    name: str, reference: Path, config_file: Path, tmp_path: Path
) -> None:
    sets = [
        f"method.name={name}",
        f"federation.cohort={COHORT}",
        "federation.merge_path=allgather",
    ]
    (config,) = load_runs(config_file, sets)
    run_dir = tmp_path / config.run_id
    words = (*CLI, config_file, "--results", tmp_path, *(w for s in sets for w in ("--set", s)))

    def num_lines() -> int:
        path = run_dir / "rounds.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    job = Launched("mpi", 2, *words)
    try:
        wait_for(lambda: num_lines() >= 2 or not job.running, "two recorded rounds")
    finally:
        job.kill()
    recorded = num_lines()
    assert 2 <= recorded < NUM_ROUNDS
    assert not (run_dir / "DONE").exists()
    with (run_dir / "rounds.jsonl").open("a") as file:
        file.write('{"round_index": 99, "torn')  # what a write that was cut short leaves

    assert launch("mpi", 3, *words).code == 0
    assert (run_dir / "DONE").exists()
    assert compared(run_dir) == compared(reference / config.run_id)
    facts = run_facts(run_dir)
    (part,) = facts["parts"]
    assert (facts["world_size"], part["world_size"]) == (2, 3)
    assert part["first_round_index"] in (recorded - 1, recorded)
    # One round at most was done twice: the first ones were kept, not computed again.
    sent = [row["wire_bytes_sent"] for row in rounds_of(run_dir)]
    uplink = [row["uplink_bytes"] for row in rounds_of(run_dir)]
    by_two = [wire_bytes_by_hand("mpi", 2, n, COHORT) for n in uplink]
    assert sent[: recorded - 1] == by_two[: recorded - 1]
    assert sent[-1] == wire_bytes_by_hand("mpi", 3, uplink[-1], COHORT)


def test_finished_runs_are_skipped_and_left_alone(
    reference: Path, config_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)

    def files() -> dict[str, tuple[int, bytes]]:
        paths = [path for path in tmp_path.rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}

    before = files()
    job = fedara_here("run", config_file, "--results", tmp_path)
    assert job.code == 0
    num_runs = len(load_runs(config_file, []))
    assert job.out.count("finished earlier, skipped") == num_runs
    assert len(before) == 6 * num_runs
    assert files() == before
