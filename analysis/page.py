"""report.html: figures, tables, gaps and every run's provenance in one file without network."""

import base64
import html
import json
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import caveats
from analysis.ends import ends
from analysis.load import Campaign
from analysis.tables import Table

NAME = "report.html"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 0 auto; padding: 1rem;
  color: #111; background: #fff; }
figure { margin: 2rem 0; } figure img { max-width: 100%; height: auto; }
figcaption, .notes { color: #444; font-size: .9em; max-width: 50rem; }
.wide { overflow-x: auto; } .wide:focus, select:focus, input:focus { outline: 3px solid #0072B2; }
table { border-collapse: collapse; font-size: .85em; } th, td { padding: .2rem .6rem;
  text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap; }
label { margin-right: 1rem; }
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
update();
"""
_FILTERS = ["method", "dataset", "seed"]


def write(
    campaign: Campaign, out_dir: Path, *, files: list[Path], tables: list[Table], gaps: list[str]
) -> Path:
    """Write report.html from the figures among `files` (.png with its .txt) and the tables."""
    gap_items = [*gaps, *(f"incomplete, left out: {run_id}" for run_id in campaign.incomplete)]
    beware = caveats.warnings(campaign)
    parts = [
        "<h1>Report</h1>",
        f"<p>{len(campaign.runs)} finished runs. Everything on this page is drawn from their "
        "records; the run browser at the end says which commit and machine each came from.</p>",
        *([f"<ul>{''.join(map(_item, beware))}</ul>"] if beware else []),
        '<nav><a href="#tables">Tables</a> | <a href="#figures">Figures</a> | '
        '<a href="#browser">Runs</a></nav>',
        '<h2 id="tables">Tables</h2>',
        *map(_table, tables),
        '<h2 id="figures">Figures</h2>',
        *(_figure(file) for file in files if file.suffix == ".png"),
        *([f"<h2>Not drawn</h2><ul>{''.join(map(_item, gap_items))}</ul>"] if gap_items else []),
        _browser(campaign),
    ]
    text = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>Report</title><style>{_STYLE}</style>'
        "</head>\n<body>\n" + "\n".join(parts) + f"\n<script>{_SCRIPT}</script></body></html>\n"
    )
    file = out_dir / NAME
    file.write_text(text, encoding="utf-8", newline="\n")
    return file


def _figure(file: Path) -> str:
    caption_text = file.with_suffix(".txt").read_text(encoding="utf-8")
    first, *rest = [html.escape(paragraph) for paragraph in caption_text.split("\n\n")]
    source = base64.b64encode(file.read_bytes()).decode()
    return (
        f'<figure id="{file.stem}"><img src="data:image/png;base64,{source}" alt="{first}">'
        f"<figcaption><p>{first}</p><details><summary>Conditions</summary>"
        f"{''.join(f'<p>{text}</p>' for text in rest)}</details></figcaption></figure>"
    )


def _table(table: Table) -> str:
    notes = html.escape(" ".join(table.notes))
    rows = [_row(row, "td") for row in table.cells.itertuples(index=False)]
    body = f"<thead>{_row(table.cells, 'th')}</thead><tbody>{''.join(rows)}</tbody>"
    return (
        f'<h3>{html.escape(table.title)}</h3><div class="wide" tabindex="0" role="region" '
        f'aria-label="{html.escape(table.title)}"><table>{body}</table></div>'
        f'<p class="notes">{notes}</p>'
    )


def _browser(campaign: Campaign) -> str:
    runs = ends(campaign)
    about = campaign.runs.set_index("run_id")
    columns = ["run id", *_FILTERS, "partition", "setting", "accuracy %", "commit", "machine"]
    rows = []
    for _, run in runs.iterrows():
        accuracy = run["accuracy_percent"]
        cells = [
            run["run_id"],
            *(str(run[name]) for name in _FILTERS),
            run["partition"],
            run["setting"],
            "" if pd.isna(accuracy) else f"{accuracy:.1f}",
            _commit(about.loc[run["run_id"]]),
            _machine(about.loc[run["run_id"]]),
        ]
        data = " ".join(f'data-{name}="{html.escape(str(run[name]))}"' for name in _FILTERS)
        rows.append(_row(cells, "td").replace("<tr>", f"<tr {data}>", 1))
    filters = "".join(
        f'<label>{name} <select name="{name}"><option value="">all</option></select></label>'
        for name in _FILTERS
    )
    return (
        f'<h2 id="browser">Runs</h2><form id="filters" onsubmit="return false">{filters}'
        f'<output id="shown" aria-live="polite">{len(rows)} runs</output></form>'
        f'<div class="wide" tabindex="0" role="region" aria-label="Runs"><table id="runs"><thead>'
        f"{_row(columns, 'th')}</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _commit(run: pd.Series) -> str:
    commit = run.get("git_commit")
    if not isinstance(commit, str):
        return ""
    return commit[:12] + (" with uncommitted changes" if run.get("git_dirty") is True else "")


def _machine(run: pd.Series) -> str:
    processes = json.loads(run["processes"]) if isinstance(run.get("processes"), str) else []
    hosts = sorted({process.get("host", "") for process in processes} - {""})
    parts = [run.get("cpu"), run.get("gpu"), f"{len(processes)} processes", *hosts]
    return ", ".join(part for part in parts if isinstance(part, str))


def _row(cells: Any, tag: str) -> str:
    inner = "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)
    return f"<tr>{inner}</tr>"


def _item(text: str) -> str:
    return f"<li>{html.escape(text)}</li>"
