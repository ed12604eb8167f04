"""A process that fails ends the whole job soon and loudly, and the run can go on afterwards."""

import re
from pathlib import Path

import pytest

from support.launch import TINY, Finished, digests_in, fedara_here, launch

pytestmark = [pytest.mark.xdist_group("jobs"), pytest.mark.slow]

FAULT_JOB = Path(__file__).parent / "support" / "fault_job.py"
CONFIG = ("run", TINY, "--set", "federation.num_rounds=3", "--set", "train.local_steps=2")
LIMIT_SECONDS = 10


@pytest.fixture(scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The state digests of the rounds of the run without a fault."""
    results = tmp_path_factory.mktemp("whole")
    assert fedara_here(*CONFIG, "--results", results).code == 0
    return digests_in(results)


def job_with_fault(
    launcher: str, world_size: int, kind: str, world_rank: int, folder: Path, *more: str
) -> Finished:
    """Run the job; checks how soon it ended, with which code, and what it left on disk."""
    stamp, results = folder / "stamp", folder / "results"
    words = (FAULT_JOB, kind, world_rank, stamp, results, *CONFIG, *more, "--results", results)
    job = launch(launcher, world_size, *words)
    assert stamp.exists(), job.err
    assert job.end_time - float(stamp.read_text()) < LIMIT_SECONDS
    assert job.code != 0
    (run_dir,) = results.iterdir()
    assert (run_dir / "run.json").exists()
    assert not (run_dir / "DONE").exists()
    return job


def check_rerun(folder: Path, digests: list[str], num_rounds: int = 1) -> None:
    """So many rounds are there, and a rerun completes the run with the same bits."""
    results = folder / "results"
    assert digests_in(results) == digests[:num_rounds]
    assert fedara_here(*CONFIG, "--results", results).code == 0
    assert digests_in(results) == digests
    (run_dir,) = results.iterdir()
    assert (run_dir / "DONE").exists()


@pytest.mark.parametrize(("launcher", "world_size", "world_rank"), [("mpi", 3, 1), ("torch", 2, 0)])
def test_an_exception_ends_the_job(
    launcher: str, world_size: int, world_rank: int, tmp_path: Path, digests: list[str]
) -> None:
    job = job_with_fault(launcher, world_size, "raise", world_rank, tmp_path)
    assert f"world_rank {world_rank} failed" in job.err
    assert "Traceback (most recent call last)" in job.err
    assert "RuntimeError: injected" in job.err
    assert not job.refusals
    check_rerun(tmp_path, digests)


@pytest.mark.parametrize(("launcher", "world_size", "world_rank"), [("mpi", 3, 2), ("torch", 2, 1)])
def test_a_lost_process_ends_the_job(
    launcher: str, world_size: int, world_rank: int, tmp_path: Path, digests: list[str]
) -> None:
    job = job_with_fault(launcher, world_size, "SIGKILL", world_rank, tmp_path)
    # MPICH says it on stdout, Open MPI and torchrun on stderr.
    assert re.search(r"signal:? 9|SIGKILL", job.out + job.err, re.IGNORECASE), job.out + job.err
    check_rerun(tmp_path, digests)


@pytest.mark.parametrize(
    ("launcher", "world_size", "world_rank", "signal_name"),
    [("plain", 1, 0, "SIGTERM"), ("mpi", 3, 1, "SIGUSR1"), ("torch", 2, 0, "SIGTERM")],
)
def test_a_signal_to_one_process_ends_the_job_after_its_round(
    launcher: str,
    world_size: int,
    world_rank: int,
    signal_name: str,
    tmp_path: Path,
    digests: list[str],
) -> None:
    job = job_with_fault(launcher, world_size, signal_name, world_rank, tmp_path)
    assert job.code == (1 if launcher == "torch" else 75)  # torchrun's own
    (line,) = job.refusals
    assert f"interrupted after round 2 of 3 by {signal_name}; start again to resume" in line
    assert f"world_rank {world_rank} failed" not in job.err
    check_rerun(tmp_path, digests, num_rounds=2)


EXACT = ("--set", "method.name=fedara_exact")  # every process gets every client's own message


@pytest.mark.parametrize(
    ("kind", "method", "words"),
    [
        ("cut", EXACT, r"upload of client \d+ needs \d+ bytes of \d+|end inside a header"),
        ("header", (), "no upload starts at byte 0: 0x17"),
        ("short", (), r"uploads differ in length, .*by client_id: \{"),
        ("nothing", ("--set", "method.name=lora"), r"round 1: client \d+ sent no upload"),
        ("dropped", (), r"round 1: no upload came from clients \[\d+\]"),
    ],
)
def test_a_damaged_message_ends_the_job_and_is_named(
    kind: str, method: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    job = job_with_fault("mpi", 2, kind, 1, tmp_path, *method)
    assert "Traceback (most recent call last)" in job.err
    assert re.search(words, job.err), job.err
    assert len(digests_in(tmp_path / "results")) == 1  # the round before it


@pytest.mark.parametrize(
    "settings",
    [EXACT, ("--set", "codec.up=int8"), ("--set", "federation.merge_path=split")],
)
def test_values_that_are_no_numbers_are_refused(settings: tuple[str, ...], tmp_path: Path) -> None:
    job = job_with_fault("mpi", 2, "nan", 1, tmp_path, *settings)
    assert job.code == 2
    (line,) = job.refusals
    assert re.search(r"client \d+, round 1: training diverged", line)
