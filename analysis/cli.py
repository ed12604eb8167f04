"""`python -m analysis DIR`: every figure and table from the records below DIR."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import typer

from analysis import compare
from analysis.cost_model import Cost, read_costs
from analysis.figures import accuracy_bytes as figure_accuracy_bytes
from analysis.figures import accuracy_rounds as figure_accuracy_rounds
from analysis.figures import alpha as figure_alpha
from analysis.figures import client_spread as figure_client_spread
from analysis.figures import collectives as figure_collectives
from analysis.figures import live_triplets as figure_live_triplets
from analysis.figures import local_train as figure_local_train
from analysis.figures import pareto as figure_pareto
from analysis.figures import partition as figure_partition
from analysis.figures import phases as figure_phases
from analysis.figures import scaling as figure_scaling
from analysis.figures import target as figure_target
from analysis.figures import target_modelled as figure_target_modelled
from analysis.figures.scaling import Scaling
from analysis.options import Compare, Costs, Directory, Out
from analysis.page import page
from analysis.records import caveats
from analysis.records.campaign import AnalysisError, Campaign, NotDrawn, has_rounds, load_campaign
from analysis.records.launches import Launches, load_launches
from analysis.records.micro import MicroCampaign, load_micro
from analysis.tables import accuracy as table_accuracy
from analysis.tables import collectives as table_collectives
from analysis.tables import cost as table_cost
from analysis.tables import headline as table_headline
from analysis.tables import modelled as table_modelled
from analysis.tables import overhead as table_overhead
from analysis.tables import render as tables
from analysis.tables import roundtrip as table_roundtrip
from analysis.tables import scaling as table_scaling
from analysis.tables import summary as table_summary
from fedara_core.errors import InputError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


# In the order of a report; each has NAME, data, and draw or write.
_FIGURES = [
    figure_accuracy_rounds,
    figure_accuracy_bytes,
    figure_pareto,
    figure_target,
    figure_target_modelled,
    figure_alpha,
    figure_live_triplets,
    figure_local_train,
    figure_phases,
    figure_client_spread,
    figure_partition,
]
_TABLES = [table_headline, table_accuracy, table_cost, table_modelled]


@dataclass(frozen=True, kw_only=True)
class Records:
    """What lies below a folder: of each kind of record all that is finished, or None."""

    campaign: Campaign | None = None
    micro: MicroCampaign | None = None
    scaling: Scaling | None = None
    roundtrip: Launches | None = None
    overhead: Launches | None = None

    @property
    def incomplete(self) -> list[str]:
        """Names of the runs and launches without DONE."""
        kinds = (self.campaign, self.micro, self.scaling, self.roundtrip, self.overhead)
        return [run_id for kind in kinds if kind is not None for run_id in kind.incomplete]

    @property
    def launches(self) -> pd.DataFrame:
        """The finished launches of micro-benchmarks, one row each, with the columns page.LAUNCH."""
        frames = [self.micro.launches] if self.micro is not None else []
        frames += [self.scaling.rows] if self.scaling is not None else []
        further = (self.roundtrip, self.overhead)
        frames += [found.launches for found in further if found is not None]
        empty = pd.DataFrame(columns=page.LAUNCH)
        found = pd.concat([frame[page.LAUNCH] for frame in frames]) if frames else empty
        return found.drop_duplicates().sort_values("run_id", ignore_index=True)


def report(
    records: Records, out_dir: Path, costs: Mapping[str, Cost] | None = None
) -> tuple[list[Path], list[str]]:
    """Write all figures, captions, tables and the page to `out_dir`.

    `costs` stand in for fitted ones in the scaling model of the collectives. Returns the files
    written, and for each figure and table that the records do not allow why not.
    """
    makers: list[tuple[str, Callable[[], list[Path] | tables.Table]]] = []
    campaign, micro, scaling = records.campaign, records.micro, records.scaling
    if campaign is not None:
        beware = caveats.warnings(campaign)
        makers += [(fig.NAME, partial(fig.draw, campaign, out_dir)) for fig in _FIGURES]
        makers += [
            (maker.NAME, partial(_warned, maker.table, campaign, beware)) for maker in _TABLES
        ]
        makers.append((table_summary.NAME, partial(table_summary.write, campaign, out_dir)))
    if micro is not None:
        draw = partial(figure_collectives.draw, micro, out_dir, costs)
        makers.append((figure_collectives.NAME, draw))
        makers.append((table_collectives.NAME, partial(table_collectives.table, micro)))
    if scaling is not None:
        makers.append((figure_scaling.NAME, partial(figure_scaling.draw, scaling, out_dir)))
        makers.append((table_scaling.NAME, partial(table_scaling.table, scaling)))
    if records.roundtrip is not None:
        makers.append((table_roundtrip.NAME, partial(table_roundtrip.table, records.roundtrip)))
    if records.overhead is not None:
        makers.append((table_overhead.NAME, partial(table_overhead.table, records.overhead)))
    files: list[Path] = []
    shown: list[tables.Table] = []
    gaps: list[str] = []
    for name, make in makers:
        try:
            made = make()
        except NotDrawn as reason:
            gaps.append(f"{name}: {reason}")
            continue
        if isinstance(made, tables.Table):
            shown.append(made)
            files += tables.write(made, out_dir)
        else:
            files += made
    left_out = [f"incomplete, left out: {run_id}" for run_id in records.incomplete]
    page_file = page.write(
        campaign, records.launches, out_dir, files=files, tables=shown, gaps=[*gaps, *left_out]
    )
    return [*files, page_file], gaps


def _warned(
    make: Callable[[Campaign], tables.Table], campaign: Campaign, beware: list[str]
) -> tables.Table:
    table = make(campaign)
    return replace(table, notes=[*table.notes, *beware])


def report_changes(a_dir: Path, b_dir: Path, out_dir: Path) -> tuple[list[str], list[Path]]:
    """Write compare.md, .csv and .tex to `out_dir`; returns what to say, and the files.

    No file where the campaigns have nothing in common.
    """
    a, b = _load_finished(a_dir), _load_finished(b_dir)
    changes = compare.data(a, b)
    lines = compare.summary(a, b, changes, (str(a_dir), str(b_dir)))
    if changes.empty:
        return lines, []
    files = tables.write(compare.table(changes, lines), out_dir)
    found = compare.differing(changes) or ["Nothing differs by more than noise."]
    return [*lines, *found], files


@app.command()
def main(
    directory: Directory = None,
    pair: Compare = None,
    out: Out = None,
    costs: Costs = None,
) -> None:
    """Draw the figures and the summary table of a campaign from its records.

    A record is a folder with run.json, rounds.jsonl and DONE. A run without DONE has not finished:
    it is named, and left out of everything.

    Writes each figure as .pdf, .png and .txt (the caption), tables, and report.html; a figure that
    the records do not allow is named, with the reason. Records of fedara micro collectives
    give collectives_density_overlap_*, collectives_scaling and collectives_allgather; those
    of fedara micro scaling, roundtrip and overhead the figure or table of that name. The same
    records give the same bytes.

    With --compare it puts two campaigns side by side instead: accuracy, uplink bytes and seconds by
    data set, partition, method and setting, paired by seed, in compare.md, .csv and .tex, and what
    differs by more than noise on the screen.

    \b
    Examples:  python -m analysis results/published/first --out /tmp/figures
               python -m analysis --compare results/before results/after

    Exit code 2: the records are missing, corrupt, or come twice; one line says which.
    """
    try:
        if directory is not None and pair is None:
            lines, files = _report_all(directory, out or directory / "figures", costs)
        elif pair is not None and directory is None:
            lines, files = report_changes(*pair, out or pair[1] / "figures")
        else:
            raise InputError("report takes either a folder DIR or --compare A B")
    except (AnalysisError, InputError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    for line in [*lines, *(f"wrote {file}" for file in files)]:
        typer.echo(line)


def _report_all(directory: Path, out_dir: Path, costs: Path | None) -> tuple[list[str], list[Path]]:
    """Report rounds and micro-benchmarks below a folder; returns what to say, and the files."""
    micro, scaling = load_micro(directory), figure_scaling.load(directory)
    if micro is not None:
        _require_finished(directory, micro.launches.empty, micro.incomplete)
    if scaling is not None:
        _require_finished(directory, scaling.rows.empty, scaling.incomplete)
    roundtrip, overhead = (
        load_launches(directory, maker.BENCHMARK, maker.REQUIRED)
        for maker in (table_roundtrip, table_overhead)
    )
    for found in (roundtrip, overhead):
        if found is not None:
            _require_finished(directory, found.launches.empty, found.incomplete)
    measured = (micro, scaling, roundtrip, overhead)
    rounds = all(found is None for found in measured) or has_rounds(directory)
    campaign = _load_finished(directory) if rounds else None
    records = Records(
        campaign=campaign, micro=micro, scaling=scaling, roundtrip=roundtrip, overhead=overhead
    )
    files, gaps = report(records, out_dir, None if costs is None else read_costs(costs))
    lines: list[str] = []
    if campaign is not None:
        lines += [f"warning: {text}" for text in caveats.sentences(campaign)]
        table_summary.show(campaign)
    lines += [f"left out, no DONE: {run_id}" for run_id in records.incomplete]
    lines += [f"not drawn, {gap}" for gap in gaps]
    return lines, files


def _load_finished(directory: Path) -> Campaign:
    campaign = load_campaign(directory)
    _require_finished(directory, campaign.runs.empty, campaign.incomplete)
    return campaign


def _require_finished(directory: Path, empty: bool, incomplete: list[str]) -> None:
    if empty:
        names = ", ".join(incomplete)
        raise AnalysisError(f"{directory}: no finished run; incomplete: {names}")
