"""The `fedara` command: mounts the commands that live beside their code."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import typer

from analysis.cli import main as report
from bench.commands import Commands
from bench.jobs import commands as jobs
from bench.micro import commands as micro
from bench.output import close, guarded, say
from bench.run import commands as runs
from bench.tools import commands as tools
from fedara_core.errors import JobError

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it breaks lines where the source does, and swallows brackets
    help="Benchmark federated parameter-efficient fine-tuning on MPI or torch.distributed "
    "processes.",
)


for command in (runs.run, jobs.sweep, jobs.submit, jobs.status, tools.reproduce):
    app.command()(command)
app.command("report")(report)
app.command("list")(tools.list_)
app.command()(tools.export)
app.command()(tools.cache)
app.command()(tools.doctor)
app.add_typer(micro.app, name="micro")


def main() -> None:
    """The console script."""
    default_format = warnings.formatwarning

    def format_warning(message: Warning | str, category: Any, filename: str, *rest: Any) -> str:
        """Our own warnings are for users: one line, without the place in the code."""
        if Path(__file__).parent in Path(filename).parents:
            return f"warning: {message}\n"
        return default_format(message, category, filename, *rest)

    warnings.formatwarning = format_warning  # type: ignore[assignment]
    # Before torch is imported: it logs traces of C++ of what it raises as an exception, too.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    sys.stdout = guarded(sys.stdout)
    code: Any = 0
    try:
        app(prog_name="fedara")
    except SystemExit as exit_:
        code = exit_.code
    except JobError as error:
        say(str(error))
        code = 1
    problem = close(sys.stdout)
    if problem and not code:
        say(problem)
        code = 1
    sys.exit(code)
