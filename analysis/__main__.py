"""`python -m analysis DIR`: every figure and table from the records below DIR."""

from dataclasses import replace
from pathlib import Path

import typer

from analysis import (
    caveats,
    compare,
    figure_accuracy_bytes,
    figure_accuracy_rounds,
    figure_alpha,
    figure_client_spread,
    figure_collectives,
    figure_live_triplets,
    figure_local_train,
    figure_pareto,
    figure_partition,
    figure_phases,
    figure_scaling,
    figure_target,
    figure_target_modelled,
    page,
    table_accuracy,
    table_collectives,
    table_cost,
    table_headline,
    table_modelled,
    table_summary,
    tables,
)
from analysis.load import AnalysisError, Campaign, NotDrawn, has_rounds, load_campaign
from analysis.load_micro import MicroCampaign, load_micro
from analysis.options import Compare, Costs, Directory, Out
from bench.scaling import read_costs
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


def report(campaign: Campaign, out_dir: Path) -> tuple[list[Path], list[str]]:
    """Write all figures, captions and tables to `out_dir`.

    Returns the files written, and for each figure that the records do not allow why not.
    """
    files: list[Path] = []
    shown: list[tables.Table] = []
    gaps: list[str] = []
    for figure in _FIGURES:
        try:
            files += figure.draw(campaign, out_dir)
        except NotDrawn as reason:
            gaps.append(f"{figure.NAME}: {reason}")
    for maker in _TABLES:
        try:
            shown.append(maker.table(campaign))
        except NotDrawn as reason:
            gaps.append(f"{maker.NAME}: {reason}")
    beware = caveats.warnings(campaign)
    shown = [replace(table, notes=[*table.notes, *beware]) for table in shown]
    for table in shown:
        files += tables.write(table, out_dir)
    files += table_summary.write(campaign, out_dir)
    page_file = page.write(campaign, out_dir, files=files, tables=shown, gaps=gaps)
    return [*files, page_file], gaps


def report_micro(micro: MicroCampaign, out_dir: Path, costs: Path | None) -> list[Path]:
    """Write the figures, captions and the table of the collectives; returns the files written."""
    return [
        *figure_collectives.draw(micro, out_dir, None if costs is None else read_costs(costs)),
        *table_collectives.write(micro, out_dir),
    ]


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
    the records do not allow is named, with the reason. Of records of fedara micro
    collectives it draws collectives_density_overlap_*, collectives_scaling and
    collectives_allgather; of fedara micro scaling, scaling. The same records give the same bytes.

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
    files: list[Path] = []
    gaps: list[str] = []
    incomplete: list[str] = []
    lines: list[str] = []
    micro, scaling = load_micro(directory), figure_scaling.load(directory)
    if (micro is None and scaling is None) or has_rounds(directory):
        campaign = _load_finished(directory)
        written, gaps = report(campaign, out_dir)
        files += written
        incomplete += campaign.incomplete
        lines += [f"warning: {text}" for text in caveats.sentences(campaign)]
        table_summary.show(campaign)
    if micro is not None:
        _require_finished(directory, micro.launches.empty, micro.incomplete)
        files += report_micro(micro, out_dir, costs)
        incomplete += micro.incomplete
    if scaling is not None:
        _require_finished(directory, scaling.rows.empty, scaling.incomplete)
        files += figure_scaling.draw(scaling, out_dir)
        incomplete += scaling.incomplete
    lines += [f"left out, no DONE: {run_id}" for run_id in incomplete]
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


if __name__ == "__main__":
    app(prog_name="python -m analysis")
