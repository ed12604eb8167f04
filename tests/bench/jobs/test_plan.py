"""Plan files, their lines as runs, and sweeps on this machine, one of them with a failing run."""

import json
import signal
import time
from pathlib import Path

import pytest
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from bench.cli import app
from bench.config.load import load_runs
from bench.jobs.local import run_sweep, side_by_side
from bench.jobs.plan import Plan, describe, load_points, make_plan
from bench.jobs.status import last_lines, read_status
from fedara_core.errors import InputError
from support.launch import TINY, environment, fedara_here, pretend_finished, rounds_of
from support.rounds import make_tiny_job, play_rounds
from support.stand_in import stand_in

pytestmark = pytest.mark.xdist_group("jobs")


def write(folder: Path, table: str) -> Path:
    path = folder / "small.toml"
    path.write_text(f"{TINY.read_text()}\n[sweep]\n{table}\n")
    return path


def text_of(plan: Plan) -> str:
    return "\n".join(describe(plan))


def fedara(*words: object) -> Result:
    return CliRunner(env=environment()).invoke(app, [str(word) for word in words])


# ---- the plan file ----


def test_a_line_of_the_plan_is_the_run_that_the_config_meant(tmp_path: Path) -> None:
    config = write(tmp_path, 'seed = [0, 1]\n"method.name" = ["lora", "fedara"]')
    plan = make_plan(config, tmp_path / "out", ["train.max_grad_norm=none"])
    plan.write()
    assert load_points(plan.path, []) == list(plan.runs)
    assert (
        load_points(plan.path, [], 2)
        == [plan.runs[2]]
        == load_points(config, ["train.max_grad_norm=none"], 2)
    )
    lines = [json.loads(line) for line in plan.path.read_text().splitlines()]
    assert [line["run_id"] for line in lines] == [run.run_id for run in plan.runs]


def test_another_expansion_is_another_file(tmp_path: Path) -> None:
    config = write(tmp_path, "seed = [0, 1]")
    first = make_plan(config, tmp_path, [])
    first.write()
    assert make_plan(config, tmp_path, []).path == first.path
    second = make_plan(write(tmp_path, "seed = [0, 1, 2]"), tmp_path, [])
    second.write()
    assert second.path != first.path
    assert len(load_points(first.path, [])) == 2
    assert len(read_status(tmp_path)) == 3  # runs that both list count once


def test_results_lie_in_a_folder_named_after_the_config(tmp_path: Path) -> None:
    assert make_plan(write(tmp_path, "seed = [0]"), None, []).results == Path("results/small")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text[:-30], "is damaged"),
        (lambda text: text.replace("run_id", "name"), "is damaged"),
        (lambda text: text.replace("-seed0-", "-seed0-0"), "in this version of the suite"),
        (lambda text: text.replace('"lr"', '"rate"'), "unknown key train.rate"),
    ],
)
def test_a_plan_that_was_changed_is_refused(tmp_path: Path, change: object, reason: str) -> None:
    plan = make_plan(TINY, tmp_path, [])
    plan.path.write_text(change(plan.text))  # type: ignore[operator]
    with pytest.raises(InputError, match=reason):
        load_points(plan.path, [])


def test_what_a_plan_can_not_do_costs_one_line(tmp_path: Path) -> None:
    plan = make_plan(TINY, tmp_path, [])
    plan.write()
    for words, reason in [
        (["--set", "seed=1"], "is a frozen plan"),
        (["--index", "1"], "has 1 runs"),
        (["--index", "-1"], "has 1 runs"),
    ]:
        done = fedara_here("run", plan.path, "--results", tmp_path, *words)
        assert done.code == 2
        (line,) = done.refusals
        assert reason in line
    with pytest.raises(InputError, match="cannot be read"):
        load_points(tmp_path / "plan-none.jsonl", [])


def test_200_points_expand_in_a_second(tmp_path: Path) -> None:
    seeds = ", ".join(map(str, range(50)))
    config = write(tmp_path, f'seed = [{seeds}]\n"partition.alpha" = [0.1, 0.2, 0.3, 0.4]')
    load_runs(TINY, [])  # the method's module is loaded by now
    seconds = []
    for folder in ("one", "two"):  # the better of two: the machine may be busy
        start = time.process_time()
        plan = make_plan(config, tmp_path / folder, [])
        plan.write()
        seconds.append(time.process_time() - start)
    assert len(plan.runs) == 200
    assert min(seconds) < 1


def test_a_dry_run_counts_what_is_left(tmp_path: Path) -> None:
    config = write(tmp_path, "seed = [0, 1, 2]")
    plan = make_plan(config, tmp_path / "out", [])
    pretend_finished(plan.results / plan.runs[1].run_id, num_rounds=6)
    assert plan.left() == [0, 2]
    dry = fedara("sweep", config, "--results", plan.results, "--dry-run")
    assert dry.exit_code == 0, dry.stderr
    assert dry.stdout == text_of(plan) + "\n"
    first, second = (played.row for played in play_rounds(make_tiny_job(), num_rounds=2))
    up, down = ((first[key] + 5 * second[key]) / 1e3 for key in ("uplink_bytes", "downlink_bytes"))
    each = f"up {up:.3g} kB, down {down:.3g} kB"
    assert dry.stdout.splitlines()[1].endswith(f"6 rounds x 5 clients, {each}, done")
    both = f"up {2 * up:.3g} kB, down {2 * down:.3g} kB"
    assert f"3 runs, 1 of them done; left: 12 rounds, 60 times a client trains, {both}" in (
        dry.stdout
    )
    assert not plan.path.exists()


def test_a_dry_run_downloads_nothing(tmp_path: Path) -> None:
    config = write(tmp_path, '"model.name" = ["tiny", "some/model"]')
    *_, unknown, _, _, why = text_of(make_plan(config, tmp_path / "out", [])).splitlines()
    assert unknown.endswith("clients, bytes unknown")
    assert why == "unknown where model or data are not on this machine"


# ---- on this machine ----


@pytest.mark.slow
def test_a_failing_run_stops_no_other_and_is_listed(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    config = write(
        tmp_path, f'points = [{{ dataset.name = "file:{missing}" }}, {{ method.name = "lora" }}]'
    )
    words = ("--results", tmp_path / "out", "--set", "federation.num_rounds=2")
    done = fedara("sweep", config, *words, "--jobs", 2)
    assert done.exit_code == 1, done.stderr
    failing, sound = plan_runs = make_plan(config, tmp_path / "out", [str(words[3])]).runs
    assert f"[2/2] {sound.run_id}: done" in done.stdout
    assert f"[1/2] {failing.run_id}: failed: dataset" in done.stdout
    assert done.stdout.splitlines()[-1] == "1 runs done, 1 failed"
    after = done.stdout[done.stdout.index(f"\nfailed: {failing.run_id}") :]
    assert str(missing) in after
    assert "fedara: exit code 2" in after
    assert len(rounds_of(tmp_path / "out" / sound.run_id)) == 2

    status = {run.run_id: run for run in read_status(tmp_path / "out")}
    assert status[failing.run_id].state == "failed"
    assert str(missing) in status[failing.run_id].reason
    assert status[sound.run_id].state == "done"
    assert status[sound.run_id].rounds_done == 2
    assert set(status) == {run.run_id for run in plan_runs}
    assert make_plan(config, tmp_path / "out", [str(words[3])]).left() == [0]


def fake_mpiexec(folder: Path, code: int) -> Path:
    path = folder / "mpiexec"
    path.write_text(f'#!/bin/sh\necho "$OMP_NUM_THREADS" "$@"\nexit {code}\n')
    path.chmod(0o755)
    return path


def test_each_run_is_started_under_mpiexec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mpiexec = fake_mpiexec(tmp_path, 0)
    monkeypatch.setattr("bench.jobs.local.beside", lambda python, name: str(mpiexec))
    monkeypatch.setattr("bench.jobs.local.num_cores", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    plan = make_plan(write(tmp_path, "seed = [0, 1]"), tmp_path, [])
    with (tmp_path / "out").open("w") as out:
        assert not run_sweep(plan, 3, 2, Console(file=out))  # it exits with 0, but no DONE
    assert "0 runs done, 2 failed" in (tmp_path / "out").read_text()
    for index in (0, 1):
        lines = last_lines(plan.log(index), 9)
        assert lines.pop() == "fedara: exit code 0"
        assert sum(line.startswith("fedara: started as process ") for line in lines) == 1
        (line,) = [line for line in lines if not line.startswith("fedara: ")]
        threads, *words = line.split()
        assert threads == "2"
        assert words[:2] == ["-n", "3"]
        assert words[-5:] == [str(plan.path), "--index", str(index), "--results", str(tmp_path)]


@pytest.mark.parametrize(
    ("given", "launcher", "rmk"),
    [({}, "fork", "user"), ({"HYDRA_LAUNCHER": "ssh", "HYDRA_RMK": "pbs"}, "ssh", "pbs")],
)
def test_mpiexec_does_not_wait_for_srun(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, str],
    launcher: str,
    rmk: str,
) -> None:
    """As it would under Slurm's variables; what the user has set stands."""
    mpiexec = stand_in(tmp_path, "mpiexec", 'echo "$HYDRA_LAUNCHER" "$HYDRA_RMK"')
    monkeypatch.setattr("bench.jobs.local.beside", lambda python, name: str(mpiexec))
    for key in ("HYDRA_LAUNCHER", "HYDRA_RMK"):
        monkeypatch.delenv(key, raising=False)
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    plan = make_plan(TINY, tmp_path, [])
    with (tmp_path / "out").open("w") as out:
        run_sweep(plan, 2, None, Console(file=out))
    assert f"{launcher} {rmk}" in last_lines(plan.log(0), 9)


@pytest.mark.slow
def test_a_sweep_in_somebody_else_s_slurm_job_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container that has the variables of the batch job around it, but not that job."""
    stale = {"JOB_ID": "5", "JOBID": "5", "NNODES": "2", "NODELIST": "n[8-9]", "NTASKS": "2"}
    for key, value in stale.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "1(x2)")
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    plan = make_plan(TINY, tmp_path, ["federation.num_rounds=1"])
    with (tmp_path / "out").open("w") as out:
        assert run_sweep(plan, 2, None, Console(file=out)), plan.log(0).read_text()
    run = json.loads((tmp_path / plan.runs[0].run_id / "run.json").read_text())
    assert run["world_size"] == 2


def test_logs_of_earlier_tries_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(TINY, tmp_path, [])
    for code in (3, 4):
        mpiexec = fake_mpiexec(tmp_path, code)
        monkeypatch.setattr("bench.jobs.local.beside", lambda python, name, path=mpiexec: str(path))
        with (tmp_path / "out").open("w") as out:
            assert not run_sweep(plan, 2, None, Console(file=out))
    assert [line for line in last_lines(plan.log(0), 9) if "exit" in line] == [
        "fedara: exit code 3",
        "fedara: exit code 4",
    ]


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_nothing_outlives_an_interrupted_sweep(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    raised: type[BaseException],
) -> None:
    mpiexec = fake_mpiexec(tmp_path, 0)
    mpiexec.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr("bench.jobs.local.beside", lambda python, name: str(mpiexec))
    started = []

    def interrupt(plan: object, run: object) -> str:
        started.append(run)
        signal.raise_signal(number)
        return ""

    monkeypatch.setattr("bench.jobs.local._title", interrupt)
    plan = make_plan(TINY, tmp_path, [])
    # As in a terminal: a shell's background job, such as `make test &`, starts with ^C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with (tmp_path / "out").open("w") as out, pytest.raises(raised):
            run_sweep(plan, 2, 1, Console(file=out))
    finally:
        signal.signal(signal.SIGINT, before)
    (run,) = started
    assert run.process.returncode is not None


@pytest.mark.parametrize(
    ("overrides", "processes", "expected"),
    [
        ([], 1, 8),
        ([], 4, 2),
        ([], 16, 1),
        (["system.threads=4"], 1, 2),
        (["system.threads=auto"], 1, 1),
        (["system.device=auto"], 1, 1),
        (["energy.enabled=true"], 1, 1),
    ],
)
def test_runs_side_by_side(overrides: list[str], processes: int, expected: int) -> None:
    assert side_by_side(tuple(load_runs(TINY, overrides)), processes, 8) == expected


def test_energy_is_not_measured_side_by_side(tmp_path: Path) -> None:
    plan = make_plan(TINY, tmp_path, ["energy.enabled=true"])
    with pytest.raises(InputError, match="allowed: --jobs 1, or --set energy"):
        run_sweep(plan, 1, 2, Console())


def test_a_sweep_under_a_launcher_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(InputError, match="without a launcher"):
        run_sweep(make_plan(TINY, tmp_path, []), 1, 1, Console())
