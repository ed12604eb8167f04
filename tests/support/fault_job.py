"""The real command line with a fault in one process.

fault_job.py KIND WORLD_RANK STAMP RESULTS ARGS: the fault comes in round 1 (counted from 0), and
STAMP gets the time of it. KIND: raise, or the signal SIGKILL, SIGUSR1 or SIGTERM, in the first
client's training; nan, short, nothing in its upload (values that are no numbers, too few of them,
none at all); dropped, its upload lost on the way; cut in the packed messages (the last bytes
missing), header in the packed headers (the first byte another).
"""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import cli
from bench.run import clients, rounds
from fedara_core.merge import gathered, mean
from fedara_core.method import Method
from fedara_core.wire import Upload, is_finite


class Fault:
    """Knows whether the fault is due, and notes when it comes."""

    def __init__(self, kind: str, world_rank: int, stamp: Path, results: Path) -> None:
        self.kind, self.world_rank, self.stamp, self.results = kind, world_rank, stamp, results
        self.here = (-1, -1)  # round_index, world_rank

    def due(self, *kinds: str) -> bool:
        if self.kind not in kinds or self.here != (1, self.world_rank) or self.stamp.exists():
            return False
        # Round 0 is on disk once it has a checkpoint; world_rank 0 may be behind this one.
        while not list(self.results.glob("*/checkpoint.safetensors")):
            time.sleep(0.01)
        self.stamp.write_text(repr(time.time()))
        return True


def with_values(upload: Upload, values: torch.Tensor) -> Upload:
    """The upload with these values, as its client would have announced them."""
    finite = is_finite(values)
    header = replace(upload.header, num_values=values.numel(), finite=finite)
    return replace(upload, header=header, values=values)


def damage(fault: Fault) -> None:
    """Put the fault's ways into the program."""
    one_round, start_client = rounds.one_round, clients.start_client
    open_exchange, pack_header = rounds.open_exchange, mean.pack_header
    exchange_packed = gathered.Gathering.exchange

    def noting(job: Any, state: Any, communicator: Any, meter: Any) -> Any:
        fault.here = state.round_index, communicator.world_rank
        return one_round(job, state, communicator, meter)

    def starting(client: Any, method: Any, training: Any, state: Any) -> None:
        if fault.due("SIGKILL", "SIGUSR1", "SIGTERM"):
            os.kill(os.getpid(), signal.Signals[fault.kind])
        if fault.due("raise"):
            raise RuntimeError("injected")
        start_client(client, method, training, state)

    def opening(*arguments: Any) -> Any:
        exchange = open_exchange(*arguments)
        add = exchange.add

        def adding(upload: Any) -> None:
            if fault.due("nan"):
                upload = with_values(upload, torch.full_like(upload.values, torch.nan))
            if fault.due("short"):
                upload = with_values(upload, upload.values[:-3])
            if not fault.due("dropped"):
                add(upload)

        exchange.add = adding
        return exchange

    def exchanging(exchange: Any) -> None:
        if fault.due("cut"):
            exchange._own[-1] = exchange._own[-1][:-5]
        exchange_packed(exchange)

    def packing_header(header: Any) -> bytes:
        packed = pack_header(header)
        return b"\x17" + packed[1:] if fault.due("header") else packed

    rounds.one_round, rounds.open_exchange = noting, opening
    clients.start_client = starting
    gathered.Gathering.exchange = exchanging  # type: ignore[method-assign]
    mean.pack_header = packing_header
    uploading = Method.upload

    def silent(method: Any, client: Any, state: Any) -> Any:
        return None if fault.due("nothing") else uploading(method, client, state)

    Method.upload = silent  # type: ignore[method-assign]


def main() -> None:
    kind, world_rank, stamp, results = sys.argv[1:5]
    sys.argv[1:] = sys.argv[5:]
    damage(Fault(kind, int(world_rank), Path(stamp), Path(results)))
    cli.main()


if __name__ == "__main__":
    main()
