"""kill -9 at random moments, and the job started again each time.

kill_job.py RESULTS SEED KILLS run CONFIG --set KEY=VALUE ...: runs that as two processes of
torch.distributed, forked from this one so that nothing is imported anew, and kills one of them;
the other gets SIGTERM, as torchrun sends it. Every second moment is any time of the job; the others
are moments of one phase of a round after another, which the processes tell in shared memory. Prints
one JSON object a kill. A run that gets through is followed by another one, in RESULTS/0, RESULTS/1
and so on.
"""

import json
import mmap
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch

from bench import cli
from bench.config.load import load_runs
from bench.metering.meter import PHASES, Meter
from bench.run.job import prepare
from fedara_core.comm.base import Communicator

WORLD_SIZE = 2
END_SECONDS = 20  # for the process that is left
TARGETS = ("local_train", "exchange", "checkpoint", "aggregate")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tell_phases(shared: mmap.mmap, world_rank: int) -> None:
    """Note the phase that the process is in, 1 + its index; 0 before the first."""
    phase = Meter.phase

    @contextmanager
    def telling(meter: Meter, name: str) -> Iterator[None]:
        shared[world_rank] = 1 + PHASES.index(name)
        with phase(meter, name):
            yield

    Meter.phase = telling  # type: ignore[method-assign, assignment]


def start(world_rank: int, port: int, shared: mmap.mmap, words: list[str]) -> int:
    """Fork a process of the job; its pid."""
    pid = os.fork()
    if pid:
        return pid
    os.environ |= {
        "RANK": str(world_rank),
        "WORLD_SIZE": str(WORLD_SIZE),
        "LOCAL_RANK": str(world_rank),
        "LOCAL_WORLD_SIZE": str(WORLD_SIZE),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    tell_phases(shared, world_rank)
    _leave(words)


def _leave(words: list[str]) -> NoReturn:
    code: object = 1
    try:
        cli.app(words, prog_name="fedara")
    except SystemExit as exit_:
        code = exit_.code or 0
    finally:
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)


def ended(pid: int) -> bool:
    return os.waitpid(pid, os.WNOHANG)[0] == pid


def wait_for_moment(
    target: str | None, victim: int, pids: list[int], shared: mmap.mmap, draw: random.Random
) -> bool:
    """Return after a random number of starts of the phase, or at any time; False if too late."""
    left = draw.randint(1, 6)
    end = time.monotonic() + draw.uniform(0.0, 1.0)
    before = 0
    while not ended(pids[victim]):
        now = shared[victim]
        if target is None:
            if time.monotonic() > end:
                return True
        elif now != before and now == 1 + PHASES.index(target):
            left -= 1
            if not left:
                time.sleep(draw.uniform(0, 0.004))
                return True
        before = now
    pids[victim] = 0
    return False


def one_try(results: Path, target: str | None, draw: random.Random, words: list[str]) -> bool:
    """Start the job and kill a process at a moment of the target; False if it got through."""
    shared = mmap.mmap(-1, WORLD_SIZE)
    port = free_port()
    pids = [start(world_rank, port, shared, words) for world_rank in range(WORLD_SIZE)]
    victim = draw.randrange(WORLD_SIZE)
    killed = wait_for_moment(target, victim, pids, shared, draw)
    phase = shared[victim]
    if killed:
        os.kill(pids[victim], signal.SIGKILL)
        os.kill(pids[1 - victim], signal.SIGTERM)
    start_time = time.monotonic()
    for pid in filter(None, pids):
        while not ended(pid):
            if time.monotonic() > start_time + END_SECONDS:
                os.kill(pid, signal.SIGKILL)
                raise SystemExit(f"process {pid} outlived the killed one by {END_SECONDS} s")
            time.sleep(0.005)
    digests = [
        json.loads(line)["state_digest"]
        for file in results.glob("*/rounds.jsonl")
        for line in file.read_text().split("\n")[:-1]
    ]
    if killed:
        told = {"phase": PHASES[phase - 1] if phase else "start", "world_rank": victim}
        sys.stdout.write(json.dumps({**told, "folder": results.name, "digests": digests}) + "\n")
        sys.stdout.flush()
    return killed


def main() -> None:
    results, seed, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    (config,) = load_runs(Path(sys.argv[5]), sys.argv[7::2])
    prepare(config, Communicator())  # imports what a job imports, once for all of them
    draw = random.Random(seed)
    killed = folder = 0
    while killed < kills:
        own = results / str(folder)
        words = [*sys.argv[4:], "--comm", "torch", "--results", str(own)]
        target = None if killed % 2 else TARGETS[killed // 2 % len(TARGETS)]
        if one_try(own, target, draw, words):
            killed += 1
        else:
            folder += 1  # that run got through; another one follows


if __name__ == "__main__":
    main()
