"""The record of one launch of a micro-benchmark: run.json, rows.jsonl and, written last, DONE."""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.run.checkpoint import write_atomically
from bench.run.provenance import SCHEMA_VERSION, library_fact, process_facts, surroundings, utc_now
from bench.run.record import append_row, write_json
from fedara_core.comm.comm import Communicator, together
from fedara_core.errors import InputError

# What chooses the transport, and with it the time: kept with the record.
_TRANSPORT_KEYS = (
    *("MPIR_CVAR_", "UCX_", "FI_", "GLOO_", "NCCL_", "I_MPI_"),
    *("OMPI_MCA_pml", "OMPI_MCA_mtl", "OMPI_MCA_btl", "OMPI_MCA_coll"),
)


class MicroRecord:
    """All processes make it and call it; world_rank 0 writes. Raises InputError on all of them."""

    def __init__(
        self,
        benchmark: str,
        settings: Any,
        results: Path,
        communicator: Communicator,
        facts: Mapping[str, Any],
    ) -> None:
        """settings: a dataclass; facts: more keys of run.json."""
        self._communicator = communicator
        self._start = time.perf_counter()
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        stamp = communicator.broadcast(stamp.encode()).decode()  # world_rank 0's clock
        name = f"{benchmark}-{communicator.kind}-p{communicator.world_size}-{stamp}"
        self.run_dir = results / name
        run = {
            "schema_version": SCHEMA_VERSION,
            "benchmark": benchmark,
            "run_id": name,
            "config": asdict(settings),
            **_shared_facts(communicator),
            **facts,
        }
        together(communicator, lambda: self._write_start(run))

    def _write_start(self, run: Mapping[str, Any]) -> None:
        if self._communicator.world_rank != 0:
            return
        try:
            self.run_dir.mkdir(parents=True)
            write_atomically(self.run_dir / "rows.jsonl", b"")
            write_json(self.run_dir / "run.json", run)
        except OSError as error:
            raise InputError(
                f"--results {self.run_dir.parent}: {error.strerror}; allowed: a folder that can be "
                "written to"
            ) from None

    def add(self, row: Mapping[str, Any]) -> None:
        """Append one row."""
        if self._communicator.world_rank == 0:
            append_row(self.run_dir / "rows.jsonl", row)

    def finish(self) -> None:
        """Complete run.json; write DONE."""
        if self._communicator.world_rank == 0:
            run = json.loads((self.run_dir / "run.json").read_text(encoding="utf-8"))
            end = {"end_time": utc_now(), "total_seconds": time.perf_counter() - self._start}
            write_json(self.run_dir / "run.json", {**run, **end})
            write_atomically(self.run_dir / "DONE", b"")


def _shared_facts(communicator: Communicator) -> dict[str, Any]:
    facts = json.dumps(process_facts(communicator.world_rank, torch.device("cpu")))
    processes = [json.loads(part) for part in communicator.gather_bytes(facts.encode())]
    transport = {k: v for k, v in sorted(os.environ.items()) if k.startswith(_TRANSPORT_KEYS)}
    return {
        **surroundings(),
        "comm": communicator.kind,
        **library_fact(communicator.kind, communicator.library),
        "transport_environment": transport,
        "world_size": communicator.world_size,
        "processes": processes,
    }


def slowest(seconds: list[float], communicator: Communicator) -> np.ndarray:
    """Each iteration's maximum over processes: (iterations,) float64."""
    gathered = communicator.gather_bytes(np.array(seconds).tobytes())
    longest: np.ndarray = np.stack([np.frombuffer(part) for part in gathered]).max(axis=0)
    return longest


def quantiles(seconds: np.ndarray) -> dict[str, Any]:
    """The keys of a row that say how long its iterations took."""
    return {
        "median_seconds": float(np.median(seconds)),
        "min_seconds": float(seconds.min()),
        "p95_seconds": float(np.quantile(seconds, 0.95)),
        "iteration_seconds": [float(f"{value:.6g}") for value in seconds],
    }


def numbers(option: str, text: str, low: float, high: float) -> tuple[float, ...]:
    """An option's numbers, separated by commas. Raises InputError."""
    try:
        found = tuple(float(word) for word in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(low <= number <= high for number in found):
        allowed = f"numbers from {low:g} to {high:g}, separated by commas"
        raise InputError(f"{option} {text!r}: allowed: {allowed}")
    return found


def names(option: str, text: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """An option's names, separated by commas. Raises InputError."""
    found = tuple(text.split(","))
    if not set(found) <= set(allowed):
        raise InputError(f"{option} {text!r}: allowed: {', '.join(allowed)}, separated by commas")
    return found
