"""`python -m analysis DIR`: every figure and table from the records below DIR."""

from pathlib import Path
from typing import Annotated

import typer

from analysis import (
    figure_accuracy_bytes,
    figure_accuracy_rounds,
    figure_collectives,
    table_collectives,
    table_summary,
)
from analysis.load import AnalysisError, Campaign, has_rounds, load_campaign
from analysis.load_micro import MicroCampaign, load_micro
from bench.scaling import read_costs
from fedara_core.errors import InputError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def report(campaign: Campaign, out_dir: Path) -> list[Path]:
    """Write all figures, captions and tables to `out_dir`; returns the files written."""
    return [
        *figure_accuracy_rounds.draw(campaign, out_dir),
        *figure_accuracy_bytes.draw(campaign, out_dir),
        *table_summary.write(campaign, out_dir),
    ]


def report_micro(micro: MicroCampaign, out_dir: Path, costs: Path | None) -> list[Path]:
    """Write the figures, captions and the table of the collectives; returns the files written."""
    return [
        *figure_collectives.draw(micro, out_dir, None if costs is None else read_costs(costs)),
        *table_collectives.write(micro, out_dir),
    ]


@app.command()
def main(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder with records, at any depth below it.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write.  [default: DIR/figures]", show_default=False),
    ] = None,
    costs: Annotated[
        Path | None,
        typer.Option(
            help="TOML with alpha_seconds and beta_seconds_per_byte of another machine, for the "
            "scaling model.  [default: fitted to the records]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Draw the figures and the summary table of a campaign from its records.

    A record is a folder with run.json, rounds.jsonl and DONE. A run without DONE has not finished:
    it is named, and left out of everything.

    Writes accuracy_rounds and accuracy_bytes (.pdf, .png and .txt, the caption), summary.md and
    summary.csv; of records of fedara micro collectives collectives_density_overlap_*,
    collectives_scaling and collectives_allgather. The same records give the same bytes.

    Example:  python -m analysis results/published/first --out /tmp/figures

    Exit code 2: the records are missing, corrupt, or come twice; one line says which.
    """
    out_dir = out or directory / "figures"
    files, incomplete = [], []
    try:
        micro = load_micro(directory)
        if micro is None or has_rounds(directory):
            campaign = load_campaign(directory)
            _require_finished(directory, campaign.runs.empty, campaign.incomplete)
            files += report(campaign, out_dir)
            incomplete += campaign.incomplete
            table_summary.show(campaign)
        if micro is not None:
            _require_finished(directory, micro.launches.empty, micro.incomplete)
            files += report_micro(micro, out_dir, costs)
            incomplete += micro.incomplete
    except (AnalysisError, InputError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    for run_id in incomplete:
        typer.echo(f"left out, no DONE: {run_id}")
    for file in files:
        typer.echo(f"wrote {file}")


def _require_finished(directory: Path, empty: bool, incomplete: list[str]) -> None:
    if empty:
        names = ", ".join(incomplete)
        raise AnalysisError(f"{directory}: no finished run; incomplete: {names}")


if __name__ == "__main__":
    app(prog_name="python -m analysis")
