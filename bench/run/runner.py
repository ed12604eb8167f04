"""Runs the points of a config one after another in one job; world_rank 0 shows the progress."""

import ctypes
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bench import output
from bench.config.schema import RunConfig
from bench.config.sections import EnergyConfig
from bench.jobs.plan import load_points
from bench.metering.codecarbon import HostEnergy, no_energy, open_energy
from bench.run.cost_table import show_costs
from bench.run.finished import check_finished
from bench.run.job import prepare
from bench.run.lock import locked
from bench.run.record import Recorder
from bench.run.rounds import run
from bench.run.stop import Asked, listening
from fedara_core.comm.base import Communicator
from fedara_core.comm.launch import together
from fedara_core.errors import Diverged, InputError, Interrupted

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt, from malloc.h


def run_all(
    path: Path,
    results: Path,
    overrides: list[str],
    communicator: Communicator,
    index: int | None = None,
) -> None:
    """Run every unfinished point of the config or plan at `path`, or only point `index`.

    world_rank 0 reads the config. All processes raise the same InputError, and all raise
    Interrupted after the round in which one of them gets SIGUSR1 or SIGTERM. A point that diverges
    does not stop the others; its Diverged is raised at the end.
    """
    keep_freed_memory()
    if communicator.world_rank != 0:  # all have the same data and model, and one says so
        warnings.filterwarnings("ignore", module=r"bench\.models\.")
    points = _points(path, results, overrides, communicator, index)
    console = output.console(quiet=communicator.world_rank != 0)
    diverged: list[Diverged] = []
    finished: list[Recorder] = []
    meters = cache(partial(_meters, communicator))  # runs with equal settings share them
    with listening() as asked:
        for title, config, done in points:
            recorder = Recorder(results, config)
            if done:
                _skip(f"{title}: finished earlier", recorder, config, communicator, console)
                continue
            if signal_name := asked.agree(communicator):
                raise Interrupted(f"interrupted by {signal_name}; start again to resume")
            try:
                with _locked(recorder, communicator, console) as done:
                    if done:  # by the job that held the lock until now
                        _skip(f"{title}: finished now", recorder, config, communicator, console)
                        continue
                    _run_point(title, config, communicator, recorder, console, meters, asked)
            except Diverged as error:  # the same on every process
                console.print(f"{title}: {error}", soft_wrap=True)
                diverged.append(error)
            else:
                console.print(f"{title}: done, records in {recorder.run_dir}", soft_wrap=True)
                finished.append(recorder)
    if communicator.world_rank == 0:
        show_costs(finished, console)
    if diverged:
        raise diverged[0]


def _skip(
    title: str,
    recorder: Recorder,
    config: RunConfig,
    communicator: Communicator,
    console: Console,
) -> None:
    """Say that a finished run is skipped. Raises InputError on every process if it is not the run
    that `config` would give here."""

    def check() -> str:
        return check_finished(recorder.run_dir, config) if communicator.world_rank == 0 else ""

    unknown = together(communicator, check)
    console.print("; ".join(filter(None, [f"{title}, skipped", unknown])), soft_wrap=True)


def _run_point(
    title: str,
    config: RunConfig,
    communicator: Communicator,
    recorder: Recorder,
    console: Console,
    meters: Callable[[EnergyConfig, torch.device], HostEnergy],
    asked: Asked,
) -> None:
    """Run one point to its end."""
    set_threads(config.system.threads, communicator)
    console.print(f"{title}: preparing")
    job = prepare(config, communicator)
    console.print(f"{title}: {job.data_summary}", soft_wrap=True)
    if communicator.world_size > config.num_drawn:
        console.print(
            f"{communicator.world_size} processes share a cohort of {config.num_drawn} clients: "
            "some processes have no client to train"
        )
    energy = meters(config.energy, job.device)
    with _progress(console, config) as report:
        run(
            *(job, communicator, recorder, report, energy, asked),
            lambda text: console.print(f"{title}: {text}", soft_wrap=True),
        )


@contextmanager
def _locked(recorder: Recorder, communicator: Communicator, console: Console) -> Iterator[bool]:
    """Lock the run's folder, world_rank 0 for all processes; yields whether the run is finished.
    Raises InputError if another job holds the lock."""
    with ExitStack() as stack:

        def lock() -> None:
            if communicator.world_rank != 0:
                return
            try:
                taken_over = stack.enter_context(locked(recorder.run_dir))
            except OSError as error:
                raise InputError(
                    f"{recorder.run_dir}: {error.strerror}; allowed: a folder with room to write to"
                ) from None
            if taken_over:
                console.print(taken_over, soft_wrap=True)

        together(communicator, lock)
        yield communicator.broadcast(b"\1" if recorder.done else b"\0") == b"\1"


def _meters(communicator: Communicator, config: EnergyConfig, device: torch.device) -> HostEnergy:
    """The energy meters for these settings; all processes call it together."""
    if not config.enabled:
        return no_energy("energy.enabled = false")
    on_gpu = device.type == "cuda"
    return open_energy(
        country_iso_code=config.country_iso_code,
        idle_seconds=config.idle_seconds,
        gpu=f"GPU-{torch.cuda.get_device_properties(device).uuid}" if on_gpu else None,
        communicator=communicator,
    )


def keep_freed_memory() -> None:
    """Let glibc keep up to 512 MB of freed memory for the next allocation (mallopt(3)).

    By itself it returns large blocks, and each step of a real round then touches the pages of its
    activations anew: without this a round of MiniLM takes 4 % longer (4 clients, 5 steps of 16
    texts, one thread). Settings in the environment stand.
    """
    if any(key.startswith(("MALLOC_MMAP", "MALLOC_TRIM", "GLIBC_TUNABLES")) for key in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 512 << 20)


def set_threads(wanted: int | str, communicator: Communicator) -> None:
    """Use the same number of threads on every process, since the bits depend on it. "auto" divides
    each host's cores among its processes; the smallest share counts."""
    mine = _num_threads(wanted, communicator.host_size, os.environ)
    everyone = communicator.gather_bytes(str(mine).encode())
    torch.set_num_threads(min(int(number) for number in everyone))


def _num_threads(wanted: int | str, host_size: int, environ: Mapping[str, str]) -> int:
    if isinstance(wanted, int):
        return wanted
    for key in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        if environ.get(key, "").isdigit():
            return max(1, int(environ[key]))
    return max(1, len(os.sched_getaffinity(0)) // host_size)


def _points(
    path: Path, results: Path, overrides: list[str], communicator: Communicator, index: int | None
) -> list[tuple[str, RunConfig, bool]]:
    """Title, config and whether it is finished, for each point. world_rank 0 reads for all."""

    def read() -> bytes:
        if communicator.world_rank != 0:
            return b""
        configs = load_points(path, overrides, index)
        _make_folder(results)
        done = [Recorder(results, config).done for config in configs]
        return json.dumps([[c.model_dump_json() for c in configs], done]).encode()

    texts, done = json.loads(communicator.broadcast(together(communicator, read)))
    configs = [RunConfig.model_validate_json(text) for text in texts]
    titles = [f"[{n}/{len(configs)}] {c.run_id}" for n, c in enumerate(configs, start=1)]
    return list(zip(titles, configs, done, strict=True))


def _make_folder(results: Path) -> None:
    try:
        results.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(results, os.W_OK) else "not writable"
    except OSError as error:
        reason = str(error.strerror)
    if reason:
        raise InputError(f"--results {results}: {reason}; allowed: a folder that can be written to")


@contextmanager
def _progress(console: Console, config: RunConfig) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that shows a round on world_rank 0: as a bar on a terminal, else as a line."""
    num_rounds = config.federation.num_rounds
    bar = Progress(
        TextColumn(config.method.name),
        BarColumn(bar_width=20),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=console,
        disable=console.quiet or not console.is_terminal,
    )

    def report(row: dict[str, Any]) -> None:
        text = f"round {row['round_index'] + 1}/{num_rounds}"
        if "num_arrived" in row:
            text += f"  arrived {row['num_arrived']} of {len(row['cohort'])}"
        if "train_loss" in row:
            text += f"  loss {row['train_loss']:.3f}"
        if "accuracy" in row:
            text += f"  accuracy {100 * row['accuracy']:5.1f} %"
        bar.update(task, completed=row["round_index"] + 1, description=text)
        if console.is_terminal:
            return
        text += f"  up {row['uplink_bytes'] / 1e6:.2f} MB  live {row['live_triplets']}"
        console.print(f"{text}  {row['seconds']['total']:.1f} s", soft_wrap=True)

    with bar:
        task = bar.add_task("", total=num_rounds)
        yield report
