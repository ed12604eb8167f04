"""`python -m analysis DIR`: every figure and table from the records below DIR."""

from pathlib import Path
from typing import Annotated

import typer

from analysis import figure_accuracy_bytes, figure_accuracy_rounds, table_summary
from analysis.load import AnalysisError, Campaign, load_campaign

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def report(campaign: Campaign, out_dir: Path) -> list[Path]:
    """Write all figures, captions and tables to `out_dir`; returns the files written."""
    return [
        *figure_accuracy_rounds.draw(campaign, out_dir),
        *figure_accuracy_bytes.draw(campaign, out_dir),
        *table_summary.write(campaign, out_dir),
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
) -> None:
    """Draw the figures and the summary table of a campaign from its records.

    A record is a folder with run.json, rounds.jsonl and DONE. A run without DONE has not finished:
    it is named, and left out of everything.

    Writes accuracy_rounds and accuracy_bytes (.pdf, .png and .txt, the caption), summary.md and
    summary.csv. The same records give the same bytes.

    Example:  python -m analysis results/published/first --out /tmp/figures

    Exit code 2: the records are missing, corrupt, or come twice; one line says which.
    """
    try:
        campaign = load_campaign(directory)
        if campaign.runs.empty:
            names = ", ".join(campaign.incomplete)
            raise AnalysisError(f"{directory}: no finished run; incomplete: {names}")
        files = report(campaign, out or directory / "figures")
    except AnalysisError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    table_summary.show(campaign)
    for run_id in campaign.incomplete:
        typer.echo(f"left out, no DONE: {run_id}")
    for file in files:
        typer.echo(f"wrote {file}")


if __name__ == "__main__":
    app(prog_name="python -m analysis")
