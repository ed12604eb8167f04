"""fedara status: states and reasons from files alone, many runs, and no torch."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.cli import app
from bench.jobs.plan import Plan, make_plan
from bench.jobs.slurm_job import Queue
from bench.jobs.status import RunStatus, exit_line, log_file, read_status
from bench.run.lock import locked
from fedara_core.errors import InputError
from support.launch import TINY, environment
from support.stand_in import put_first, stand_in

pytestmark = pytest.mark.xdist_group("jobs")

PLAN = "plan-demo-01234567"


def make_run(results: Path, run_id: str, num_rounds: int, *, done: bool = False) -> Path:
    folder = results / run_id
    folder.mkdir(parents=True)
    rows = [
        {"round_index": i, "cohort": list(range(20)), "train_loss": 1.0, "accuracy": i / 100}
        for i in range(num_rounds)
    ]
    if num_rounds:
        rows[-1].pop("accuracy")  # not every round evaluates
    (folder / "run.json").write_text(json.dumps({"config": {"federation": {"num_rounds": 20}}}))
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if done:
        (folder / "DONE").touch()
    return folder


def one(results: Path, log: str | None, **run: object) -> RunStatus:
    """The status of a plan's only run, with this log."""
    results.mkdir(exist_ok=True)
    line = {"run_id": "r", "config": {"federation": {"num_rounds": 20}}}
    (results / f"{PLAN}.jsonl").write_text(json.dumps(line) + "\n")
    if log is not None:
        path = log_file(results, PLAN, 0)
        path.parent.mkdir()
        path.write_text(log)
    if run:
        make_run(results, "r", **run)  # type: ignore[arg-type]
    (status,) = read_status(results)
    return status


def test_states(tmp_path: Path) -> None:
    waiting = one(tmp_path / "a", None)
    assert (waiting.state, waiting.rounds_done, waiting.silent_seconds) == ("waiting", 0, None)
    assert one(tmp_path / "b", "preparing\n").state == "running"
    running = one(tmp_path / "c", "round 3/20\n", num_rounds=3)
    assert (running.state, running.rounds_done, running.num_rounds) == ("running", 3, 20)
    assert running.accuracy == pytest.approx(0.01)
    done = one(tmp_path / "d", "done\n", num_rounds=20, done=True)
    assert (done.state, done.rounds_done) == ("done", 20)


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("preparing\nfedara: no such folder\n" + exit_line(2), "no such folder (exit code 2)"),
        (
            "Traceback:\n  x\nMemoryError: out\nworld_rank 1 failed\n" + exit_line(1),
            "MemoryError: out (exit code 1)",
        ),
        ("preparing\nKilled\n" + exit_line(137), "Killed (exit code 137)"),
        (exit_line(9), "(exit code 9)"),
        (
            "round 1\nslurmstepd: error: *** JOB 7 ON n1 CANCELLED AT now DUE TO TIME LIMIT ***\n",
            "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT now DUE TO TIME LIMIT ***",
        ),
        (
            "fedara: exit code 1\nsecond try\nfedara: lr = 0\n" + exit_line(2),
            "lr = 0 (exit code 2)",
        ),
    ],
)
def test_a_failure_says_why(tmp_path: Path, log: str, reason: str) -> None:
    status = one(tmp_path, log, num_rounds=2)
    assert (status.state, status.reason, status.rounds_done) == ("failed", reason, 2)


# Slurm 22.05's own words around a requeue and around a time limit.
REQUEUED = """\
slurmstepd-n1: error: *** STEP 10.0 ON n1 CANCELLED AT 2026-11-23T14:28:06 ***
round 3/30
fedara: interrupted after round 3 of 30 by SIGTERM; start again to resume
fedara: job 10_2 is requeued
slurmstepd-n1: error: *** JOB 10 ON n1 CANCELLED AT 2026-11-23T14:28:07 DUE TO JOB REQUEUE ***
srun: got SIGCONT
srun: error: n1: task 0: Terminated
srun: Force Terminated StepId=10.0
"""
TIME_LIMIT = """\
slurmstepd-n1: error: *** JOB 4 ON n1 CANCELLED AT 2026-11-23T14:32:16 DUE TO TIME LIMIT ***
srun: Job step aborted: Waiting up to 32 seconds for job step to finish.
srun: error: n1: task 0: Killed
"""


@pytest.mark.parametrize("end", ["", exit_line(143)])
def test_a_requeued_run_has_not_failed(tmp_path: Path, end: str) -> None:
    status = one(tmp_path, REQUEUED + end, num_rounds=3)
    assert (status.state, status.reason) == ("interrupted", "job 10_2 is requeued")
    again = one(tmp_path / "again", REQUEUED + end + "preparing\n")
    assert again.state == "running"
    again = one(tmp_path / "lost", REQUEUED + end + "preparing\nfedara: no room\n" + exit_line(1))
    assert (again.state, again.reason) == ("failed", "no room (exit code 1)")


@pytest.mark.parametrize("end", ["", exit_line(137)])
def test_a_time_limit_is_named_whatever_slurm_says_after_it(tmp_path: Path, end: str) -> None:
    status = one(tmp_path, TIME_LIMIT + end, num_rounds=3)
    assert status.state == "failed"
    assert "DUE TO TIME LIMIT ***" in status.reason


def test_a_step_that_got_a_signal_still_runs(tmp_path: Path) -> None:
    (first, *_) = REQUEUED.splitlines(keepends=True)
    assert one(tmp_path, "round 2\n" + first).state == "running"


def test_a_run_that_will_go_on_has_not_failed(tmp_path: Path) -> None:
    status = one(tmp_path, "fedara: interrupted after round 3\n" + exit_line(75), num_rounds=3)
    assert (status.state, status.reason) == ("interrupted", "interrupted after round 3")


def test_a_run_without_a_log_runs_as_long_as_it_holds_its_folder(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "alone", 3)
    assert [run.state for run in read_status(tmp_path)] == ["interrupted"]
    (folder / "LOCK").write_text("{}")
    assert [run.state for run in read_status(tmp_path)] == ["running"]


# ---- runs whose process or job is gone ----


def started(pid: int = 2**22 + 1, host: str = "") -> str:
    return f"fedara: started as process {pid} on host {host or socket.gethostname()}\n"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Slurm that has jobs 41_1 and 50; each question is a line in the file `asked`."""
    folder = put_first(tmp_path / "bin", monkeypatch)
    stand_in(folder, "squeue", f'echo "$@" >> {folder}/asked\nprintf "41_1\\n50\\n"')
    return folder


def test_a_killed_run_has_died(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from bench.run.lock import locked\n"
        "with locked(Path(sys.argv[1])):\n    os.kill(os.getpid(), 9)"
    )
    folder = make_run(tmp_path, "alone", 3)
    subprocess.run([sys.executable, "-c", code, str(folder)], check=False, env=environment())
    pid = json.loads((folder / "LOCK").read_text())["pid"]
    (status,) = read_status(tmp_path)
    assert (status.state, status.rounds_done) == ("died", 3)
    assert status.reason.startswith(f"process {pid} on host {socket.gethostname()} is gone; ")
    (make_run(tmp_path / "b", "alone", 20, done=True) / "LOCK").write_text(
        (folder / "LOCK").read_text()
    )
    assert [run.state for run in read_status(tmp_path / "b")] == ["done"]


def test_a_run_that_holds_its_folder_has_not_died(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "alone", 3)
    with locked(folder):
        assert [run.state for run in read_status(tmp_path)] == ["running"]


@pytest.mark.parametrize(
    ("job_id", "state"), [("50", "running"), ("41_1", "running"), ("41", "died"), ("41_11", "died")]
)
def test_of_a_run_on_another_host_slurm_knows(
    tmp_path: Path, slurm: Path, job_id: str, state: str
) -> None:
    results = tmp_path / "out"
    for name in ("a", "b", "c"):
        holder = {"host": "node7", "pid": 4711, "job_id": job_id}
        (make_run(results, name, 2) / "LOCK").write_text(json.dumps(holder))
    runs = read_status(results)
    assert [run.state for run in runs] == [state] * 3
    assert state == "running" or f"Slurm job {job_id} is gone" in runs[0].reason
    assert len((slurm / "asked").read_text().splitlines()) == 1  # once for all


@pytest.mark.parametrize(
    ("log", "state", "named"),
    [
        (started(), "died", "process 4194305 on host"),
        (started(os.getpid()), "running", ""),
        (started(host="node7"), "running", ""),
        ("fedara: started as Slurm job 41_0\n", "died", "Slurm job 41_0"),
        ("fedara: started as Slurm job 41_1\n", "running", ""),
        ("fedara: started as Slurm job 40_1\n" + exit_line(1), "failed", ""),
        (started() + exit_line(1) + started(os.getpid()), "running", ""),
        ("fedara: started as Slurm job 41_1\nx\n" + started() + "y\n" * 9000, "died", "process"),
    ],
    ids=range(8),  # the same in every process of xdist: the texts hold its process id
)
def test_a_log_says_what_a_run_without_a_lock_was_started_as(
    tmp_path: Path, slurm: Path, log: str, state: str, named: str
) -> None:
    status = one(tmp_path / "out", log, num_rounds=2)
    assert status.state == state
    assert named in status.reason


def test_what_started_a_run_is_not_why_it_failed(tmp_path: Path) -> None:
    assert one(tmp_path, started() + exit_line(9)).reason == "(exit code 9)"


@pytest.mark.parametrize("squeue", ["sleep 60", "echo slurmctld is down >&2; exit 1"])
def test_a_slurm_that_does_not_answer_leaves_runs_running(
    tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch, squeue: str
) -> None:
    monkeypatch.setattr("bench.ask.ask.__kwdefaults__", {"seconds": 0.5})
    stand_in(slurm, "squeue", squeue)
    for name in ("a", "b"):
        folder = make_run(tmp_path / "out", name, 2)
        (folder / "LOCK").write_text(json.dumps({"host": "n7", "pid": 1, "job_id": "31"}))
    said = CliRunner().invoke(app, ["status", str(tmp_path / "out")])
    assert said.exit_code == 0, said.output
    assert "2 runs: 2 running, 0 failed, 0 died" in said.stdout
    reason = "no answer in 0.5 s" if "sleep" in squeue else "slurmctld is down"
    assert "whether Slurm's jobs still run is unknown: " in said.stdout
    assert reason in said.stdout


def test_a_job_of_somebody_else_is_not_said_to_be_gone(tmp_path: Path, slurm: Path) -> None:
    """Sites hide the jobs of other users."""
    assert Queue().is_over("31", os.getuid())
    assert not Queue().is_over("31", os.getuid() + 1)
    assert not Queue().is_over("50", os.getuid())


@pytest.mark.parametrize("name", ["[bold]x[/bold]", "[/red]", "a:b:c"])
def test_names_are_shown_as_they_are(tmp_path: Path, name: str) -> None:
    results = tmp_path / "out"
    folder = results / name.replace("/", "_")
    make_run(results, folder.name, 2)
    (folder / "LOCK").write_text(json.dumps({"host": socket.gethostname(), "pid": name}))
    said = CliRunner().invoke(app, ["status", str(results)], env={"COLUMNS": "200"})
    assert said.exit_code == 0, said.output
    assert re.search(rf"^{re.escape(folder.name)} +died ", said.stdout, re.MULTILINE)
    assert f"\n{folder.name}: " in said.stdout
    assert f"process {name} on host" in said.stdout


@pytest.mark.parametrize(
    ("rounds", "said"),
    [
        (None, "rounds.jsonl: holds 0 of 20 rounds"),
        ("", "rounds.jsonl: holds 0 of 20 rounds"),
        (7 * '{"round_index": 0}\n', "rounds.jsonl:2: round_index = 0; allowed: 0 to 19"),
        ('{"round_index": 0}\n[1]\n', "rounds.jsonl:2: round_index = None"),
    ],
)
def test_done_without_the_rounds_is_not_done(tmp_path: Path, rounds: str | None, said: str) -> None:
    folder = make_run(tmp_path, "alone", 20, done=True)
    (folder / "rounds.jsonl").unlink()
    if rounds is not None:
        (folder / "rounds.jsonl").write_text(rounds)
    (status,) = read_status(tmp_path)
    assert status.state == "failed"
    assert status.reason.startswith(f"DONE is there, but {said}")


def test_done_without_a_number_of_rounds_is_not_done(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "alone", 20, done=True)
    (folder / "run.json").write_text("{}")
    (status,) = read_status(tmp_path)
    assert (status.state, status.num_rounds) == ("failed", None)
    assert "run.json does not say how many rounds" in status.reason


def test_a_long_name_stays_on_one_line(tmp_path: Path) -> None:
    name = 240 * "n"
    make_run(tmp_path, name, 2)
    make_run(tmp_path, "short", 3)
    said = CliRunner().invoke(app, ["status", str(tmp_path)], env={"COLUMNS": "40"})
    lines = said.stdout.splitlines()
    assert [line.split() for line in lines[1:3]] == [
        [name, "interrupted", "2/20", "0.0", "0", "s", "ago"],
        ["short", "interrupted", "3/20", "1.0", "0", "s", "ago"],
    ]
    assert len(lines) == 4


@pytest.mark.parametrize("run_id", ["[]", "7", '""', '"a/b"', '"\\u0000"', f'"{300 * "x"}"'])
def test_a_plan_whose_run_has_no_name_is_refused(tmp_path: Path, run_id: str) -> None:
    (tmp_path / f"{PLAN}.jsonl").write_text(f'{{"run_id": {run_id}}}\n')
    with pytest.raises(InputError, match="line 0 is damaged"):
        read_status(tmp_path)


@pytest.mark.parametrize("file", ["run.json", "rounds.jsonl", "LOCK"])
def test_a_folder_in_place_of_a_file_is_no_traceback(tmp_path: Path, file: str) -> None:
    folder = make_run(tmp_path, "alone", 3)
    (folder / file).unlink(missing_ok=True)
    (folder / file).mkdir()
    assert [run.run_id for run in read_status(tmp_path)] == ["alone"]


@pytest.mark.parametrize("file", ["run.json", "rounds.jsonl", "LOCK"])
@pytest.mark.parametrize("damage", [b"", b"\xff\x00{", b"[1, 2]\n", b'{"round_index": "x"}\n'])
def test_a_damaged_file_is_no_traceback(tmp_path: Path, file: str, damage: bytes) -> None:
    folder = make_run(tmp_path, "alone", 3)
    (folder / file).write_bytes(damage)
    (status,) = read_status(tmp_path)
    assert status.run_id == "alone"


def test_a_run_that_was_started_again_has_not_failed(tmp_path: Path) -> None:
    assert one(tmp_path, exit_line(1) + "preparing\n").state == "running"


def test_a_run_that_is_done_has_not_failed(tmp_path: Path) -> None:
    status = one(tmp_path, exit_line(138), num_rounds=20, done=True)
    assert (status.state, status.reason) == ("done", "")


def test_a_last_line_that_was_cut_off_is_no_round(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "alone", 3)
    with (folder / "rounds.jsonl").open("a") as file:
        file.write('{"round_index": 3, "accu')
    (status,) = read_status(tmp_path)
    assert (status.run_id, status.rounds_done, status.num_rounds) == ("alone", 3, 20)


def test_the_newest_log_of_two_plans_counts(tmp_path: Path) -> None:
    one(tmp_path, exit_line(1))
    (tmp_path / "plan-demo-9.jsonl").write_text((tmp_path / f"{PLAN}.jsonl").read_text())
    newer = log_file(tmp_path, "plan-demo-9", 0)
    newer.write_text("round 1\n")
    os.utime(newer, (time.time() + 9, time.time() + 9))
    (status,) = read_status(tmp_path)
    assert status.state == "running"


def test_folders_with_nothing_to_tell_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        read_status(tmp_path / "missing")
    with pytest.raises(InputError, match="no plan and no record"):
        read_status(tmp_path)
    (tmp_path / f"{PLAN}.jsonl").write_text("{")
    with pytest.raises(InputError, match="line 0 is damaged"):
        read_status(tmp_path)


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    one(tmp_path / "out", "fedara: bad data\n" + exit_line(2), num_rounds=2)
    code = (
        "import sys; from bench.cli import app\n"
        "app(['status', sys.argv[1]], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'pandas', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert "r: bad data (exit code 2)" in done.stdout
    assert "1 runs: 0 running, 1 failed, 0 died, 0 interrupted, 0 waiting, 0 done" in done.stdout


def make_plan_of_200(folder: Path) -> Plan:
    config = folder / "big.toml"
    seeds = ", ".join(map(str, range(200)))
    config.write_text(f"{TINY.read_text()}\n[sweep]\nseed = [{seeds}]\n")
    return make_plan(config, folder / "out", ["federation.num_rounds=20"])


def test_200_runs_in_two_seconds(tmp_path: Path) -> None:
    plan = make_plan_of_200(tmp_path)
    plan.write()
    for index, run in enumerate(plan.runs):
        make_run(plan.results, run.run_id, 20, done=index % 2 == 0)
        plan.log(index).write_text("round\n" * 500)
    seconds = []
    for _ in range(2):  # the better of two: the machine may be busy
        start = time.process_time()
        runs = read_status(plan.results)
        seconds.append(time.process_time() - start)
    assert [run.state for run in runs] == ["done", "running"] * 100
    assert min(seconds) < 2
