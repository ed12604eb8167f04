"""What the commands share: options, jobs of several processes, and errors in one line.

The commands themselves are in the commands.py of each room. They import what they run when they
run, so that `--help` needs no torch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from bench.output import not_text, say
from fedara_core.errors import InputError, Interrupted, JobError

if TYPE_CHECKING:
    from fedara_core.comm.base import Communicator

T = TypeVar("T")


def _as_text(words: list[str] | None) -> list[str] | None:
    """Raises InputError for bytes that are no text: a config could not be written down."""
    for word in words or []:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"--set {not_text(error)}") from None
    return words


Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key, e.g. --set train.lr=3e-3.",
        callback=_as_text,
    ),
]
Comm = Annotated[
    str,
    typer.Option(
        help="How processes communicate: auto (asks the launcher), serial, mpi, mpi-node (one copy "
        "of each message per host) or torch (which waits 120 s for all of them, or "
        "FEDARA_RENDEZVOUS_SECONDS)."
    ),
]
Results = Annotated[Path, typer.Option(help="Folder for the records; each run gets its own.")]


class Commands(TyperGroup):
    """Commands whose invalid input ends in one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            say(str(error))
        except UnicodeEncodeError as error:
            say(not_text(error))
        raise typer.Exit(2)


def as_job(comm: str, action: Callable[["Communicator"], T]) -> T:
    """Run `action` on every process of the job; returns its result. Invalid input ends all
    processes with exit code 2; any other error of one process ends the job."""
    from fedara_core.comm.launch import abort_on_error, open_communicator

    communicator = open_communicator(comm)
    try:
        result = action(communicator)
    except InputError:  # raised on every process alike
        communicator.close()
        if communicator.world_rank == 0:
            raise
        raise typer.Exit(2) from None
    except Interrupted as error:  # likewise
        from bench.jobs.slurm_job import requeue

        communicator.close()
        if communicator.world_rank == 0:
            say(str(error))  # before Slurm is asked: it may end this process at once
            if line := requeue():
                say(line)
        raise typer.Exit(error.exit_code) from None
    except JobError as error:  # the others wait for this process
        say(str(error))
        if communicator.world_size == 1:
            raise typer.Exit(1) from None
        communicator.abort()
    except BaseException as error:
        if communicator.world_size == 1:
            raise
        abort_on_error(communicator, error)
    communicator.close()
    return result
