"""report.html: figures, tables, gaps and where each came from, in one file without network."""

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from analysis.records import caveats
from analysis.records.campaign import Campaign
from analysis.records.launches import LAUNCH
from analysis.records.per_run import per_run
from analysis.records.provenance import commit, machine, split
from analysis.tables.render import Table, rounded

NAME = "report.html"
_TEMPLATE = Path(__file__).with_name("page.html.j2")
_SCALE = 0.6  # CSS pixels per pixel of a figure: its text is as large as the page's tables
_NUMBER = re.compile(r"[-+]?[\d.]+( %|x)?( to [-+]?[\d.]+)?( \*)?")  # *: a mark
_FILTERS = ["method", "dataset", "seed"]


def write(
    campaign: Campaign | None,
    launches: pd.DataFrame,
    out_dir: Path,
    *,
    files: list[Path],
    tables: list[Table],
    gaps: list[str],
    left_out: list[str],
) -> Path:
    """Write report.html from the figures among `files` (.png with its .txt) and the tables.

    launches: of micro-benchmarks, columns LAUNCH. gaps: what is not drawn, and why.
    left_out: records that are not finished, and why.
    """
    places = {
        launch["run_id"]: f"commit {launch['commit']}, {launch['cpu']}, {launch['world_size']} "
        f"{launch['backend']} processes"
        for launch in launches.to_dict("records")
    }
    counts = []
    if campaign is not None:
        counts.append(f"{len(campaign.runs)} finished runs")
        for _, run in campaign.runs.iterrows():
            places[run["run_id"]] = f"commit {commit(run) or 'unknown'}, {machine(run)}"
    if not launches.empty:
        counts.append(f"{len(launches)} finished launches of micro-benchmarks")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        _TEMPLATE.read_text(encoding="utf-8")
    )
    text = template.render(
        counts=counts,
        warnings=caveats.warnings(campaign) if campaign else [],
        tables=[_table(table, places) for table in tables],
        figures=[_figure(file) for file in files if file.suffix == ".png"],
        gaps=gaps,
        left_out=left_out,
        runs=_runs(campaign) if campaign else None,
        launches=None if launches.empty else _listing(launches[LAUNCH].astype(str)),
    )
    file = out_dir / NAME
    file.write_text(f"{text}\n", encoding="utf-8", newline="\n")
    return file


def _figure(file: Path) -> dict[str, Any]:
    png = file.read_bytes()
    width = int.from_bytes(png[16:20], "big")  # the first field of a PNG's header
    return {
        "name": file.stem,
        "source": base64.b64encode(png).decode(),
        "width": round(_SCALE * width),
        "caption": file.with_suffix(".txt").read_text(encoding="utf-8").split("\n\n"),
    }


def _table(table: Table, places: dict[str, str]) -> dict[str, Any]:
    columns = [table.sources.get(str(name), "run_ids") for name in table.cells]
    behind = table.numbers[list(dict.fromkeys(columns))].astype(object).fillna("")
    rows = []
    for cells, sources in zip(
        table.cells.itertuples(index=False), behind.to_dict("records"), strict=True
    ):
        run_ids = sorted({run_id for text in sources.values() for run_id in split(text)})
        by_place: dict[str, list[str]] = {}
        for run_id in run_ids:
            by_place.setdefault(places[run_id], []).append(run_id)
        texts = [(cell, sources[column]) for cell, column in zip(cells, columns, strict=True)]
        rows.append({"cells": texts, "run_ids": run_ids, "places": by_place})
    return {
        "title": table.title,
        "names": [*table.cells, "from"],
        "classes": [*_classes(table.cells), ""],
        "rows": rows,
        "notes": " ".join(table.notes),
    }


def _runs(campaign: Campaign) -> dict[str, Any]:
    about = campaign.runs.set_index("run_id", drop=False)
    runs = per_run(campaign)
    frame = runs[["run_id", *_FILTERS, "partition", "setting"]].astype(str)
    frame["accuracy %"] = rounded(runs["accuracy_percent"], 1)
    frame["commit"] = [commit(about.loc[run_id]) for run_id in runs["run_id"]]
    frame["machine"] = [machine(about.loc[run_id]) for run_id in runs["run_id"]]
    return _listing(frame, _FILTERS)


def _listing(frame: pd.DataFrame, filters: Sequence[str] = ()) -> dict[str, Any]:
    """A row for each run or launch, to which links lead."""
    return {
        "names": list(frame),
        "classes": [*_classes(frame)[:-1], "long"],
        "rows": frame.to_dict("records"),
        "filters": filters,
    }


def _classes(cells: pd.DataFrame) -> list[str]:
    """The CSS class of each column: columns of numbers are aligned at the right."""
    return [
        "number" if all(_NUMBER.fullmatch(text) for text in cells[name] if text) else ""
        for name in cells
    ]
