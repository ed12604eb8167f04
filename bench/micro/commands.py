"""`fedara micro`: micro-benchmarks of the suite itself."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.commands import Comm, Results, as_job, refuse
from fedara_core.errors import InputError

if TYPE_CHECKING:
    from fedara_core.comm.comm import Communicator

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Micro-benchmarks of the suite itself."
)
RESULTS = Path("results/micro")


@app.command()
def overhead(
    repeats: Annotated[
        int, typer.Option(min=1, help="Pairs of rounds; the result is their median.")
    ] = 5,
    model: Annotated[str, typer.Option(help="The model to train.")] = "minilm",
    max_length: Annotated[int, typer.Option(help="Tokens; longer texts are cut.")] = 64,
) -> None:
    """Compare a round with a bare PyTorch loop.

    The loop takes the same optimiser steps on the same batches.
    """
    from bench.micro.overhead import describe, measure

    try:
        typer.echo(describe(measure(repeats, model, max_length)))
    except InputError as error:
        refuse(error)


@app.command()
def collectives(
    payload_bytes: Annotated[
        str, typer.Option(help="Bytes of one client's live rows.")
    ] = "10e3,1e6,50e6",
    densities: Annotated[
        str, typer.Option(help="Live rows as a fraction of all rows.")
    ] = "0.05,0.25,0.5,1",
    overlaps: Annotated[
        str, typer.Option(help="From 0, masks as disjoint as possible, to 1, equal masks.")
    ] = "0,1",
    paths: Annotated[
        str, typer.Option(help="Merge paths; see fedara_core/merge.")
    ] = "allgather,split,allreduce,dense",
    codecs: Annotated[str, typer.Option(help="Codecs of the payload.")] = "fp32",
    iterations: Annotated[int, typer.Option(help="Timed calls of each combination.")] = 20,
    warm_up: Annotated[int, typer.Option(help="Untimed calls before them.")] = 3,
    limit_seconds: Annotated[
        float, typer.Option(help="Time limit of a combination; at least 5 calls are timed.")
    ] = 10.0,
    clients_per_process: Annotated[int, typer.Option(help="Clients of each process.")] = 1,
    max_layout_bytes: Annotated[
        float, typer.Option(help="Leave out (and report) combinations with larger sums.")
    ] = 256e6,
    seed: Annotated[int, typer.Option(help="Seed of masks and values.")] = 0,
    results: Results = RESULTS,
    comm: Comm = "auto",
) -> None:
    """Time every merge path.

    Each result is checked, and the bare library call is timed beside it.
    Options with several values are separated by commas; all combinations are measured. Each launch
    writes one record. Launch again into the same folder for replicates.

    \b
      mpiexec -n 4 fedara micro collectives
      torchrun --nproc-per-node 2 -m bench micro collectives --payload-bytes 1e6
    """
    from bench.micro.collectives import parse_settings, run_collectives

    def job(communicator: "Communicator") -> None:
        settings = parse_settings(
            payload_bytes=payload_bytes,
            densities=densities,
            overlaps=overlaps,
            paths=paths,
            codecs=codecs,
            iterations=iterations,
            warm_up=warm_up,
            limit_seconds=limit_seconds,
            clients_per_process=clients_per_process,
            max_layout_bytes=max_layout_bytes,
            seed=seed,
        )
        run_collectives(settings, results, communicator)

    as_job(comm, job)


@app.command()
def roundtrip(
    clients: Annotated[str, typer.Option(help="Clients per round.")] = ("10,128,1000"),
    methods: Annotated[
        str, typer.Option(help="Methods; see `fedara list methods`.")
    ] = "lora,fedara",
    paths: Annotated[str, typer.Option(help="Merge paths.")] = "allgather,split,allreduce",
    codecs: Annotated[str, typer.Option(help="Codecs of the uploads.")] = "fp32",
    model: Annotated[str, typer.Option(help="The model that carries the adapters.")] = "minilm",
    lora_rank: Annotated[int, typer.Option(help="Triplets of each adapter.")] = 12,
    rounds: Annotated[int, typer.Option(help="Timed rounds of each combination.")] = 20,
    results: Results = RESULTS,
    comm: Comm = "auto",
) -> None:
    """Time rounds without training.

    A round is download, upload, exchange and aggregate of real payloads. The same run also times
    two bare loops over the same tensors in one process (one of them copies every client's tensors,
    as messages do), and the library's bare allgather.

    \b
      mpiexec -n 2 fedara micro roundtrip --clients 10,128
    """
    from bench.micro.roundtrip import parse_settings, run_roundtrip

    def job(communicator: "Communicator") -> None:
        settings = parse_settings(
            clients=clients,
            methods=methods,
            paths=paths,
            codecs=codecs,
            model=model,
            lora_rank=lora_rank,
            rounds=rounds,
        )
        run_roundtrip(settings, results, communicator)

    as_job(comm, job)


@app.command()
def scaling(
    cohort: Annotated[
        int, typer.Option(help="Clients per round for strong scaling; 0: skip it.")
    ] = 8,
    clients_per_process: Annotated[
        int, typer.Option(help="Clients per process for weak scaling; 0: skip it.")
    ] = 4,
    methods: Annotated[
        str, typer.Option(help="Methods; see `fedara list methods`.")
    ] = "lora,fedara",
    model: Annotated[str, typer.Option(help="The model to adapt.")] = "minilm",
    max_length: Annotated[int, typer.Option(help="Tokens; longer texts are cut.")] = 64,
    local_steps: Annotated[
        int, typer.Option(help="Optimiser steps of each client, with batches of 16.")
    ] = 2,
    rounds: Annotated[int, typer.Option(help="Timed rounds of each combination.")] = 5,
    results: Results = RESULTS,
    comm: Comm = "auto",
) -> None:
    """Time rounds with training on more and more processes.

    It measures strong and weak scaling. Launch it with several numbers of processes; `fedara
    report` draws them in one figure.

    \b
      for p in 1 2 4; do mpiexec -n $p fedara micro scaling; done
      fedara report results/micro
    """
    from bench.micro.record import names
    from bench.micro.scaling import Settings, check, run_scaling
    from fedara_core.method import method_names

    def job(communicator: "Communicator") -> None:
        settings = Settings(
            cohort=cohort,
            clients_per_process=clients_per_process,
            methods=names("--methods", methods, tuple(method_names())),
            model=model,
            max_length=max_length,
            local_steps=local_steps,
            rounds=rounds,
        )
        run_scaling(check(settings), results, communicator)

    as_job(comm, job)
