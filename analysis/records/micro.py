"""Read the records of `fedara micro collectives` (run.json, rows.jsonl, DONE) into a data frame."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.records.campaign import SCHEMA_VERSION, AnalysisError, parse_json, read_text
from analysis.records.provenance import commit, joined

BENCHMARK = "micro-collectives"

# What launches of one kind share, and what one combination of one kind shares.
MACHINE = ["backend", "world_size"]
POINT = [*MACHINE, "call", "path", "codec", "payload_bytes", "density", "overlap", "num_clients"]
_SIZES = ["part_bytes", "union_bytes", "layout_bytes", "num_rows", "model_bytes"]
_BYTES = ["counted_bytes_received", "measured_bytes"]
_TIMES = ["median_seconds", "bare_median_seconds", "ratio", "sizes_first_ratio"]
_REQUIRED = ["call", "payload_bytes", "num_clients", "median_seconds"]


@dataclass(frozen=True, kw_only=True)
class MicroCampaign:
    """The records below one folder.

    launches: one row per finished launch: run_id, backend (library, and how it was used),
        world_size, cpu, num_cores, num_hosts, commit, measured_bytes_source.
    points: one row per combination (POINT): medians over launches of median_seconds, the ratios
        and the bytes; min_seconds, max_seconds: the smallest and largest of the launches'
        median_seconds, min_ratio and max_ratio likewise; num_launches, run_ids.
    incomplete: folder names of the launches without DONE; they never enter a figure.
    """

    launches: pd.DataFrame
    points: pd.DataFrame
    incomplete: list[str]


def micro_folders(path: Path, benchmark: str = BENCHMARK) -> list[Path]:
    """Folders below `path` with a record of this benchmark, finished or not."""
    return sorted({file.parent for file in Path(path).rglob(f"{benchmark}-*/rows.jsonl")})


def load_micro(path: Path) -> MicroCampaign | None:
    """Read all records below `path`; None if there is none. Raises AnalysisError for a bad one."""
    folders = micro_folders(path)
    if not folders:
        return None
    finished, incomplete = read_launches(folders, BENCHMARK)
    rows = [
        {key: launch[key] for key in ("run_id", *MACHINE)} | row
        for folder, launch in finished.items()
        for row in read_rows(folder / "rows.jsonl", _REQUIRED)
    ]
    launches = [{k: v for k, v in launch.items() if k != "config"} for launch in finished.values()]
    return MicroCampaign(
        launches=pd.DataFrame(launches), points=_points(pd.DataFrame(rows)), incomplete=incomplete
    )


def read_launches(
    folders: list[Path], benchmark: str
) -> tuple[dict[Path, dict[str, Any]], list[str]]:
    """What `MicroCampaign.launches` has of each finished launch, and its `config`; the names of the
    folders without DONE. Raises AnalysisError for a bad one, and for one that comes twice."""
    finished: dict[Path, dict[str, Any]] = {}
    for folder in folders:
        if (folder / "DONE").exists():
            launch = _read_launch(folder / "run.json", benchmark)
            if any(launch["run_id"] == other["run_id"] for other in finished.values()):
                raise AnalysisError(f"launch {launch['run_id']} comes twice: {folder}")
            finished[folder] = launch
    return finished, [folder.name for folder in folders if folder not in finished]


def _read_launch(file: Path, benchmark: str) -> dict[str, Any]:
    run = parse_json(read_text(file), file, first_line=1)
    if run.get("schema_version") != SCHEMA_VERSION or run.get("benchmark") != benchmark:
        raise AnalysisError(f"{file}: no record of {benchmark} of schema {SCHEMA_VERSION}")
    missing = [key for key in ("run_id", "comm", "world_size") if key not in run]
    if missing:
        raise AnalysisError(f"{file}: missing {', '.join(missing)}")
    return {
        "run_id": run["run_id"],
        "backend": _backend(run),
        "world_size": run["world_size"],
        "cpu": run.get("cpu", "unknown CPU"),
        "num_cores": run.get("num_cores"),
        "num_hosts": len({process.get("host") for process in run.get("processes", [])}),
        "commit": commit(run) or "unknown",
        "config": run.get("config", {}),
        "measured_bytes_source": run.get("measured_bytes_source", ""),
    }


def _backend(run: dict[str, Any]) -> str:
    """Such as "MPICH", "gloo", "MPICH, mpi-node" or "MPICH, UCX_TLS=tcp,self": launches that differ
    are not mixed."""
    text = run.get(f"{run['comm'].removesuffix('-node')}_library", run["comm"])
    names = ("Open MPI", "MPICH", "Intel(R) MPI", "MVAPICH")
    name = next((known for known in names if known in text), text)
    told = run.get("transport_environment", {})
    by_host = ["mpi-node"] if run["comm"] == "mpi-node" else []
    return ", ".join([name, *by_host, *(f"{key}={value}" for key, value in sorted(told.items()))])


def read_rows(file: Path, required: list[str]) -> list[dict[str, Any]]:
    """A launch's rows. Raises AnalysisError, with the line, where a required key is missing."""
    rows = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        row = parse_json(line, file, first_line=number)
        missing = [key for key in required if key not in row]
        if missing:
            raise AnalysisError(f"{file}:{number}: missing {', '.join(missing)}")
        rows.append(row)
    return rows


def _points(rows: pd.DataFrame) -> pd.DataFrame:
    medians = [*_SIZES, *_BYTES, *_TIMES]
    rows = rows.reindex(columns=[*POINT, *medians, "run_id", "bare_call"])
    groups = rows.groupby(POINT, as_index=False, dropna=False)
    return groups.agg(
        num_launches=("run_id", "nunique"),
        run_ids=("run_id", joined),
        **{name: (name, "median") for name in medians},
        min_seconds=("median_seconds", "min"),
        max_seconds=("median_seconds", "max"),
        min_ratio=("ratio", "min"),
        max_ratio=("ratio", "max"),
        bare_call=("bare_call", "first"),
    )
