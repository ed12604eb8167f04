"""In words: the commit of a run, and the machine that it ran on."""

import json
import shlex
from collections.abc import Iterable
from typing import Any

import pandas as pd


def joined(run_ids: Iterable[str]) -> str:
    """The run ids behind a number, in one cell of a CSV file; for DataFrame.agg.

    One blank between; an id with a blank of its own stands in quotes, as in a shell.
    """
    return shlex.join(sorted(set(run_ids)))


def split(run_ids: str) -> list[str]:
    """The run ids that `joined` made one text of."""
    return shlex.split(run_ids)


def commit(run: pd.Series | dict[str, Any]) -> str:
    """The commit of a row of Campaign.runs or of a run.json; "" if unknown."""
    name = run.get("git_commit")
    if not isinstance(name, str):
        return ""
    return name[:12] + (" with uncommitted changes" if run.get("git_dirty") is True else "")


def hardware(run: pd.Series) -> str:
    """What seconds depend on: CPU, GPU, device, processes and their threads."""
    processes = _processes(run)
    threads = sorted({process["threads"] for process in processes if "threads" in process})
    parts = [
        *(run.get(name) for name in ("cpu", "gpu", "device")),
        f"{len(processes)} {run.get('comm', '')} processes",
        f"threads {' or '.join(map(str, threads))}" if threads else None,
    ]
    return ", ".join(part for part in parts if isinstance(part, str))


def machine(run: pd.Series) -> str:
    """The hardware and the names of the hosts."""
    hosts = sorted({process.get("host", "") for process in _processes(run)} - {""})
    return ", ".join([hardware(run), *hosts])


def _processes(run: pd.Series) -> list[dict[str, Any]]:
    text = run.get("processes")
    return json.loads(text) if isinstance(text, str) else []
