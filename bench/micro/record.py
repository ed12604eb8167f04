"""The record of one launch of a micro-benchmark: run.json, rows.jsonl and, written last, DONE."""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from bench.output import console
from bench.run.checkpoint import write_atomically
from bench.run.provenance import library_fact, process_facts, surroundings, utc_now
from bench.run.record import append_row, write_json
from fedara_core.comm.base import Communicator
from fedara_core.comm.launch import together
from fedara_core.errors import InputError
from fedara_core.schema import SCHEMA_VERSION

Number = TypeVar("Number", int, float)
# Variables that choose the transport, and with it the time: part of the record.
_TRANSPORT_KEYS = (
    *("MPIR_CVAR_", "UCX_", "FI_", "GLOO_", "NCCL_", "I_MPI_"),
    *("OMPI_MCA_pml", "OMPI_MCA_mtl", "OMPI_MCA_btl", "OMPI_MCA_coll"),
)


def record_rows(
    benchmark: str,
    settings: Any,
    results: Path,
    communicator: Communicator,
    rows: Iterable[dict[str, Any]],
    describe: Callable[[dict[str, Any]], str],
    **facts: Any,
) -> None:
    """Record rows as they are measured, each with a line of progress from world_rank 0.

    Every process calls it. settings: a dataclass; rows: measures the next row when it is asked for,
    the same on every process; facts: more keys of run.json. Raises InputError on every process
    where the record's folder can not be made.
    """
    shown, start = progress(communicator), time.perf_counter()
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
    stamp = communicator.broadcast(stamp.encode()).decode()  # world_rank 0's clock
    name = f"{benchmark}-{communicator.kind}-p{communicator.world_size}-{stamp}"
    run_dir = results / name
    own = process_facts(communicator.world_rank, torch.device("cpu"))
    transport = {k: v for k, v in sorted(os.environ.items()) if k.startswith(_TRANSPORT_KEYS)}
    run = {
        "schema_version": SCHEMA_VERSION,
        "benchmark": benchmark,
        "run_id": name,
        "config": asdict(settings),
        **surroundings(),
        "comm": communicator.kind,
        **library_fact(communicator.kind, communicator.library),
        "transport_environment": transport,
        "world_size": communicator.world_size,
        "processes": communicator.gather_json(own),
        **facts,
    }
    writes = communicator.world_rank == 0
    together(communicator, lambda: _write_start(run_dir, run) if writes else None)
    for row in rows:
        shown.print(describe(row), soft_wrap=True)
        if writes:
            append_row(run_dir / "rows.jsonl", row)
    if writes:
        end = {"end_time": utc_now(), "total_seconds": time.perf_counter() - start}
        write_json(run_dir / "run.json", {**run, **end})
        write_atomically(run_dir / "DONE", b"")
    shown.print(f"done, records in {run_dir}", soft_wrap=True)


def progress(communicator: Communicator) -> Console:
    """Where world_rank 0 tells how far it is; the others are quiet."""
    return console(quiet=communicator.world_rank != 0)


def _write_start(run_dir: Path, run: Mapping[str, Any]) -> None:
    try:
        run_dir.mkdir(parents=True)
        write_atomically(run_dir / "rows.jsonl", b"")
        write_json(run_dir / "run.json", run)
    except OSError as error:
        raise InputError(
            f"--results {run_dir.parent}: {error.strerror}; allowed: a folder that can be written "
            "to"
        ) from None


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


def least(option: str, number: Number, low: float) -> Number:
    """An option's number, `low` or more. Raises InputError."""
    if not number >= low:  # NaN is refused too
        raise InputError(f"{option} {number}: allowed: {low:g} or more")
    return number
