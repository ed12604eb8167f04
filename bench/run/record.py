"""Records: run.json, rounds.jsonl, partition.json and, written last, DONE. world_rank 0 writes."""

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.config.schema import RunConfig
from bench.metering.codecarbon import add_parts
from bench.run.checkpoint import write_atomically
from fedara_core.schema import SCHEMA_VERSION

_PACKAGES = ("torch", "mpi4py", "mpich", "transformers", "tokenizers", "datasets", "numpy", "peft")
_PART_KEYS = (
    *("start_time", "git_commit", "git_dirty", "package_versions"),
    *("comm", "world_size", "processes", "prepare_seconds", "slurm"),
)
_SLURM_KEYS = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_NODELIST")


class Recorder:
    """Writes one run's files. A directory without DONE is an incomplete run."""

    def __init__(self, results: Path, config: RunConfig) -> None:
        self.run_dir = results / config.run_id

    @property
    def done(self) -> bool:
        return (self.run_dir / "DONE").exists()

    def rounds(self) -> list[dict[str, Any]]:
        """The rounds recorded so far; a last line that was cut off is left out."""
        path = self.run_dir / "rounds.jsonl"
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]  # a whole line ends with a newline

    def start(
        self,
        run: Mapping[str, Any],
        partition: list[dict[str, Any]],
        kept_rounds: list[dict[str, Any]],
    ) -> None:
        """Write run.json and partition.json, and rounds.jsonl with the rounds that are kept.

        A run that goes on keeps the run.json of its first part; later parts are listed in `parts`.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if kept_rounds:
            first = self._run()
            part = {key: run[key] for key in _PART_KEYS if key in run}
            part["first_round_index"] = len(kept_rounds)
            run = {**first, "parts": [*first.get("parts", []), part]}
        write_json(self.run_dir / "run.json", run)
        write_json(self.run_dir / "partition.json", partition)
        text = "".join(_line(row) for row in kept_rounds)
        write_atomically(self.run_dir / "rounds.jsonl", text.encode())

    def add_round(self, row: Mapping[str, Any]) -> None:
        """Append one round and flush it to disk."""
        append_row(self.run_dir / "rounds.jsonl", row)

    def end_part(self, first_round_index: int, energy: Mapping[str, Any]) -> None:
        """Note what a part of the run took, if that is known."""
        if not energy:
            return
        run = self._run()
        part = {"first_round_index": first_round_index, **energy}
        write_json(
            self.run_dir / "run.json",
            {**run, "energy_parts": [*run.get("energy_parts", []), part]},
        )

    def finish(self, facts: Mapping[str, Any] | None = None) -> None:
        """Complete run.json, write DONE last. The checkpoint stays: it holds what was trained.

        facts: more keys, energy_missing among them if the last part's energy is not known.
        """
        total_seconds = sum(row["seconds"]["total"] for row in self.rounds())
        run = self._run()
        energy = _energy(run) or {"energy_missing": "not known of every part of the run"}
        end = {"end_time": utc_now(), "total_seconds": total_seconds, **energy, **(facts or {})}
        write_json(self.run_dir / "run.json", {**run, **end})
        write_atomically(self.run_dir / "DONE", b"")

    def _run(self) -> dict[str, Any]:
        run: dict[str, Any] = json.loads((self.run_dir / "run.json").read_text(encoding="utf-8"))
        return run


def write_json(path: Path, content: Any) -> None:
    """Replace the file by `content` as indented JSON."""
    text = json.dumps(content, indent=2, ensure_ascii=True, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON object as a line and flush it to disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(row))
        file.flush()
        os.fsync(file.fileno())


def _energy(run: Mapping[str, Any]) -> dict[str, Any]:
    """The sum of the parts' energy; nothing if a part's is not known."""
    parts = run.get("energy_parts", [])
    return add_parts(parts) if len(parts) == 1 + len(run.get("parts", [])) else {}


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=True, allow_nan=False) + "\n"


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def provenance(config: RunConfig, **facts: Any) -> dict[str, Any]:
    """The keys of run.json that say what ran and on what; unknown ones are absent."""
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": config.run_id,
        "config": config.canonical(),
        "config_hash": config.config_hash,
        **_known({**surroundings(), **facts}),
    }


def surroundings() -> dict[str, Any]:
    """The keys of run.json that every benchmark shares: code, versions, machine, start."""
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
    """The key of run.json that says what moves the bytes of this back end, if anything does."""
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
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def cpu_name() -> str | None:
    """The processor's name as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git() -> dict[str, Any]:
    """Commit and dirty flag of the checkout this code runs from; nothing for an installed copy."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return {}
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"git_commit": commit, "git_dirty": bool(changed)}
