"""The launches of a micro-benchmark (run.json, rows.jsonl, DONE) as data frames."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.records import reader
from analysis.records.provenance import commit
from fedara_core.errors import InputError
from fedara_core.schema import ROWS_FILE, RUN_FILE

# Columns that tell a reader where a launch ran.
LAUNCH = ["run_id", "backend", "world_size", "num_cores", "num_hosts", "commit", "cpu"]


@dataclass(frozen=True, kw_only=True)
class Launches:
    """One micro-benchmark's records below a folder.

    launches: one row per finished launch: LAUNCH, model (where it is one setting) and
        measured_bytes_source. backend: the library, and how it was used.
    rows: the lines of all rows.jsonl, each with the columns of its launch.
    incomplete: folder names of the launches without DONE; they never enter a figure.
    """

    launches: pd.DataFrame
    rows: pd.DataFrame
    incomplete: list[str]


def load_launches(path: Path, benchmark: str, required: Sequence[str]) -> Launches | None:
    """Read all launches of a benchmark below `path`; None if there is none.

    required: keys that every row has. Raises InputError for a damaged record.
    """
    folders = reader.launch_folders(path, benchmark)
    if not folders:
        return None
    records, incomplete = reader.read_finished(folders)
    launches, rows = [], []
    for folder, run in records.items():
        if run.get("benchmark") != benchmark:
            raise InputError(f"{folder / RUN_FILE}: no record of {benchmark}")
        reader.require_keys(run, ("comm", "world_size"), str(folder / RUN_FILE))
        launches.append(launch := _launch(run))
        rows += [launch | row for row in reader.read_rows(folder / ROWS_FILE, required)]
    return Launches(launches=pd.DataFrame(launches), rows=pd.DataFrame(rows), incomplete=incomplete)


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
