"""Communicators on several process counts (comm_check.py), and how a launcher is recognised."""

from typing import Any

import psutil
import pytest

from fedara_core.comm import launch as comm_launch
from fedara_core.comm.base import Communicator
from fedara_core.comm.launch import detect, open_communicator
from fedara_core.errors import InputError
from support.comm_check import CASES
from support.launch import COMM_CHECK, checked, launch

pytestmark = pytest.mark.xdist_group("jobs")

MORE_JOBS = [("mpi", 1), ("mpi", 3), ("mpi", 4), ("torch", 3)]
JOBS = [
    *(("plain", 1), ("mpi", 2), ("torch", 2)),
    *(pytest.param(*job, marks=pytest.mark.slow) for job in MORE_JOBS),
]


@pytest.mark.parametrize(("launcher", "world_size"), JOBS)
def test_every_process_passes_the_check(launcher: str, world_size: int) -> None:
    """On MPI also with two processes a host, of hosts that one machine plays: the same messages
    arrive, with --comm mpi and mpi-node, and the network's bytes are known."""
    job = checked(launcher, world_size)
    assert job.code == 0, job.err
    for name in CASES["serial" if launcher == "plain" else launcher]:
        assert job.out.splitlines().count(f"OK {name}") == world_size, job.out


@pytest.mark.slow
def test_messages_beyond_2_to_the_31_bytes() -> None:
    available = psutil.virtual_memory().available
    if available < 14e9:
        pytest.skip(f"needs 14 GB of free memory, has {available / 1e9:.0f}")
    job = launch("mpi", 2, COMM_CHECK, "large")
    assert job.code == 0, job.err
    assert job.out.splitlines().count("OK large") == 2, job.out


@pytest.mark.parametrize(
    ("environ", "kind"),
    [
        ({}, "serial"),
        ({"PMI_RANK": "1", "PMI_SIZE": "3"}, "mpi"),  # hydra (MPICH, Intel MPI); srun --mpi=pmi2
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, "mpi"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpi"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, "mpi"),  # srun
        (
            {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"},
            "serial",
        ),  # sbatch
        ({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "5"}, "serial"),  # salloc's shell
        ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}, "torch"),
        ({"TORCHELASTIC_RUN_ID": "none", "SLURM_STEP_NUM_TASKS": "2"}, "torch"),  # srun torchrun
        ({"WORLD_SIZE": "2", "RANK": "0"}, "serial"),  # not torchrun's own mark
    ],
)
def test_the_launcher_is_recognised(environ: dict[str, str], kind: str) -> None:
    assert detect(environ) == kind


def test_no_back_end_is_loaded_before_it_is_asked_for() -> None:
    """Without MPI's library, and on a login node where it can not start, serial runs work."""
    code = (
        "import sys; from fedara_core.comm.launch import open_communicator\n"
        "open_communicator('serial', {})\n"
        "assert 'mpi4py' not in sys.modules"
    )
    job = launch("plain", 1, "-c", code)
    assert job.code == 0, job.err


def test_one_process_without_a_launcher_is_serial() -> None:
    for kind in ("auto", "serial"):
        communicator = open_communicator(kind, {})
        assert (communicator.kind, communicator.world_rank, communicator.world_size) == (
            "serial",
            0,
            1,
        )


@pytest.mark.parametrize(
    ("environ", "chosen"),
    [({"PMI_SIZE": "3"}, "Mpi"), ({"TORCHELASTIC_RUN_ID": "x"}, "Torch")],
)
def test_auto_opens_what_was_detected(
    environ: dict[str, str], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("Mpi", "Torch"):
        monkeypatch.setitem(comm_launch.BACK_ENDS, name.lower(), fake(name, world_size=3))
    assert open_communicator("auto", environ).kind == chosen


@pytest.mark.parametrize(
    ("kind", "environ", "words"),
    [
        ("nonsense", {}, ["'nonsense'", "auto, serial, mpi, mpi-node, torch"]),
        ("serial", {"PMI_SIZE": "3"}, ["3 processes", "--comm mpi"]),
        ("serial", {"SLURM_STEP_NUM_TASKS": "2"}, ["2 processes", "--comm mpi"]),
        ("serial", {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}, ["2 processes", "torch"]),
        ("mpi", {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}, ["MPI sees 1", "--comm torch"]),
        ("auto", {"OMPI_COMM_WORLD_SIZE": "4"}, ["4 processes", "MPI sees 1", "mpiexec"]),
        ("mpi", {"SLURM_STEP_NUM_TASKS": "4"}, ["4 processes", "MPI sees 1", "srun --mpi"]),
        ("torch", {}, ["MASTER_ADDR", "torchrun"]),
    ],
)
def test_refusals_say_what_is_allowed(
    kind: str, environ: dict[str, str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(comm_launch.BACK_ENDS, "mpi", fake("Mpi", world_size=1))
    for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    with pytest.raises(InputError) as caught:
        open_communicator(kind, environ)
    assert all(word in str(caught.value) for word in words), caught.value


def fake(name: str, *, world_size: int) -> Any:
    """A stand-in for a communicator class."""

    def build(*_: object) -> Communicator:
        communicator = Communicator()
        communicator.kind, communicator.world_size = name, world_size
        return communicator

    return build
