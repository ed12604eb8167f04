"""What the commands share: options, jobs of several processes, and errors in one line.

The commands themselves are in the commands.py of each room. They import what they run when they
run, so that `--help` needs no torch.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from fedara_core.errors import InputError, Interrupted, JobError

if TYPE_CHECKING:
    from fedara_core.comm.base import Communicator

T = TypeVar("T")
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. --set train.lr=3e-3."),
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
            sys.stderr.write(f"fedara: {error}\n")
            raise typer.Exit(2) from None


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
            lines = [str(error), requeue()]
            sys.stderr.write("".join(f"fedara: {line}\n" for line in lines if line))
        raise typer.Exit(error.exit_code) from None
    except JobError as error:  # the others wait for this process
        sys.stderr.write(f"fedara: {error}\n")
        if communicator.world_size == 1:
            raise typer.Exit(1) from None
        sys.stderr.flush()
        communicator.abort()
    except BaseException as error:
        if communicator.world_size == 1:
            raise
        abort_on_error(communicator, error)
    communicator.close()
    return result
