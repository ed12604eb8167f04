"""The launches of a micro-benchmark (run.json, rows.jsonl, DONE) as data frames."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from analysis.records.micro import micro_folders, read_launches, read_rows


@dataclass(frozen=True, kw_only=True)
class Launches:
    """One micro-benchmark's records below a folder.

    launches: one row per finished launch, as in MicroCampaign, and model.
    rows: the lines of all rows.jsonl, each with the columns of its launch.
    incomplete: folder names of the launches without DONE; they never enter a table.
    """

    launches: pd.DataFrame
    rows: pd.DataFrame
    incomplete: list[str]


def load_launches(path: Path, benchmark: str, required: Sequence[str]) -> Launches | None:
    """Read all launches of a benchmark below `path`; None if there is none.

    required: keys that every row has. Raises AnalysisError for a damaged record.
    """
    folders = micro_folders(path, benchmark)
    if not folders:
        return None
    finished, incomplete = read_launches(folders, benchmark)
    launches, rows = [], []
    for folder, launch in finished.items():
        own = {key: value for key, value in launch.items() if key != "config"}
        own["model"] = launch["config"].get("model")
        launches.append(own)
        rows += [own | row for row in read_rows(folder / "rows.jsonl", list(required))]
    return Launches(launches=pd.DataFrame(launches), rows=pd.DataFrame(rows), incomplete=incomplete)
