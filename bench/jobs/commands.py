"""`fedara sweep`, `fedara submit` and `fedara status`: many runs, each a job of its own."""

from pathlib import Path
from typing import Annotated

import typer

from bench.commands import Overrides
from bench.output import console

Config = Annotated[Path, typer.Argument(help="A TOML file. Its [sweep] table makes it many runs.")]
PlanResults = Annotated[
    Path | None,
    typer.Option(
        "--results",
        help="Folder for the plan, logs and records; by default results/NAME.",
        show_default=False,
    ),
]


def sweep(
    config: Config,
    results: PlanResults = None,
    processes: Annotated[int, typer.Option(min=1, help="MPI processes of each run.")] = 1,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Runs at the same time; by default as many as fit, and 1 if energy is measured.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the runs and what they will send.")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Run each point of a config as a job of its own on this machine.

    A failing run does not stop the others. The points are frozen in a plan file; start the command
    again to run what is not finished.

    \b
      fedara sweep bench/configs/trec6.toml --dry-run
      fedara sweep my.toml --processes 2 --jobs 4 --set federation.num_rounds=20
    """
    from bench.jobs.local import run_sweep
    from bench.jobs.plan import describe, make_plan

    plan = make_plan(config, results, overrides or [])
    if dry_run:
        for line in describe(plan):
            typer.echo(line)
        return
    if not run_sweep(plan, processes, jobs, console()):
        raise typer.Exit(1)


def submit(
    config: Config,
    site: Annotated[
        Path, typer.Option(help="A TOML file that describes your cluster; examples: slurm/sites.")
    ],
    results: PlanResults = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the job scripts, submit nothing.")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Submit the points of a config to Slurm.

    One job array runs the points, one point per task, and a last job draws the figures. Submit
    again to run what is not finished.

    \b
      fedara submit bench/configs/trec6.toml --site slurm/sites/generic_cpu.toml --dry-run
    """
    from bench.jobs.plan import make_plan
    from bench.jobs.slurm import read_site, submit_plan

    plan = make_plan(config, results, overrides or [])
    for line in submit_plan(plan, read_site(site), dry_run=dry_run):
        typer.echo(line)


def status(
    results: Annotated[Path, typer.Argument(help="The folder given to sweep or submit.")],
) -> None:
    """Show the state of each run of a sweep.

    For each run: waiting, running, done, failed and why, or died (its process or Slurm job is gone
    without a word), rounds and accuracy so far. It never disturbs a run.
    """
    from bench.jobs.slurm_job import Queue
    from bench.jobs.status import read_status, show

    queue = Queue()
    runs = read_status(results, queue)
    show(runs, console(), queue.problem)
