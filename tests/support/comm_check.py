"""One process of launch.checked(): every collective, the byte counters and all merge paths.

comm_check.py KIND WORLD_SIZE: prints "OK NAME" for each of CASES[KIND], and "OK merge paths".
comm_check.py large: messages beyond 2^31 bytes, then "OK large".
"""

import importlib
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from fedara_core.comm import mpi, node
from fedara_core.comm.base import Communicator
from fedara_core.comm.launch import open_communicator
from fedara_core.comm.mpi import MpiCommunicator
from fedara_core.comm.node import NodeCommunicator
from fedara_core.errors import InputError
from support import merge_check

T = TypeVar("T")

HOST_PROCESSES = 2  # of each host that one machine plays

# What each launcher's job checks: name -> how to open it.
CASES: dict[str, dict[str, Callable[[], Communicator]]] = {
    "serial": {"serial": partial(open_communicator, "auto")},
    "torch": {"torch": partial(open_communicator, "auto")},
    "mpi": {
        "mpi": partial(open_communicator, "auto"),
        "mpi-node": partial(open_communicator, "mpi-node"),
        "mpi, hosts": partial(MpiCommunicator, host_processes=HOST_PROCESSES),
        "mpi-node, hosts": partial(NodeCommunicator, host_processes=HOST_PROCESSES),
    },
}

# Bytes of each world_rank, taken modulo the length for more processes.
SIZES = ((3, 0, 5, 1), (0, 0, 0, 0), (0, 9, 0, 0), (100_000, 1, 0, 7), (4, 4, 4, 4))


def contents(world_rank: int, num_bytes: int) -> Tensor:
    return ((torch.arange(num_bytes) * 31 + 17 * world_rank) % 256).to(torch.uint8)


def moved(communicator: Communicator, action: Callable[[], T]) -> tuple[T, tuple[int, int]]:
    """What action() returns, and the bytes that it sent and received."""
    sent, received = communicator.traffic.sent, communicator.traffic.received
    result = action()
    return result, (communicator.traffic.sent - sent, communicator.traffic.received - received)


def expected_traffic(
    kind: str, sizes: list[int], world_rank: int, per_host: int
) -> tuple[int, int]:
    """By hand: an 8-byte count and the bytes to and from each other process; torch pads.

    mpi-node: the first process of each host gets every message, and sends its host's to the first
    of each other host; the others send theirs to the first of their host.
    """
    others = len(sizes) - 1
    if kind == "mpi-node":
        lead = world_rank - world_rank % per_host
        if world_rank != lead:
            return sizes[world_rank] + 8 * others, 8 * others
        host = sum(sizes[lead : lead + per_host])
        num_others = (len(sizes) - 1) // per_host
        return host * num_others + 8 * others, sum(sizes) - sizes[world_rank] + 8 * others
    if kind == "torch":
        return ((max(sizes) + 8) * others,) * 2
    mine = sizes[world_rank]
    return (mine + 8) * others, sum(sizes) - mine + 8 * others


def check_allgather(communicator: Communicator, per_host: int) -> None:
    for case in SIZES:
        sizes = [case[rank % len(case)] for rank in range(communicator.world_size)]
        mine = contents(communicator.world_rank, sizes[communicator.world_rank])
        gathered, traffic = moved(communicator, partial(communicator.allgather, mine))
        assert len(gathered) == communicator.world_size
        for rank, part in enumerate(gathered):
            assert part.dtype == torch.uint8
            assert torch.equal(part, contents(rank, sizes[rank])), (case, rank)
        wanted = expected_traffic(communicator.kind, sizes, communicator.world_rank, per_host)
        assert traffic == wanted, (case, traffic, wanted)
        gathered, traffic = moved(communicator, partial(communicator.allgather, mine, sizes))
        for rank, part in enumerate(gathered):
            assert torch.equal(part, contents(rank, sizes[rank])), (case, rank)
        size_bytes = 8 * (communicator.world_size - 1)
        assert traffic == tuple(moved - size_bytes for moved in wanted), (case, traffic, wanted)
    every_second = contents(communicator.world_rank, 20)[::2]  # not contiguous
    for rank, part in enumerate(communicator.allgather(every_second)):
        assert torch.equal(part, contents(rank, 20)[::2]), rank


def check_alltoall(communicator: Communicator) -> None:
    """world_rank p sends 3 p + q bytes to q; the first to itself are none."""
    world_rank, world_size = communicator.world_rank, communicator.world_size
    sent = [contents(world_rank, 3 * world_rank + q) for q in range(world_size)]
    received, traffic = moved(communicator, partial(communicator.alltoall, sent))
    for rank, part in enumerate(received):
        assert torch.equal(part, contents(rank, 3 * rank + world_rank)), rank
    others = [rank for rank in range(world_size) if rank != world_rank]
    size_bytes = 16 if communicator.kind.startswith("mpi") else 8
    wanted = (
        sum(3 * world_rank + q + size_bytes for q in others),
        sum(3 * q + world_rank + size_bytes for q in others),
    )
    assert traffic == wanted, (traffic, wanted)
    counts = [[3 * p + q for q in range(world_size)] for p in range(world_size)]
    received, traffic = moved(communicator, partial(communicator.alltoall, sent, counts))
    for rank, part in enumerate(received):
        assert torch.equal(part, contents(rank, 3 * rank + world_rank)), rank
    size_bytes *= len(others)
    assert traffic == tuple(moved - size_bytes for moved in wanted), (traffic, wanted)


def check_room(communicator: Communicator) -> None:
    """Messages that were put together where the communicator has room for them, longer each time;
    in the second call nothing goes to oneself, as merge paths have it."""
    world_rank, world_size = communicator.world_rank, communicator.world_size
    for base in (0, 5, 3000):
        sizes = [base + 7 * rank for rank in range(world_size)]
        room = communicator.room("allgather", sizes)
        assert room.shape == (sizes[world_rank],)
        room.copy_(contents(world_rank, len(room)))
        gathered, traffic = moved(communicator, partial(communicator.allgather, room, sizes))
        for rank, part in enumerate(gathered):
            assert torch.equal(part, contents(rank, sizes[rank])), rank
        counts = [[0 if p == q else base + p for q in range(world_size)] for p in range(world_size)]
        room = communicator.room("alltoall", [sum(row) for row in counts])
        for piece in room.split_with_sizes(counts[world_rank]):
            piece.copy_(contents(world_rank, len(piece)))
        pieces = list(room.split_with_sizes(counts[world_rank]))
        received, traffic = moved(communicator, partial(communicator.alltoall, pieces, counts))
        for rank, part in enumerate(received):
            assert torch.equal(part, contents(rank, counts[rank][world_rank])), rank
        others = [rank for rank in range(world_size) if rank != world_rank]
        assert traffic == (len(room), sum(base + rank for rank in others)), traffic


def check_shared_memory(communicator: Communicator) -> None:
    """A window that its host has no room for is refused on every process, and the next one is not.

    The host of the first process has too little; one process by itself needs nothing.
    """
    if communicator.kind != "mpi-node":
        return
    world_rank, world_size = communicator.world_rank, communicator.world_size
    counts = [2_000_000 // world_size] * world_size
    with pytest.MonkeyPatch.context() as patch:
        usage = SimpleNamespace(free=1000 if communicator.host_of[world_rank] == 0 else 10**9)
        patch.setattr(node.shutil, "disk_usage", lambda path: usage)
        if communicator.host_of.count(0) > 1:
            with pytest.raises(InputError, match=r"take 2 MB.*has 0 MB free; allowed: a larger"):
                communicator.room("allgather", counts)
        else:
            communicator.allgather(communicator.room("allgather", counts), counts)
    assert communicator.gather_bytes(b"still here") == [b"still here"] * world_size
    # A window that grows needs room for the new one alone.
    before = node.shutil.disk_usage("/dev/shm").free
    for size in (10_000_000, 20_000_000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(node.shutil, "disk_usage", lambda path: left(before, 25_000_000))
            counts = [size // world_size] * world_size
            communicator.allgather(communicator.room("allgather", counts), counts)


def left(before: int, size: int) -> SimpleNamespace:
    """What would be left of shared memory that had `size` bytes where it had `before` left."""
    taken = before - _disk_usage("/dev/shm").free
    return SimpleNamespace(free=size - taken)


_disk_usage = shutil.disk_usage


def check_known_counts(communicator: Communicator) -> None:
    """Who sends other than what all expect says so before anybody waits for the rest."""
    if communicator.world_size == 1:
        return
    wrong = [5] * communicator.world_size
    for call in (
        partial(communicator.allgather, contents(0, 4), wrong),
        partial(communicator.alltoall, [contents(0, 4)] * len(wrong), [wrong] * len(wrong)),
    ):
        with pytest.raises(ValueError, match="where the other processes expect"):
            call()


def check_allreduce(communicator: Communicator) -> None:
    world_size = communicator.world_size
    base = torch.arange(2400, dtype=torch.float32)
    values = base * (communicator.world_rank + 1)
    _, traffic = moved(communicator, partial(communicator.allreduce, values))
    assert torch.equal(values, base * (world_size * (world_size + 1) // 2))
    # 2 (P-1)/P of 9600 bytes.
    assert traffic == ({1: 0, 2: 9600, 3: 12800, 4: 14400}[world_size],) * 2, traffic


def check_bytes(communicator: Communicator) -> None:
    world_rank, world_size = communicator.world_rank, communicator.world_size
    for data in (b"from 0", b""):
        received = communicator.broadcast(data if world_rank == 0 else b"not mine to tell")
        assert received == data, received
    parts = communicator.gather_bytes(b"x" * world_rank)
    assert parts == [b"x" * rank for rank in range(world_size)], parts


def check_host(communicator: Communicator, per_host: int) -> None:
    """All processes of the test are on one host, or on hosts of per_host that it plays."""
    world_size = communicator.world_size
    own = communicator.world_rank // per_host
    assert communicator.host_of == tuple(p - p % per_host for p in range(world_size))
    assert communicator.host_size == min(per_host, world_size - own * per_host)
    if per_host < world_size:
        return
    ranks = communicator.gather_bytes(str(communicator.host_rank).encode())
    assert sorted(map(int, ranks)) == list(range(communicator.world_size)), ranks


def check_close(communicator: Communicator) -> None:
    """A thread of gloo that outlives close() aborts the exiting process now and then.

    transformers imports this module, whose functions keep a process group that exists by then.
    """
    importlib.import_module("torch.distributed.nn.functional")
    is_gloo = communicator.library == "gloo"
    assert not is_gloo or gloo_threads()  # the names are still what they were
    communicator.close()
    end = time.monotonic() + 5
    while gloo_threads() and time.monotonic() < end:
        time.sleep(0.01)
    assert not gloo_threads(), gloo_threads()


def gloo_threads() -> list[str]:
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def check_network(communicator: Communicator) -> None:
    """1000 bytes of each process: what crosses between hosts of two processes, by hand."""
    world_size, world_rank = communicator.world_size, communicator.world_rank
    before = communicator.traffic.network_sent, communicator.traffic.network_received
    communicator.allgather(contents(world_rank, 1000))
    sent = communicator.traffic.network_sent - before[0]
    received = communicator.traffic.network_received - before[1]
    far = world_size - communicator.host_size  # processes of other hosts
    assert (sent, received)[1] >= 8 * far
    if communicator.kind == "mpi":  # every process gets every far message
        assert (sent, received) == (1008 * far, 1008 * far), (sent, received)
    elif communicator.host_rank:
        assert (sent, received) == (8 * far, 8 * far), (sent, received)
    else:
        hosts = len(set(communicator.host_of))
        wanted = 1000 * communicator.host_size * (hosts - 1) + 8 * far, 1008 * far
        assert (sent, received) == wanted, (sent, received, wanted)


def check_large(communicator: Communicator) -> None:
    """More bytes in one call than an MPI-3 count can say: 2.25e9 to each process."""
    each = (1 << 31) // communicator.world_size + 50_000_000
    mine = torch.full((each,), communicator.world_rank + 1, dtype=torch.uint8)
    for rank, part in enumerate(communicator.allgather(mine)):
        assert len(part) == each
        assert int(part.min()) == int(part.max()) == rank + 1


def check(communicator: Communicator, per_host: int) -> None:
    for max_count in (mpi.MAX_COUNT, 1000):  # the second sends most messages in pieces
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mpi, "MAX_COUNT", max_count)
            check_allgather(communicator, per_host)
            check_alltoall(communicator)
            check_room(communicator)
            check_allreduce(communicator)
    check_known_counts(communicator)
    check_shared_memory(communicator)
    if per_host < communicator.world_size:
        check_network(communicator)
    check_bytes(communicator)
    check_host(communicator, per_host)
    check_idle(communicator)


def check_idle(communicator: Communicator) -> None:
    """Who waits for a slow process leaves its core to the others."""
    communicator.barrier()
    if communicator.world_rank == 0:
        time.sleep(0.5)
    start, cpu_start = time.perf_counter(), time.process_time()
    communicator.idle_barrier()
    assert time.process_time() - cpu_start < 0.2
    if communicator.world_rank != 0:
        assert time.perf_counter() - start > 0.2


def passed(name: str) -> None:
    sys.stdout.write(f"OK {name}\n")
    sys.stdout.flush()


def main() -> None:
    if sys.argv[1] == "large":
        check_large(open_communicator("auto"))
        passed("large")
        return
    launcher, world_size = sys.argv[1], int(sys.argv[2])
    for name, open_case in CASES[launcher].items():
        communicator = open_case()
        assert communicator.kind == name.removesuffix(", hosts")
        assert communicator.world_size == world_size
        assert (communicator.library is None) == (name == "serial")
        check(communicator, HOST_PROCESSES if name.endswith(", hosts") else world_size)
        merge_check.check_all(communicator)
        passed("merge paths")
        check_close(communicator)
        passed(name)


if __name__ == "__main__":
    main()
