"""The record of one launch of a micro-benchmark: run.json, rows.jsonl and, written last, DONE."""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from bench.run.checkpoint import write_atomically
from bench.run.provenance import library_fact, process_facts, surroundings, utc_now
from bench.run.record import append_row, write_json
from fedara_core.comm.base import Communicator
from fedara_core.comm.launch import together
from fedara_core.errors import InputError
from fedara_core.schema import SCHEMA_VERSION

# Variables that choose the transport, and with it the time: part of the record.
_TRANSPORT_KEYS = (
    *("MPIR_CVAR_", "UCX_", "FI_", "GLOO_", "NCCL_", "I_MPI_"),
    *("OMPI_MCA_pml", "OMPI_MCA_mtl", "OMPI_MCA_btl", "OMPI_MCA_coll"),
)


class MicroRecord:
    """Every process makes it and calls it; world_rank 0 writes.

    Raises InputError on every process where the folder can not be made.
    """

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


def record_rows(
    benchmark: str,
    settings: Any,
    results: Path,
    communicator: Communicator,
    rows: Iterable[dict[str, Any]],
    describe: Callable[[dict[str, Any]], str],
) -> Path:
    """Record rows as they are measured, each with a line of progress from world_rank 0.

    rows: measures the next row when it is asked for, the same on every process. Returns the
    record's folder (of world_rank 0).
    """
    console = Console(quiet=communicator.world_rank != 0, highlight=False, markup=False)
    record = MicroRecord(benchmark, settings, results, communicator, {})
    for row in rows:
        console.print(describe(row), soft_wrap=True)
        record.add(row)
    record.finish()
    console.print(f"done, records in {record.run_dir}", soft_wrap=True)
    return record.run_dir


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
