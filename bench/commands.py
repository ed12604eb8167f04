"""What the commands share: options, jobs of several processes, and errors in one line.

The commands themselves are in the commands.py of each room. They import what they run when they
run, so that `--help` needs no torch.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from fedara_core.errors import InputError, Interrupted, JobError

if TYPE_CHECKING:
    from fedara_core.comm.base import Communicator

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


def refuse(error: InputError, *, quiet: bool = False) -> NoReturn:
    """Print the error in one line and exit with code 2."""
    if not quiet:
        sys.stderr.write(f"fedara: {error}\n")
    raise typer.Exit(2)


def as_job(comm: str, action: Callable[["Communicator"], object]) -> None:
    """Run `action` on every process of the job. Invalid input ends all processes with exit code 2;
    any other error of one process ends the job."""
    from fedara_core.comm.launch import abort_on_error, open_communicator

    try:
        communicator = open_communicator(comm)
    except InputError as error:
        refuse(error)
    try:
        action(communicator)
    except InputError as error:  # raised on every process alike
        communicator.close()
        refuse(error, quiet=communicator.world_rank != 0)
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
    except typer.Exit:  # raised on every process alike
        communicator.close()
        raise
    except BaseException as error:
        if communicator.world_size == 1:
            raise
        abort_on_error(communicator, error)
    communicator.close()
