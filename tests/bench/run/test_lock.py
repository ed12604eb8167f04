"""One job at a time on a run's folder; a lock that a dead job left is taken over."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bench.config.load import load_runs
from bench.jobs.slurm_job import requeue
from bench.run import lock
from bench.run.lock import FILE, is_dead, locked
from fedara_core.errors import InputError
from support.launch import TINY, fedara_here
from support.stand_in import put_first, stand_in

ELSEWHERE = {"host": "node7", "pid": 4711, "job_id": "31", "restarts": 0}


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.0)
    for key in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(key, raising=False)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for stand-ins of Slurm's commands, first on PATH."""
    return put_first(tmp_path / "bin", monkeypatch)


def test_the_second_job_is_refused_with_the_first_ones_host_and_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (config,) = load_runs(TINY, [])
    run_dir = tmp_path / config.run_id
    monkeypatch.setenv("SLURM_JOB_ID", "31")
    with locked(run_dir) as taken_over:
        assert taken_over == ""
        second = fedara_here("run", TINY, "--results", tmp_path)
    assert second.code == 2
    (line,) = second.refusals
    holder = f"process {os.getpid()} on host {socket.gethostname()}, Slurm job 31"
    assert f"{run_dir}: in use by {holder}; allowed: when that has ended" in line
    assert not (run_dir / "run.json").exists()
    assert not (run_dir / FILE).exists()  # nothing is left behind
    with locked(run_dir):
        pass


def test_a_killed_jobs_lock_is_taken_over(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from bench.run.lock import locked\n"
        "with locked(Path(sys.argv[1])):\n    os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    holder = json.loads((tmp_path / FILE).read_text())
    with locked(tmp_path) as taken_over:
        assert f"the job of process {holder['pid']} on host" in taken_over
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()


def test_a_file_system_without_locks_goes_by_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(descriptor: int, operation: int) -> None:
        raise OSError(lock.errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unable)
    with locked(tmp_path), pytest.raises(InputError, match="in use by process"), locked(tmp_path):
        pass
    gone = {"host": socket.gethostname(), "pid": 2**22 + 1}  # above the largest there can be
    tmp_path.mkdir(exist_ok=True)  # an empty folder goes with its lock
    (tmp_path / FILE).write_text(json.dumps(gone))
    with locked(tmp_path) as taken_over:
        assert f"process {gone['pid']}" in taken_over


@pytest.mark.parametrize(
    ("script", "free"),
    [
        ("echo RUNNING", False),
        ("exit 0", True),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", True),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", False),
    ],
)
def test_of_a_job_on_another_host_slurm_knows(
    script: str, free: bool, tmp_path: Path, slurm: Path
) -> None:
    stand_in(slurm, "squeue", script)
    (tmp_path / FILE).write_text(json.dumps(ELSEWHERE))
    if free:
        with locked(tmp_path) as taken_over:
            assert "process 4711 on host node7, Slurm job 31 is gone; taken over" in taken_over
    else:
        with pytest.raises(InputError, match="host node7, Slurm job 31"), locked(tmp_path):
            pass


def test_another_host_without_slurm_is_never_taken_over(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps({"host": "node7", "pid": 1}))
    with pytest.raises(InputError, match=rf"if it has, delete .*{FILE}"), locked(tmp_path):
        pass


def test_a_requeued_job_takes_over_its_own_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / FILE).write_text(json.dumps(ELSEWHERE))
    monkeypatch.setenv("SLURM_JOB_ID", "31")
    with pytest.raises(InputError, match="in use"), locked(tmp_path):
        pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with locked(tmp_path) as taken_over:
        assert taken_over


def test_requeue_asks_for_the_own_running_job_only(
    tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert requeue() == ""  # in no job
    monkeypatch.setenv("SLURM_JOB_ID", "31")
    stand_in(slurm, "squeue", "echo RUNNING")
    stand_in(slurm, "scontrol", f'echo "$@" >> {tmp_path}/asked')
    assert requeue() == "job 31 is requeued"
    assert (tmp_path / "asked").read_text() == "requeue 31\n"
    stand_in(slurm, "squeue", "echo CANCELLED")
    assert requeue() == "job 31 is not requeued: its state is CANCELLED"
    stand_in(slurm, "squeue", "echo RUNNING")
    stand_in(slurm, "scontrol", "echo 'Requested operation is presently disabled' >&2; exit 1")
    assert requeue() == "job 31 is not requeued: Requested operation is presently disabled"


def test_a_squeue_that_does_not_answer_is_named(
    tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.ask.ask.__kwdefaults__", {"seconds": 0.5})
    stand_in(slurm, "squeue", "sleep 60")
    (tmp_path / FILE).write_text(json.dumps(ELSEWHERE))
    with pytest.raises(InputError) as caught, locked(tmp_path):
        pass
    assert "in use by process 4711 on host node7, Slurm job 31" in str(caught.value)
    assert "whether that job has ended is unknown: squeue: no answer in 0.5 s" in str(caught.value)


def test_a_squeue_that_does_not_answer_does_not_hang_a_requeue(
    tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.ask.ask.__kwdefaults__", {"seconds": 0.5})
    monkeypatch.setenv("SLURM_JOB_ID", "31")
    stand_in(slurm, "scontrol", "sleep 60")
    stand_in(slurm, "squeue", "sleep 60")
    assert requeue() == "job 31 is not requeued: its state is squeue: no answer in 0.5 s"
    stand_in(slurm, "squeue", "echo RUNNING")
    assert requeue() == "job 31 is not requeued: scontrol: no answer in 0.5 s"


def test_a_full_disk_leaves_no_empty_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: bytes, offset: int) -> int:
        raise OSError(lock.errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(OSError, match="No space"), locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "run" / FILE).exists()


# ---- whether a lock's job is dead, without taking the lock ----


def dead(path: Path, *over: str) -> tuple[bool, str]:
    """What is_dead says if Slurm has these jobs no more."""
    return is_dead(path / FILE, lambda number, owner: owner == os.getuid() and number in over)


def test_a_lock_that_is_held_is_not_dead(tmp_path: Path) -> None:
    with locked(tmp_path):
        gone, name = dead(tmp_path)
        assert (gone, name) == (False, f"process {os.getpid()} on host {socket.gethostname()}")
        with pytest.raises(InputError, match="in use"), locked(tmp_path):
            pass  # looking has not freed it
    assert dead(tmp_path) == (False, "")  # no file


def test_a_lock_of_a_process_that_is_gone_is_dead(tmp_path: Path) -> None:
    """Whatever process has its id today: the kernel has released the lock."""
    (tmp_path / FILE).write_text(json.dumps({"host": socket.gethostname(), "pid": 1}))
    assert dead(tmp_path) == (True, f"process 1 on host {socket.gethostname()}")
    assert (tmp_path / FILE).exists()


@pytest.mark.parametrize(("over", "gone"), [((), False), (("31",), True), (("30", "32"), False)])
def test_a_lock_of_another_host_is_dead_when_slurm_says_so(
    tmp_path: Path, over: tuple[str, ...], gone: bool
) -> None:
    (tmp_path / FILE).write_text(json.dumps(ELSEWHERE))
    assert dead(tmp_path, *over) == (gone, "process 4711 on host node7, Slurm job 31")


@pytest.mark.parametrize("text", ["", "{}", "[1]", "\x00\xff", '{"host": "node7", "pid": 4711}'])
def test_of_a_lock_that_says_nothing_nothing_is_known(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text, encoding="latin-1")
    assert not dead(tmp_path, "31")[0]
