"""`fedara report` and `python -m analysis`: one command, which needs no torch."""

import errno
import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from analysis.records.names import printable
from fedara_core.errors import InputError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
_LIBRARIES = ("matplotlib", "scipy", "jinja2")  # of the extra `analysis`

Directory = Annotated[
    Path | None,
    typer.Argument(
        metavar="DIR", help="Folder with records, at any depth below it.", show_default=False
    ),
]
Compare = Annotated[
    tuple[Path, Path] | None,
    typer.Option(
        "--compare",
        metavar="A B",
        help="Instead of DIR: report what changed from campaign A to campaign B, and whether by "
        "more than noise.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder for the files. Default: DIR/figures, with --compare B/figures.",
        show_default=False,
    ),
]
Costs = Annotated[
    Path | None,
    typer.Option(
        help="TOML with alpha_seconds and beta_seconds_per_byte of another machine, for the "
        "scaling model. Default: costs fitted to the records.",
        show_default=False,
    ),
]


@app.command()
def main(
    directory: Directory = None, pair: Compare = None, out: Out = None, costs: Costs = None
) -> None:
    """Draw the figures and tables of the records below DIR, and a page with all of them.

    A record is a folder with run.json, rounds.jsonl and DONE. A run without DONE has not finished:
    it is named and left out.

    Each figure is written as .pdf, .png and .txt (its caption), each table as .md, .csv and .tex,
    and report.html shows them all. A figure that the records do not allow is named, with the
    reason. Records of fedara micro collectives, scaling and step have figures of their own. The
    same records give the same bytes.

    --compare puts two campaigns side by side: accuracy, uplink bytes and seconds by data set,
    partition, method and setting, paired by seed. It writes compare.md, .csv and .tex and prints
    what differs by more than noise.

    \b
    Examples:  fedara report results/published/trec6 --out /tmp/figures
               fedara report --compare results/before results/after

    Exit code 2: no record is finished and whole, one comes twice, or the files cannot be written;
    one line says which. A damaged record among others is named and left out.
    """
    try:
        for line in _report(directory, pair, out, costs):
            typer.echo(printable(line))
        sys.stdout.flush()
    except InputError as error:
        typer.echo(f"error: {printable(str(error))}", err=True)
        raise typer.Exit(2) from None
    except OSError as error:  # of stdout; those of files are InputErrors
        if error.errno == errno.EPIPE:  # `| head`, of which typer knows
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else its end fails, too
        typer.echo(f"error: standard output: {error.strerror}", err=True)
        raise typer.Exit(1) from None


def _report(
    directory: Path | None, pair: tuple[Path, Path] | None, out: Path | None, costs: Path | None
) -> list[str]:
    """Write the files; returns what to print."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names may hold any letter
    report = _import_report()
    lines: list[str]
    if directory is not None and pair is None:
        lines = report.report_all(directory, out or directory / "figures", costs)
    elif pair is not None and directory is None:
        lines = report.report_changes(*pair, out or pair[1] / "figures")
    else:
        raise InputError("report takes either a folder DIR or --compare A B")
    return lines


def _import_report() -> Any:
    """The module that draws. Raises InputError where matplotlib is missing or cannot start."""
    # A notebook names a back end that is no part of matplotlib, or that needs a screen.
    os.environ["MPLBACKEND"] = "agg"
    try:
        from analysis import report
    except ModuleNotFoundError as error:
        if error.name not in _LIBRARIES:
            raise
        raise InputError(f"report needs {error.name}: pip install 'fedara[analysis]'") from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"matplotlib does not start: {error}; allowed: a whole matplotlibrc, or none"
        ) from None
    return report
