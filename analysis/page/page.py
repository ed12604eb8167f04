"""report.html: figures, tables, gaps and where each came from, in one file without network."""

import base64
import html
import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from analysis.records import caveats
from analysis.records.campaign import Campaign
from analysis.records.per_run import ends
from analysis.records.provenance import commit, machine
from analysis.tables.render import Table, number

NAME = "report.html"
_SCALE = 0.6  # CSS pixels per pixel of a figure: its text is as large as the page's tables
_NUMBER = re.compile(r"[-+]?[\d.]+( %|x)?( to [-+]?[\d.]+)?( \*)?")  # *: a mark

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 0 auto; padding: 1rem;
  color: #111; background: #fff; }
figure { margin: 2rem 0; } figure img { max-width: 100%; height: auto; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.long { white-space: normal; min-width: 11rem; }
figcaption, .notes { color: #444; font-size: .9em; max-width: 50rem; }
.wide { overflow-x: auto; } .wide:focus, select:focus, input:focus { outline: 3px solid #0072B2; }
table { border-collapse: collapse; font-size: .85em; } th, td { padding: .2rem .5rem;
  text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; white-space: nowrap; }
label { margin-right: 1rem; } form { margin-bottom: .5rem; }
td p { margin: .2rem 0; min-width: 24rem; white-space: normal; } td a { white-space: nowrap; }
tr:target td { background: #fff3c4; }
"""
# Filters the rows of the run browser; what it shows is there without it as well.
_SCRIPT = """
const rows = [...document.querySelectorAll("#runs tbody tr")];
const filters = [...document.querySelectorAll("#filters select")];
const shown = document.getElementById("shown");
for (const filter of filters) {
  const values = [...new Set(rows.map(row => row.dataset[filter.name]))];
  values.sort((a, b) => a.localeCompare(b, "en", {numeric: true}));
  for (const value of values) filter.add(new Option(value, value));
  filter.addEventListener("change", update);
}
function update() {
  for (const row of rows)
    row.hidden = filters.some(f => f.value !== "" && f.value !== row.dataset[f.name]);
  shown.textContent = rows.filter(row => !row.hidden).length + " of " + rows.length + " runs";
}
// A link to a run that the filters hide shows all runs again.
addEventListener("click", event => {
  const link = event.target.closest('a[href^="#run-"]');
  if (!link || !document.getElementById(link.hash.slice(1)).hidden) return;
  for (const filter of filters) filter.value = "";
  update();
});
update();
"""
_FILTERS = ["method", "dataset", "seed"]
LAUNCH = ["run_id", "backend", "world_size", "num_cores", "num_hosts", "commit", "cpu"]


def write(
    campaign: Campaign | None,
    launches: pd.DataFrame,
    out_dir: Path,
    *,
    files: list[Path],
    tables: list[Table],
    gaps: list[str],
) -> Path:
    """Write report.html from the figures among `files` (.png with its .txt) and the tables.

    campaign: the runs, if there are any. launches: of micro-benchmarks, one row each with the
    columns of LAUNCH. gaps: what is not drawn, and why.
    """
    places = {
        launch["run_id"]: f"commit {launch['commit']}, {launch['cpu']}, {launch['world_size']} "
        f"{launch['backend']} processes"
        for launch in launches.to_dict("records")
    }
    counts, browsers, beware = [], [], []
    if campaign is not None:
        counts.append(f"{len(campaign.runs)} finished runs")
        beware = caveats.warnings(campaign)
        for _, run in campaign.runs.iterrows():
            places[run["run_id"]] = f"commit {commit(run) or 'unknown'}, {machine(run)}"
        browsers.append(_browser(campaign))
    if not launches.empty:
        counts.append(f"{len(launches)} finished launches of micro-benchmarks")
        browsers.append(_launches(launches))
    parts = [
        "<h1>Report</h1>",
        f"<p>{' and '.join(counts)}. Everything on this page is drawn from their records: a cell "
        "of a table names its runs when the pointer rests on it, the last one of a row opens to "
        "all of them with commit and machine, and each leads to the list of runs at the end.</p>",
        *([f"<ul>{''.join(map(_item, beware))}</ul>"] if beware else []),
        '<nav><a href="#tables">Tables</a> | <a href="#figures">Figures</a> | '
        '<a href="#browser">Runs</a></nav>',
        '<h2 id="tables">Tables</h2>',
        *(_table(table, places) for table in tables),
        '<h2 id="figures">Figures</h2>',
        *(_figure(file) for file in files if file.suffix == ".png"),
        *([f"<h2>Not drawn</h2><ul>{''.join(map(_item, gaps))}</ul>"] if gaps else []),
        '<h2 id="browser">Runs</h2>',
        *browsers,
    ]
    script = f"<script>{_SCRIPT}</script>" if campaign is not None else ""
    text = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>Report</title><style>{_STYLE}</style>'
        "</head>\n<body>\n" + "\n".join(parts) + f"\n{script}</body></html>\n"
    )
    file = out_dir / NAME
    file.write_text(text, encoding="utf-8", newline="\n")
    return file


def _figure(file: Path) -> str:
    caption_text = file.with_suffix(".txt").read_text(encoding="utf-8")
    first, *rest = [html.escape(paragraph) for paragraph in caption_text.split("\n\n")]
    png = file.read_bytes()
    width = int.from_bytes(png[16:20], "big")  # the first field of a PNG's header
    source = base64.b64encode(png).decode()
    return (
        f'<figure id="{file.stem}"><img src="data:image/png;base64,{source}" '
        f'width="{round(_SCALE * width)}" alt="{first}">'
        f"<figcaption><p>{first}</p><details><summary>Conditions</summary>"
        f"{''.join(f'<p>{text}</p>' for text in rest)}</details></figcaption></figure>"
    )


def _table(table: Table, places: dict[str, str]) -> str:
    notes = html.escape(" ".join(table.notes))
    columns = [table.sources.get(str(name), "run_ids") for name in table.cells]
    behind = table.numbers[list(dict.fromkeys(columns))].astype(object).fillna("")
    classes = _classes(table.cells)
    rows = []
    for cells, run_ids in zip(
        table.cells.itertuples(index=False), behind.to_dict("records"), strict=True
    ):
        inner = "".join(
            f'<td class="{name}" title="{html.escape(run_ids[column])}">{html.escape(cell)}</td>'
            for name, column, cell in zip(classes, columns, cells, strict=True)
        )
        every = sorted({run_id for text in run_ids.values() for run_id in text.split()})
        rows.append(f"<tr>{inner}<td>{_origins(every, places)}</td></tr>")
    head = _head([*table.cells, "from"], [*classes, ""])
    return (
        f'<h3>{html.escape(table.title)}</h3><div class="wide" tabindex="0" role="region" '
        f'aria-label="{html.escape(table.title)}"><table>{head}'
        f'<tbody>{"".join(rows)}</tbody></table></div><p class="notes">{notes}</p>'
    )


def _origins(run_ids: list[str], places: dict[str, str]) -> str:
    """The runs behind a row, folded, by commit and machine; links into the lists at the end."""
    if not run_ids:
        return ""
    links: dict[str, list[str]] = {}
    for run_id in run_ids:
        name = html.escape(run_id)
        links.setdefault(html.escape(places[run_id]), []).append(
            f'<a href="#run-{name}">{name}</a>'
        )
    texts = [f"<p>{place}: {', '.join(names)}</p>" for place, names in links.items()]
    count = f"{len(run_ids)} run{'s' if len(run_ids) > 1 else ''}"
    return f"<details><summary>{count}</summary>{''.join(texts)}</details>"


def _browser(campaign: Campaign) -> str:
    about = {run["run_id"]: run for _, run in campaign.runs.iterrows()}
    runs = ends(campaign)
    frame = runs[["run_id", *_FILTERS, "partition", "setting"]].astype(str)
    frame["accuracy %"] = [number(value, 1) for value in runs["accuracy_percent"]]
    frame["commit"] = [commit(about[run_id]) for run_id in runs["run_id"]]
    frame["machine"] = [machine(about[run_id]) for run_id in runs["run_id"]]
    filters = "".join(
        f'<label>{name} <select name="{name}"><option value="">all</option></select></label>'
        for name in _FILTERS
    )
    return (
        f'<form id="filters" onsubmit="return false">{filters}'
        f'<output id="shown" aria-live="polite">{len(frame)} runs</output></form>'
        + _listed(frame, "runs", "Runs", _FILTERS)
    )


def _launches(launches: pd.DataFrame) -> str:
    return "<h3>Micro-benchmarks</h3>" + _listed(
        launches[LAUNCH].astype(str), "launches", "Launches"
    )


def _listed(frame: pd.DataFrame, name: str, label: str, data: Iterable[str] = ()) -> str:
    """A table of runs or launches, a row each that links lead to; `data`: columns for filters."""
    classes = [*_classes(frame)[:-1], "long"]
    rows = []
    for run in frame.to_dict("records"):
        values = "".join(f' data-{key}="{html.escape(run[key])}"' for key in data)
        inner = "".join(
            f'<td class="{style}">{html.escape(cell)}</td>'
            for style, cell in zip(classes, run.values(), strict=True)
        )
        rows.append(f'<tr id="run-{html.escape(run["run_id"])}"{values}>{inner}</tr>')
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{label}"><table id="{name}">'
        f"{_head(frame, classes)}<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _classes(cells: pd.DataFrame) -> list[str]:
    """The CSS class of each column: numbers stand below each other at the right."""
    return [
        "number" if all(_NUMBER.fullmatch(text) for text in cells[name] if text) else ""
        for name in cells
    ]


def _head(names: Iterable[object], classes: list[str]) -> str:
    cells = "".join(
        f'<th scope="col" class="{style}">{html.escape(str(name))}</th>'
        for name, style in zip(names, classes, strict=True)
    )
    return f"<thead><tr>{cells}</tr></thead>"


def _item(text: str) -> str:
    return f"<li>{html.escape(text)}</li>"
