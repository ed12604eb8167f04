"""What a record says about its origin: code, packages, machine, processes, job."""

import importlib.metadata
import os
import platform
import socket
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.ask import ask
from bench.config.schema import RunConfig
from fedara_core.schema import SCHEMA_VERSION

_PACKAGES = ("torch", "mpi4py", "mpich", "transformers", "tokenizers", "datasets", "numpy", "peft")
_SLURM_KEYS = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_NODELIST")


def provenance(config: RunConfig, **facts: Any) -> dict[str, Any]:
    """The keys of run.json that say what ran where; unknown ones are absent."""
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": config.run_id,
        "config": config.canonical(),
        "config_hash": config.config_hash,
        **_known({**surroundings(), **facts}),
    }


def surroundings() -> dict[str, Any]:
    """The keys that the records of all benchmarks share: code, versions, machine, start."""
    facts = {
        **_git(),
        "python": platform.python_version(),
        "package_versions": package_versions(),
        "cpu": cpu_name(),
        "num_cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "slurm": {key: os.environ[key] for key in _SLURM_KEYS if key in os.environ} or None,
        "start_time": utc_now(),
    }
    return _known(facts)


def _known(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if value is not None}


def library_fact(comm: str, library: str | None) -> dict[str, str]:
    """The key of run.json that names the library of a communication back end, if it has one."""
    return {f"{comm.removesuffix('-node')}_library": library} if library else {}


def process_facts(world_rank: int, device: torch.device) -> dict[str, Any]:
    """One entry of run.json's process map."""
    return {
        "world_rank": world_rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on."""
    versions = {}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def cpu_name() -> str | None:
    """The processor's name as Linux reports it."""
    names = _cpu_lines("model name")
    if names is None:
        return platform.processor() or None
    return names[0] if names else platform.machine()


def cpu_flags() -> set[str] | None:
    """What the processor can do, by Linux's names; None on other systems."""
    lines = _cpu_lines("flags", "Features")  # the second on ARM
    return None if lines is None else {flag for line in lines[:1] for flag in line.split()}


def _cpu_lines(*keys: str) -> list[str] | None:
    """The values of these keys, of each core; None where the platform does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    pairs = [line.partition(":") for line in lines]
    return [value.strip() for key, _, value in pairs if key.strip() in keys]


def _git() -> dict[str, Any]:
    """Commit and dirty flag of the checkout this code runs from; nothing for an installed copy."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return {}
    commit = ask("git", "-C", str(root), "rev-parse", "HEAD")
    changed = ask("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    if commit.returncode or changed.returncode:
        return {}
    return {"git_commit": commit.stdout.strip(), "git_dirty": bool(changed.stdout.strip())}


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
