"""`fedara reproduce`, `fedara list`, `fedara export`, `fedara cache` and `fedara doctor`."""

from pathlib import Path
from typing import Annotated

import typer

from bench.commands import Comm, Overrides, Results, as_job
from bench.output import console
from fedara_core.errors import InputError


def reproduce(
    run_dir: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    results: Results = Path("results/reproduced"),
    within_points: Annotated[
        float, typer.Option(min=0.0, help="Allowed difference in accuracy, if bits differ.")
    ] = 2.0,
    overrides: Overrides = None,
    comm: Comm = "auto",
) -> None:
    """Run a record's config again and compare the results.

    The run is reproduced if all bits are equal, if the last accuracy differs by at most
    --within-points, or if it lies in the 95 % interval over the record's seeds, where its folder
    has other seeds. Otherwise the exit code is 1. If the data set was a folder, name it again.

    \b
      fedara reproduce results/published/quickstart/RUN_ID
      mpiexec -n 2 fedara reproduce RUN_DIR --set dataset.name=file:DIR
    """
    from bench.tools.reproduce import reproduce as run_again

    words = overrides or []
    if not as_job(comm, lambda job: run_again(run_dir, results, words, within_points, job)):
        raise typer.Exit(1)


def list_(
    what: Annotated[str, typer.Argument(help="methods, datasets, models, configs or keys.")],
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="For methods: what travels, hyperparameters.")
    ] = False,
) -> None:
    """List methods, data sets, models, configs or keys."""
    from bench.tools.catalog import CATALOGS, describe_methods

    if what not in CATALOGS:
        raise InputError(f"list {what!r}: allowed: {', '.join(CATALOGS)}")
    if verbose and what == "methods":
        typer.echo("\n".join(describe_methods()))
        return
    entries = list(CATALOGS[what]())
    width = max(len(name) for name, _ in entries)
    for name, text in entries:
        typer.echo(f"{name:<{width}}  {text}")


def export(
    run_dir: Annotated[Path, typer.Argument(help="A run's folder, such as results/runs/RUN_ID.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    client: Annotated[
        int | None,
        typer.Option(help="Client whose model to export, for methods with a model per client."),
    ] = None,
) -> None:
    """Write a run's model for Hugging Face.

    A method whose layers are W0 + scale B A becomes a LoRA adapter for PeftModel.from_pretrained,
    any other a model with merged weights. The README in the folder explains how to load it.
    """
    from bench.tools.export import export as write

    typer.echo(f"{out}: {write(run_dir, out, client)}")


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all of them.")] = False,
) -> None:
    """List the encoded data sets that jobs keep for later ones.

    They lie in FEDARA_CACHE, else in fedara in the user's cache directory, and take 4.3 GB at most:
    the sets that were not read for longest make room. A job makes again what it does not find.
    """
    from bench.tools.cache import show

    typer.echo("\n".join(show(clear=clear)))


def doctor() -> None:
    """Check what works on this machine.

    MPI, torch, GPU, energy counters, Slurm, the demo encoder and the hub; for what does not work,
    it explains what to do.
    """
    from bench.tools.doctor import show

    show(console())
