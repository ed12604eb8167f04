"""`fedara run`."""

from pathlib import Path
from typing import Annotated

import typer

from bench.commands import Comm, Overrides, Results, as_job


def run(
    config: Annotated[
        Path,
        typer.Argument(help="A TOML file (see `fedara list configs`), or a plan that sweep wrote."),
    ],
    results: Results = Path("results/runs"),
    overrides: Overrides = None,
    no_energy: Annotated[
        bool, typer.Option("--no-energy", help="Same as --set energy.enabled=false.")
    ] = False,
    comm: Comm = "auto",
    index: Annotated[
        int | None, typer.Option(help="Run only this point of the sweep or plan, counted from 0.")
    ] = None,
) -> None:
    """Run all points of a config in one job, and record every round.

    Finished runs are skipped, and an interrupted run continues after its last checkpoint. The job
    stops at the first error; a point whose loss diverges is reported, and the rest still run.
    SIGTERM or SIGUSR1 to any process ends the job after the current round, with exit code 75; in a
    Slurm job it is also requeued.

    \b
      fedara run bench/configs/quickstart.toml
      mpiexec -n 4 fedara run my.toml --set federation.num_clients=100
      torchrun --no-python --nproc-per-node 2 fedara run my.toml
    """
    from bench.run.runner import run_all

    chosen = [*(overrides or []), *(["energy.enabled=false"] if no_energy else [])]
    as_job(comm, lambda communicator: run_all(config, results, chosen, communicator, index))
