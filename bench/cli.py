"""The command line: fedara run, sweep, submit, status, report, list, export, doctor, micro."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from analysis.cli import Compare, Costs, Directory, Out
from fedara_core.errors import InputError, Interrupted, JobError

if TYPE_CHECKING:
    from fedara_core.comm.comm import Communicator  # torch: only for those who need it

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Benchmark of federated adaptive-rank fine-tuning on MPI and torch.distributed processes.",
)
micro = typer.Typer(no_args_is_help=True)
COMM_HELP = (
    "auto, serial, mpi, mpi-node (one copy of each message to a host) or torch; auto knows the "
    "launcher."
)
Comm = Annotated[str, typer.Option("--comm", help=COMM_HELP)]
MicroResults = Annotated[
    Path, typer.Option("--results", help="Folder for the records, one folder a launch.")
]
MICRO_RESULTS = Path("results/micro")
app.add_typer(micro, name="micro")


@app.command()
def run(
    config: Annotated[
        Path, typer.Argument(help="A TOML file (see bench/configs), or a plan that sweep wrote.")
    ],
    results: Annotated[
        Path, typer.Option("--results", help="Folder for the records, one folder a run.")
    ] = Path("results/runs"),
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. --set train.lr=3e-3"),
    ] = None,
    no_energy: Annotated[
        bool, typer.Option("--no-energy", help="As --set energy.enabled=false.")
    ] = False,
    comm: Comm = "auto",
    index: Annotated[
        int | None, typer.Option(help="Only this point of the sweep or plan, counted from 0.")
    ] = None,
) -> None:
    """Run a config, or every point of its sweep table, and record each round.

    Finished runs are skipped; a run that was interrupted goes on after its last checkpoint. SIGTERM
    or SIGUSR1 to any process ends the job after its round, with exit code 75; in a Slurm job it is
    also requeued.

    \b
      fedara run bench/configs/quickstart.toml
      mpiexec -n 4 fedara run my.toml --set federation.num_clients=100
      torchrun --nproc-per-node 2 -m bench run my.toml
    """
    from bench.run.runner import run_all

    chosen = [*(overrides or []), *(["energy.enabled=false"] if no_energy else [])]
    _as_job(comm, lambda job: run_all(config, results, chosen, job, index))


PlanArgument = Annotated[Path, typer.Argument(help="A TOML file with a [sweep] table.")]
PlanResults = Annotated[
    Path | None,
    typer.Option("--results", help="Folder for plan, logs and records; results/NAME if not given."),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key.")
]


@app.command()
def sweep(
    config: PlanArgument,
    results: PlanResults = None,
    processes: Annotated[int, typer.Option(min=1, help="MPI processes of each run.")] = 1,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Runs side by side; as many as fit if not given, 1 with energy."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what there is to do.")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Run a sweep on this machine, each point a job of its own; a failure stops no other point.

    The expanded sweep is frozen in a plan file. Start it again to run what is not done.

    \b
      fedara sweep bench/configs/trec6.toml --dry-run
      fedara sweep my.toml --processes 2 --jobs 4 --set federation.num_rounds=20
    """
    from bench.jobs.local import run_sweep
    from bench.jobs.plan import describe, make_plan

    try:
        plan = make_plan(config, results, overrides or [])
        if dry_run:
            for line in describe(plan):
                typer.echo(line)
            return
        succeeded = run_sweep(plan, processes, jobs, Console(highlight=False, markup=False))
    except InputError as error:
        _refuse(error)
    if not succeeded:
        raise typer.Exit(1)


@app.command()
def submit(
    config: PlanArgument,
    site: Annotated[Path, typer.Option(help="A TOML file; see slurm/sites.")],
    results: PlanResults = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the job scripts, submit nothing.")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Submit a sweep to Slurm: a job array, one run a task, then a job that draws the figures.

    Submit it again to run what is not done.

    \b
      fedara submit bench/configs/trec6.toml --site slurm/sites/generic_cpu.toml --dry-run
    """
    from bench.jobs.plan import make_plan
    from bench.jobs.slurm import read_site, submit_plan

    try:
        plan = make_plan(config, results, overrides or [])
        for line in submit_plan(plan, read_site(site), dry_run=dry_run):
            typer.echo(line)
    except InputError as error:
        _refuse(error)


@app.command()
def status(
    results: Annotated[Path, typer.Argument(help="The folder of a sweep: --results.")],
) -> None:
    """Say what runs, what is done, what failed and why, and the accuracy so far."""
    from bench.jobs.status import read_status, show

    try:
        show(read_status(results), Console(highlight=False))
    except InputError as error:
        _refuse(error)


@app.command()
def reproduce(
    run_dir: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    results: Annotated[Path, typer.Option("--results", help="Where the new run goes.")] = Path(
        "results/reproduced"
    ),
    within_points: Annotated[
        float, typer.Option(min=0.0, help="Points of accuracy that other bits may differ by.")
    ] = 2.0,
    overrides: Overrides = None,
    comm: Comm = "auto",
) -> None:
    """Run a record's config again and compare: the same bits, or an accuracy close to it.

    Close: within so many points of the record's, or inside the 95 % interval over its seeds, where
    the record's folder has others. Exit code 1 if it is neither. A data set that was a folder has
    to be named again.

    \b
      fedara reproduce results/published/quickstart/RUN_ID
      mpiexec -n 2 fedara reproduce RUN_DIR --set dataset.name=file:DIR
    """
    from bench.tools.reproduce import reproduce as run_again

    def job(communicator: "Communicator") -> None:
        if not run_again(run_dir, results, overrides or [], within_points, communicator):
            communicator.close()
            raise typer.Exit(1)

    _as_job(comm, job)


@app.command(name="list")
def list_command(
    what: Annotated[str, typer.Argument(help="methods, datasets, models or configs")],
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="For methods: bytes and hyperparameters too.")
    ] = False,
) -> None:
    """Say what there is to choose from."""
    from bench.tools.catalog import CATALOGS, describe_methods

    if what not in CATALOGS:
        _refuse(InputError(f"list {what!r}: allowed: {', '.join(CATALOGS)}"))
    if verbose and what == "methods":
        typer.echo("\n".join(describe_methods()))
        return
    for name, text in CATALOGS[what]():
        typer.echo(f"{name:<14} {text}")


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(help="A run's folder, such as results/runs/RUN_ID.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    client: Annotated[
        int | None,
        typer.Option(help="Whose model, for methods that keep a part of it at the clients."),
    ] = None,
) -> None:
    """Write a run's model for Hugging Face: a PEFT adapter, or a model with merged weights.

    A method whose layers are W0 + scale B A becomes a LoRA folder for PeftModel.from_pretrained;
    the README in it says how to load it.
    """
    from bench.tools.export import export as write

    try:
        typer.echo(f"{out}: {write(run_dir, out, client)}")
    except InputError as error:
        _refuse(error)


@app.command()
def report(
    directory: Directory = None,
    pair: Compare = None,
    out: Out = None,
    costs: Costs = None,
) -> None:
    """Draw all figures and tables from records, without torch; the same as python -m analysis.

    \b
      fedara report results/published/trec6 --out /tmp/figures
      fedara report --compare results/before results/after
    """
    try:
        from analysis.cli import main as analyse
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        _refuse(InputError("report needs matplotlib: pip install 'fedara[analysis]'"))
    analyse(directory, pair, out, costs)


@app.command()
def doctor() -> None:
    """Say what works here (MPI, torch, GPU, energy counters, Slurm, hub), and what to do."""
    from bench.tools.doctor import show

    show(Console())


@micro.command()
def overhead(
    repeats: Annotated[
        int, typer.Option(min=1, help="Pairs of rounds; the median ratio counts.")
    ] = 5,
    model: Annotated[str, typer.Option(help="The model to train.")] = "minilm",
    max_length: Annotated[int, typer.Option(help="Tokens a text is cut to.")] = 64,
) -> None:
    """Seconds per round of the suite against a bare PyTorch loop that does the same steps."""
    from bench.micro.overhead import describe, measure

    try:
        typer.echo(describe(measure(repeats, model, max_length)))
    except InputError as error:
        _refuse(error)


@micro.callback()
def _micro() -> None:
    """Micro-benchmarks of the suite itself."""


@micro.command()
def collectives(
    payload_bytes: Annotated[
        str, typer.Option(help="Bytes of one client's live rows.")
    ] = "10e3,1e6,50e6",
    densities: Annotated[
        str, typer.Option(help="Live rows as a part of the layout.")
    ] = "0.05,0.25,0.5,1",
    overlaps: Annotated[
        str, typer.Option(help="0: masks as disjoint as they can be; 1: equal masks.")
    ] = "0,1",
    paths: Annotated[
        str, typer.Option(help="Merge paths, of fedara_core/merge.")
    ] = "allgather,split,allreduce,dense",
    codecs: Annotated[str, typer.Option(help="Codecs of the payload.")] = "fp32",
    iterations: Annotated[int, typer.Option(help="Timed calls of a combination.")] = 20,
    warm_up: Annotated[int, typer.Option(help="Calls before them.")] = 3,
    limit_seconds: Annotated[
        float, typer.Option(help="Fewer timed calls, but 5, where they would take longer.")
    ] = 10.0,
    clients_per_process: Annotated[int, typer.Option(help="Clients that a process hosts.")] = 1,
    max_layout_bytes: Annotated[
        float, typer.Option(help="Combinations that sum over more are left out, and named.")
    ] = 256e6,
    seed: Annotated[int, typer.Option(help="Of masks and values.")] = 0,
    results: MicroResults = MICRO_RESULTS,
    comm: Comm = "auto",
) -> None:
    """Seconds and bytes of every merge path, each timed call checked, beside the bare library call.

    Axes take several values, separated by commas. One launch is one record: launch again for a
    replicate, into the same folder.

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

    _as_job(comm, job)


@micro.command()
def roundtrip(
    clients: Annotated[str, typer.Option(help="Clients of a round, all of them at once.")] = (
        "10,128,1000"
    ),
    methods: Annotated[str, typer.Option(help="Methods; fedara list methods.")] = "lora,fedara",
    paths: Annotated[str, typer.Option(help="Merge paths.")] = "allgather,split,allreduce",
    codecs: Annotated[str, typer.Option(help="Codecs of the uploads.")] = "fp32",
    model: Annotated[str, typer.Option(help="The model whose adapters travel.")] = "minilm",
    lora_rank: Annotated[int, typer.Option(help="Triplets of each adapter.")] = 12,
    rounds: Annotated[int, typer.Option(help="Timed rounds of a combination.")] = 20,
    results: MicroResults = MICRO_RESULTS,
    comm: Comm = "auto",
) -> None:
    """Rounds per second without training: download, upload, exchange, aggregate, real payloads.

    Beside it bare loops over the same tensors in one process, without messages and with a copy of
    every client's tensors, and the library's bare allgather.

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

    _as_job(comm, job)


@micro.command()
def scaling(
    cohort: Annotated[int, typer.Option(help="Clients of a round, strong scaling; 0: none.")] = 8,
    clients_per_process: Annotated[
        int, typer.Option(help="Clients of each process, weak scaling; 0: none.")
    ] = 4,
    methods: Annotated[str, typer.Option(help="Methods; fedara list methods.")] = "lora,fedara",
    model: Annotated[str, typer.Option(help="The model to adapt.")] = "minilm",
    max_length: Annotated[int, typer.Option(help="Tokens of an example.")] = 64,
    local_steps: Annotated[int, typer.Option(help="Steps of each client, batches of 16.")] = 2,
    rounds: Annotated[int, typer.Option(help="Timed rounds of each.")] = 5,
    results: MicroResults = MICRO_RESULTS,
    comm: Comm = "auto",
) -> None:
    """Seconds of a round of real training: strong and weak scaling over processes.

    Launch it with several numbers of processes; fedara report draws them in one figure.

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

    _as_job(comm, job)


def _as_job(comm: str, action: Callable[["Communicator"], None]) -> None:
    """Run `action` on every process; wrong input ends them all with code 2, any error the job."""
    from fedara_core.comm.comm import abort_on_error, open_communicator

    try:
        communicator = open_communicator(comm)
    except InputError as error:
        _refuse(error)
    try:
        action(communicator)
    except InputError as error:  # raised on every process alike
        communicator.close()
        _refuse(error, quiet=communicator.world_rank != 0)
    except Interrupted as error:  # likewise
        _end_for_now(error, communicator)
    except JobError as error:  # the others wait for this process
        sys.stderr.write(f"fedara: {error}\n")
        if communicator.world_size == 1:
            raise typer.Exit(1) from None
        sys.stderr.flush()
        communicator.abort()
    except typer.Exit:  # likewise
        raise
    except BaseException as error:
        if communicator.world_size == 1:
            raise
        abort_on_error(communicator, error)
    communicator.close()


def _end_for_now(error: Interrupted, communicator: "Communicator") -> NoReturn:
    """Say what was interrupted, have Slurm start the job again, and leave."""
    from bench.jobs.slurm_job import requeue

    communicator.close()
    if communicator.world_rank == 0:
        lines = [str(error), requeue()]
        sys.stderr.write("".join(f"fedara: {line}\n" for line in lines if line))
    raise typer.Exit(error.exit_code)


def _refuse(error: InputError, *, quiet: bool = False) -> NoReturn:
    if not quiet:
        sys.stderr.write(f"fedara: {error}\n")
    raise typer.Exit(2)


def main() -> None:
    """The console script."""
    plain = warnings.formatwarning

    def format_warning(  # ours are for readers: one line, without the place in the code
        message: Warning | str,
        category: type[Warning],
        file: str,
        number: int,
        line: str | None = None,
    ) -> str:
        if Path(__file__).parent in Path(file).parents:
            return f"warning: {message}\n"
        return plain(message, category, file, number, line)

    warnings.formatwarning = format_warning
    app(prog_name="fedara")
