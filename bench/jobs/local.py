"""Runs a plan on this machine, each run as a job of its own, several at a time."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live

from bench.ask import beside, own_command
from bench.config.schema import RunConfig
from bench.jobs.plan import Plan
from bench.jobs.status import RunStatus, exit_line, last_lines, look, started_as_process, table
from fedara_core.comm.launch import detect
from fedara_core.errors import InputError

_POLL_SECONDS = 0.2
_END_SECONDS = 10.0  # for a launcher to end what it started
_SHOWN_LINES = 10  # of a failed run's log


@dataclass(frozen=True, kw_only=True)
class _Running:
    index: int
    process: subprocess.Popen[bytes]
    start: float


def run_sweep(plan: Plan, processes: int, jobs: int | None, console: Console) -> bool:
    """Run what is not finished; returns whether all of it succeeded. Raises InputError. processes:
    of each run. jobs: runs at the same time, by default `side_by_side`."""
    if detect(os.environ) != "serial":
        raise InputError("fedara sweep starts the processes itself; allowed: without a launcher")
    launcher = [beside(sys.executable, "mpiexec"), "-n", str(processes)] if processes > 1 else []
    jobs = jobs or side_by_side(plan.runs, processes, num_cores())
    if jobs > 1 and any(run.energy.enabled for run in plan.runs):
        raise InputError(
            f"--jobs {jobs}: energy counters measure the whole host, and so all of these runs "
            "together; allowed: --jobs 1, or --set energy.enabled=false"
        )
    plan.write()
    left = plan.left()
    done = len(plan.runs) - len(left)
    console.print(
        f"{plan.path}: {len(plan.runs)} runs, {done} of them done; processes of each run: "
        f"{processes}, runs at the same time: {jobs}",
        soft_wrap=True,
    )
    failed = _run_lines(plan, deque(left), launcher, processes, jobs, console)
    for index in failed:
        log = plan.log(index)
        console.print(f"\nfailed: {plan.runs[index].run_id}, log in {log}", soft_wrap=True)
        text = "\n".join(f"  {line}" for line in last_lines(log, _SHOWN_LINES))
        console.print(text, soft_wrap=True)
    console.print(f"{len(plan.runs) - len(failed)} runs done, {len(failed)} failed")
    return not failed


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def side_by_side(runs: tuple[RunConfig, ...], processes: int, cores: int) -> int:
    """How many runs fit on the cores at the same time: one, unless all runs use the CPU, set their
    number of threads, and measure no energy."""
    if any(run.energy.enabled for run in runs):
        return 1
    threads = [run.system.threads for run in runs if run.system.device == "cpu"]
    numbers = [number for number in threads if isinstance(number, int)]
    if len(numbers) < len(runs):
        return 1
    return max(1, cores // (processes * max(numbers)))


def _run_lines(
    plan: Plan,
    waiting: deque[int],
    launcher: list[str],
    processes: int,
    jobs: int,
    console: Console,
) -> list[int]:
    """Run these lines of the plan; returns those that failed."""
    # MPICH and Intel MPI: without these, Slurm's variables of a batch script or a container make
    # mpiexec wait for srun without a word. All processes are of this host.
    environment = {"HYDRA_LAUNCHER": "fork", "HYDRA_RMK": "user", **os.environ}
    if jobs > 1:  # else each run would use all cores
        environment.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // (processes * jobs))))
    failed: list[int] = []
    running: list[_Running] = []
    with (
        _ended_with_sweep(running),
        Live(console=console, transient=True, refresh_per_second=2) as live,
    ):
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(plan, waiting.popleft(), launcher, environment))
                console.print(f"{_title(plan, running[-1])}: started", soft_wrap=True)
            time.sleep(_POLL_SECONDS)
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                if not _finish(plan, run, console):
                    failed.append(run.index)
            if console.is_terminal:
                live.update(table([_look(plan, run.index) for run in running]))
    return failed


def _start(plan: Plan, index: int, launcher: list[str], environment: dict[str, str]) -> _Running:
    words = [*launcher, *own_command(), "run", str(plan.path)]
    words += ["--index", str(index), "--results", str(plan.results)]
    with plan.log(index).open("ab") as log:  # behind those of earlier tries
        process = subprocess.Popen(
            words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        log.write(started_as_process(process.pid).encode())
    return _Running(index=index, process=process, start=time.monotonic())


def _finish(plan: Plan, run: _Running, console: Console) -> bool:
    """Print how a run ended; returns whether it is done. A failure goes into its log, too."""
    code = run.process.returncode
    done = code == 0 and (plan.results / plan.runs[run.index].run_id / "DONE").exists()
    if not done:
        with plan.log(run.index).open("a", encoding="utf-8") as log:
            log.write(exit_line(code))
    found = _look(plan, run.index)
    seconds = time.monotonic() - run.start
    accuracy = "" if found.accuracy is None else f", accuracy {100 * found.accuracy:.1f} %"
    text = f"done in {seconds:.0f} s{accuracy}" if done else f"{found.state}: {found.reason}"
    console.print(f"{_title(plan, run)}: {text}", soft_wrap=True)
    return done


def _look(plan: Plan, index: int) -> RunStatus:
    config = plan.runs[index]
    run_dir: Path = plan.results / config.run_id
    return look(run_dir, config.federation.num_rounds, [plan.log(index)])


def _title(plan: Plan, run: _Running) -> str:
    return f"[{run.index + 1}/{len(plan.runs)}] {plan.runs[run.index].run_id}"


@contextmanager
def _ended_with_sweep(running: list[_Running]) -> Iterator[None]:
    """End what is still running when the sweep ends, also by ^C or SIGTERM."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        for run in running:
            run.process.terminate()
        for run in running:
            try:
                run.process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                run.process.kill()
