"""`fedara micro`: micro-benchmarks of the suite itself."""

from pathlib import Path
from typing import Annotated

import typer

from bench.commands import Comm, Results, as_job

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Micro-benchmarks of the suite itself."
)
RESULTS = Path("results/micro")
Methods = Annotated[str, typer.Option(help="Methods; see `fedara list methods`.")]


@app.command()
def overhead(
    repeats: Annotated[
        int, typer.Option(min=1, help="Pairs of rounds; the result is their median.")
    ] = 5,
    model: Annotated[str, typer.Option(help="The model to train.")] = "minilm",
    max_length: Annotated[int, typer.Option(help="Tokens; longer texts are cut.")] = 64,
    results: Results = RESULTS,
) -> None:
    """Compare a round with a bare PyTorch loop.

    The loop takes the same optimiser steps on the same batches, in one process. Each launch is one
    record: launch again for a replicate, into the same folder; fedara report makes a table of them.
    """
    from bench.micro.overhead import Settings, run_overhead

    settings = Settings(repeats=repeats, model=model, max_length=max_length)
    as_job("serial", lambda communicator: run_overhead(settings, results, communicator))


@app.command()
def step(
    model: Annotated[str, typer.Option(help="The model to train.")] = "minilm",
    methods: Methods = "lora",
    precision: Annotated[str, typer.Option(help="Precisions of both loops.")] = "fp32,bf16",
    lengths: Annotated[
        str,
        typer.Option(
            help='"full": every text has max_length tokens; or data sets, such as docstrings or '
            "file:DIR, whose texts have the lengths that they have."
        ),
    ] = "full",
    max_length: Annotated[int, typer.Option(help="Tokens; longer texts are cut.")] = 64,
    repeats: Annotated[int, typer.Option(help="Timed steps of each loop.")] = 10,
    results: Results = RESULTS,
) -> None:
    """Compare a local step with a bare PEFT loop, lever by lever.

    The loop trains transformers' classifier with PEFT's LoRA layers on the same texts, padded to
    max_length. The suite's step runs with all that makes it fast, with each lever off, and with
    none. All take turns in one process. Each launch is one record: launch again for a replicate,
    into the same folder; fedara report makes a table and a figure of them. It needs PEFT.

    \b
      fedara micro step --lengths full,docstrings
    """
    from bench.micro.record import least, names
    from bench.micro.step import PRECISIONS, Settings, run_step
    from fedara_core.method import method_names

    settings = Settings(
        model=model,
        methods=names("--methods", methods, tuple(method_names())),
        precisions=names("--precision", precision, PRECISIONS),
        lengths=tuple(lengths.split(",")),
        max_length=max_length,
        repeats=least("--repeats", repeats, 1),
    )
    as_job("serial", lambda communicator: run_step(settings, results, communicator))


@app.command()
def collectives(
    runs: Annotated[
        str,
        typer.Option(help="Folders of runs: time the masks and sizes of their next round instead."),
    ] = "",
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
      torchrun --no-python --nproc-per-node 2 fedara micro collectives --payload-bytes 1e6
    """
    from bench.micro.collectives import MIN_WARM_UP, Settings, run_collectives
    from bench.micro.record import least, names, numbers
    from fedara_core.codec import CODECS
    from fedara_core.merge.cost import PATHS

    def settings() -> Settings:  # in the job, whose processes refuse together
        return Settings(
            runs=tuple(folder for folder in runs.split(",") if folder),
            payload_bytes=numbers("--payload-bytes", payload_bytes, 64, 1e12),
            densities=numbers("--densities", densities, 1e-6, 1),
            overlaps=numbers("--overlaps", overlaps, 0, 1),
            paths=names("--paths", paths, PATHS),
            codecs=names("--codecs", codecs, CODECS),
            iterations=least("--iterations", iterations, 1),
            warm_up=least("--warm-up", warm_up, MIN_WARM_UP),
            limit_seconds=least("--limit-seconds", limit_seconds, 0.001),
            clients_per_process=least("--clients-per-process", clients_per_process, 1),
            max_layout_bytes=least("--max-layout-bytes", max_layout_bytes, 1),
            seed=seed,
        )

    as_job(comm, lambda communicator: run_collectives(settings(), results, communicator))


@app.command()
def roundtrip(
    clients: Annotated[str, typer.Option(help="Clients per round.")] = "10,128,1000",
    methods: Methods = "lora,fedara",
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
    from bench.micro.record import names, numbers
    from bench.micro.roundtrip import Settings, run_roundtrip
    from fedara_core.codec import CODECS
    from fedara_core.merge.cost import PATHS
    from fedara_core.method import method_names

    def settings() -> Settings:  # in the job, whose processes refuse together
        return Settings(
            clients=tuple(map(int, numbers("--clients", clients, 1, 1e6))),
            methods=names("--methods", methods, tuple(method_names())),
            paths=names("--paths", paths, tuple(path for path in PATHS if path != "dense")),
            codecs=names("--codecs", codecs, CODECS),
            model=model,
            lora_rank=lora_rank,
            rounds=rounds,
        )

    as_job(comm, lambda communicator: run_roundtrip(settings(), results, communicator))


@app.command()
def scaling(
    cohort: Annotated[
        int, typer.Option(help="Clients per round for strong scaling; 0: skip it.")
    ] = 8,
    clients_per_process: Annotated[
        int, typer.Option(help="Clients per process for weak scaling; 0: skip it.")
    ] = 4,
    methods: Methods = "lora,fedara",
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
    from bench.micro.record import least, names
    from bench.micro.scaling import Settings, run_scaling
    from fedara_core.method import method_names

    def settings() -> Settings:  # in the job, whose processes refuse together
        return Settings(
            cohort=least("--cohort", cohort, 0),
            clients_per_process=least("--clients-per-process", clients_per_process, 0),
            methods=names("--methods", methods, tuple(method_names())),
            model=model,
            max_length=max_length,
            local_steps=least("--local-steps", local_steps, 1),
            rounds=least("--rounds", rounds, 1),
        )

    as_job(comm, lambda communicator: run_scaling(settings(), results, communicator))


@app.command()
def prepare(
    dataset: Annotated[str, typer.Option(help="The data set.")] = "docstrings",
    model: Annotated[str, typer.Option(help="The model to adapt.")] = "minilm",
    max_length: Annotated[int, typer.Option(help="Tokens; longer texts are cut.")] = 64,
    results: Results = RESULTS,
    comm: Comm = "auto",
) -> None:
    """Measure seconds and memory of preparing a run on more and more processes.

    Each launch prepares twice: with an empty cache of its own, and with what that left there. Each
    process then trains one step of 16 texts with LoRA.

    \b
      for p in 1 2 4; do mpiexec -n $p fedara micro prepare; done
      fedara report results/micro
    """
    from bench.micro.prepare import Settings, run_prepare

    settings = Settings(dataset=dataset, model=model, max_length=max_length)
    as_job(comm, lambda communicator: run_prepare(settings, results, communicator))
