"""The launches of a micro-benchmark (run.json, rows.jsonl, DONE) as data frames."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.records import reader
from analysis.records.provenance import commit

# Columns that tell a reader where a launch ran.
LAUNCH = ["run_id", "backend", "world_size", "num_cores", "num_hosts", "commit", "cpu"]
_COLUMNS = [
    *("run_id", "backend", "world_size", "cpu", "num_cores", "num_hosts", "commit"),
    *("model", "measured_bytes_source"),
]


@dataclass(frozen=True, kw_only=True)
class Launches:
    """One micro-benchmark's records below a folder.

    launches: one row per finished launch: LAUNCH, model (where it is one setting) and
        measured_bytes_source. backend: the library, and how it was used.
    rows: the lines of all rows.jsonl, each with the columns of its launch.
    incomplete: folder names of the launches without DONE; they never enter a figure.
    damaged: likewise the launches with DONE whose files are damaged, each with the reason.
    """

    launches: pd.DataFrame
    rows: pd.DataFrame
    incomplete: list[str]
    damaged: list[str]


def load_launches(path: Path, benchmark: str, required: Sequence[str]) -> Launches | None:
    """Read all launches of a benchmark below `path`; None if there is none.

    required: keys that every row has. Raises InputError when a run id comes twice.
    """
    folders = reader.launch_folders(path, benchmark)
    if not folders:
        return None
    found = reader.read_finished(
        folders,
        lambda folder: reader.read_launch(folder, benchmark, required),
        lambda record: record.run["run_id"],
    )
    launches = [_launch(record.run) for record in found.records]
    rows = [
        launch | row
        for launch, record in zip(launches, found.records, strict=True)
        for row in record.rows
    ]
    return Launches(
        launches=pd.DataFrame(launches, columns=_COLUMNS),
        rows=pd.DataFrame(rows),
        incomplete=found.incomplete,
        damaged=found.damaged,
    )


def _launch(run: dict[str, Any]) -> dict[str, Any]:
    return {
        "run_id": run["run_id"],
        "backend": _backend(run),
        "world_size": run["world_size"],
        "cpu": run.get("cpu", "unknown CPU"),
        "num_cores": run.get("num_cores"),
        "num_hosts": len({process.get("host") for process in run.get("processes", [])}),
        "commit": commit(run) or "unknown",
        "model": run.get("config", {}).get("model"),
        "measured_bytes_source": run.get("measured_bytes_source", ""),
    }


def _backend(run: dict[str, Any]) -> str:
    """Such as "MPICH, mpi-node, UCX_TLS=tcp,self"; launches that differ in it are not mixed."""
    text = run.get(f"{run['comm'].removesuffix('-node')}_library", run["comm"])
    names = ("Open MPI", "MPICH", "Intel(R) MPI", "MVAPICH")
    name = next((known for known in names if known in text), text)
    transport = run.get("transport_environment", {})
    by_host = ["mpi-node"] if run["comm"] == "mpi-node" else []
    return ", ".join([name, *by_host, *(f"{k}={value}" for k, value in sorted(transport.items()))])
