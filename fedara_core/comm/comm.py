"""Communicators: serial, MPI, torch.distributed. Buffers only, and every byte is counted here.

A launcher is recognised by what it puts into the environment; nothing is imported before that.
"""

import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, Literal, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedara_core.errors import InputError

T = TypeVar("T")

KINDS = ("auto", "serial", "mpi", "mpi-node", "torch")

MAX_COUNT = (1 << 31) - 1  # what one call of an MPI-3 library can count
_KEPT = 1 << 28  # a larger buffer than this is not kept for the next call
_PIECE = 1 << 28  # bytes broadcast at a time
_FORWARD_SECONDS = 0.5  # what a launcher gets to forward the last words of a process that aborts
_SHARED_MEMORY = "/dev/shm"  # where MPI libraries on Linux keep their windows
_HOST_PROCESSES = "FEDARA_HOST_PROCESSES"  # a test's hosts: so many consecutive processes share one

# Number of processes as each launcher tells it. A batch script's own step has no launcher.
_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")
_SRUN_SIZE = "SLURM_STEP_NUM_TASKS"
_TORCH_KEYS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Traffic:
    """Bytes that this process moved to and took from other processes; network: of other hosts."""

    sent: int = 0
    received: int = 0
    network_sent: int = 0
    network_received: int = 0


class Communicator:
    """The serial communicator, and the interface of the others."""

    kind = "serial"
    world_rank = 0
    world_size = 1
    host_rank = 0  # this process among those of its host
    host_size = 1
    host_of: tuple[int, ...] = (0,)  # world_rank -> the first world_rank of its host
    library: str | None = None  # what moves the bytes, with its version

    def __init__(self) -> None:
        self.traffic = Traffic()
        self._outgoing = _Kept()

    def room(self, call: Literal["allgather", "alltoall"], counts: Sequence[int]) -> Tensor:
        """Memory for what this process sends next, so that the call need not copy it: uint8.

        counts: bytes that each process sends. Every process asks for room, and then makes the call.
        """
        return self._outgoing.space(counts[self.world_rank])

    def allgather(self, buffer: Tensor, counts: Sequence[int] | None = None) -> list[Tensor]:
        """Every process's uint8 vector (any length, on the CPU), in world_rank order.

        counts: their lengths, where every process knows them; otherwise these are exchanged first.
        The vectors may lie in memory that the next call of this communicator writes over.
        """
        return [buffer]

    def alltoall(
        self, buffers: list[Tensor], counts: Sequence[Sequence[int]] | None = None
    ) -> list[Tensor]:
        """One uint8 vector (any length, on the CPU) for each process in, one from each out.

        counts: lengths by sender and receiver, where every process knows them; otherwise these are
        exchanged first. The vectors may lie in memory that the next call writes over.
        """
        return buffers

    def allreduce(self, values: Tensor) -> None:
        """Make a float32 vector (n,), as long everywhere, its sum over processes. Order is not
        fixed."""

    def barrier(self) -> None:
        """Return once every process is here."""

    def close(self) -> None:
        """Leave the job in good order; called by every process."""

    def abort(self) -> NoReturn:
        """End the whole job at once with exit code 1, whatever the others are doing."""
        os._exit(1)

    def broadcast(self, data: bytes) -> bytes:
        """world_rank 0's bytes on every process."""
        length = int.from_bytes(self.gather_bytes(len(data).to_bytes(8, "little"))[0], "little")
        buffer = np.zeros(length, np.uint8)
        if self.world_rank == 0:
            buffer[:] = np.frombuffer(data, np.uint8)
        for start in range(0, length, _PIECE):
            self._broadcast_piece(buffer[start : start + _PIECE])
        return buffer.tobytes()

    def _broadcast_piece(self, piece: np.ndarray) -> None:
        """world_rank 0's bytes into everybody's `piece`; not counted: it is no exchange."""

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Every process's bytes, in world_rank order."""
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else _EMPTY
        return [part.numpy().tobytes() for part in self.allgather(mine)]

    def _count(self, sent: Sequence[int], received: Sequence[int]) -> None:
        """Count bytes to and from each process; what stays here does not count."""
        self.traffic.sent += sum(sent) - sent[self.world_rank]
        self.traffic.received += sum(received) - received[self.world_rank]
        self.traffic.network_sent += sum(sent[rank] for rank in self._far)
        self.traffic.network_received += sum(received[rank] for rank in self._far)

    @cached_property
    def _far(self) -> list[int]:
        """The processes of other hosts."""
        own = self.host_of[self.world_rank]
        return [rank for rank, host in enumerate(self.host_of) if host != own]

    def _count_allreduce(self, num_bytes: int) -> None:
        """2 (P-1)/P n bytes each way: a ring's, which no allreduce undercuts."""
        moved = round(2 * (self.world_size - 1) / self.world_size * num_bytes)
        sent, received = [0] * self.world_size, [0] * self.world_size
        sent[(self.world_rank + 1) % self.world_size] = moved
        received[(self.world_rank - 1) % self.world_size] = moved
        self._count(sent, received)


class _Kept:
    """Memory that is used again: new pages cost as much as the copy itself."""

    def __init__(self) -> None:
        self._memory = _EMPTY

    def space(self, num_bytes: int) -> Tensor:
        """A uint8 vector; the next one lies in the same place. What is huge is not kept."""
        if num_bytes > _KEPT:
            return torch.empty(num_bytes, dtype=torch.uint8)
        if num_bytes > self._memory.numel():
            self._memory = torch.empty(num_bytes, dtype=torch.uint8)
        return self._memory[:num_bytes]


_EMPTY = torch.zeros(0, dtype=torch.uint8)


class MpiCommunicator(Communicator):
    """mpi4py's upper-case calls on contiguous buffers; any MPI that mpi4py was built for.

    A message that is too long for one call's counts goes in several.
    """

    kind = "mpi"

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        super().__init__()
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise InputError(
                f"--comm mpi: mpi4py does not load ({error}); allowed: a working MPI with mpi4py "
                "built for it, pip install '.[mpi]' where there is none, or --comm torch"
            ) from None
        self._mpi: Any = MPI
        self._comm: Any = MPI.COMM_WORLD
        self.world_rank = self._comm.Get_rank()
        self.world_size = self._comm.Get_size()
        self._host: Any = self._comm.Split_type(MPI.COMM_TYPE_SHARED, self.world_rank)
        if environ.get(_HOST_PROCESSES):
            color = self.world_rank // int(environ[_HOST_PROCESSES])
            self._host = self._comm.Split(color, self.world_rank)
        self.host_rank, self.host_size = self._host.Get_rank(), self._host.Get_size()
        lead, leads = np.array([self.world_rank]), np.zeros(self.world_size, np.int64)
        self._host.Bcast(lead, root=0)
        self._comm.Allgather(lead, leads)
        self.host_of = tuple(leads.tolist())
        self.library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
        self._incoming = _Kept()

    def _gather_counts(self, count: int, known: Sequence[int] | None) -> Sequence[int]:
        """Every process's count (world_size,); unless known, the 8 bytes of each travel too."""
        if known is not None:
            _check_count(count, known[self.world_rank])
            return known
        counts = np.zeros(self.world_size, np.int64)
        self._comm.Allgather(np.array([count], np.int64), counts)
        self._count([8] * self.world_size, [8] * self.world_size)
        return counts.tolist()

    def allgather(self, buffer: Tensor, counts: Sequence[int] | None = None) -> list[Tensor]:
        sizes = self._gather_counts(buffer.numel(), counts)
        gathered = self._incoming.space(sum(sizes))
        self._allgatherv(self._comm, buffer.contiguous(), gathered, sizes)
        self._count([buffer.numel()] * self.world_size, sizes)
        return list(torch.split(gathered, list(sizes)))

    def _allgatherv(self, comm: Any, mine: Tensor, gathered: Tensor, counts: Sequence[int]) -> None:
        """Allgatherv of counts (P,) bytes over the P processes of comm."""

        def call(first: int, last: int, block: Tensor, sizes: Sequence[int]) -> None:
            comm.Allgatherv(
                [mine[first:last].numpy(), self._mpi.BYTE],
                [block.numpy(), sizes, None, self._mpi.BYTE],
            )

        _in_pieces(call, gathered, counts, max(counts))

    def alltoall(
        self, buffers: list[Tensor], counts: Sequence[Sequence[int]] | None = None
    ) -> list[Tensor]:
        sent = [buffer.numel() for buffer in buffers]
        if counts is None:
            told = np.zeros((self.world_size, 2), np.int64)
            self._comm.Alltoall(np.array([[size, max(sent)] for size in sent]), told)
            self._count([16] * self.world_size, [16] * self.world_size)
            sizes, longest = told[:, 0].tolist(), int(told[:, 1].max())
        else:
            _check_count(sent, list(counts[self.world_rank]))
            sizes, longest = [row[self.world_rank] for row in counts], max(map(max, counts))
        received = self._incoming.space(sum(sizes))

        def call(first: int, last: int, block: Tensor, lengths: Sequence[int]) -> None:
            parts = [buffer[first:last] for buffer in buffers]
            self._comm.Alltoallv(
                [_joined(parts).numpy(), [len(part) for part in parts], None, self._mpi.BYTE],
                [block.numpy(), lengths, None, self._mpi.BYTE],
            )

        _in_pieces(call, received, sizes, longest)
        self._count(sent, sizes)
        return list(torch.split(received, sizes))

    def allreduce(self, values: Tensor) -> None:
        for piece in torch.split(values, MAX_COUNT):
            self._comm.Allreduce(self._mpi.IN_PLACE, piece.numpy())
        self._count_allreduce(values.numel() * values.element_size())

    def _broadcast_piece(self, piece: np.ndarray) -> None:
        self._comm.Bcast([piece, self._mpi.BYTE], root=0)

    def barrier(self) -> None:
        self._comm.Barrier()

    def abort(self) -> NoReturn:
        # The launcher reads output and aborts from separate descriptors: on a busy machine mpiexec
        # was seen to end at the abort with the traceback unread.
        time.sleep(_FORWARD_SECONDS)
        self._comm.Abort(1)
        os._exit(1)


class NodeCommunicator(MpiCommunicator):
    """MPI whose allgather brings one copy to each host, in memory that its processes share.

    Processes put their messages into a window of their host; the first process of each host
    exchanges it with the other hosts'. Between hosts travels what P processes need once per host,
    not P times; inside a host nothing is copied for reading. Where all processes are on one host,
    alltoall goes by the window, too.
    """

    kind = "mpi-node"

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        super().__init__(environ)
        leads = self.host_rank == 0
        self._leaders: Any = self._comm.Split(0 if leads else self._mpi.UNDEFINED, self.world_rank)
        self._window: Any = None
        self._shared = _EMPTY
        # Hosts one after another in the window, each one's processes in world_rank order.
        self._order = sorted(range(self.world_size), key=lambda rank: (self.host_of[rank], rank))
        self._placed: list[Tensor] | None = None  # messages in the window, while it is written

    def room(self, call: Literal["allgather", "alltoall"], counts: Sequence[int]) -> Tensor:
        if call == "alltoall" and self.host_size < self.world_size:
            return super().room(call, counts)
        self._sync()  # all are here, and so have read what the last call gave
        shared = self._shared_space(sum(counts))
        in_order = shared.split_with_sizes([counts[rank] for rank in self._order])
        placed = dict(zip(self._order, in_order, strict=True))
        self._placed = [placed[world_rank] for world_rank in range(self.world_size)]
        return self._placed[self.world_rank]

    def _put(self, message: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """The places (world_size,) of all messages in the window, once this host's are there."""
        if self._placed is None:
            self.room("allgather", counts).copy_(message)
        assert self._placed is not None
        placed, self._placed = self._placed, None
        self._sync()
        return placed

    def allgather(self, buffer: Tensor, counts: Sequence[int] | None = None) -> list[Tensor]:
        sizes = self._gather_counts(buffer.numel(), counts)
        placed = self._put(buffer, sizes)
        by_host = dict.fromkeys(sorted(set(self.host_of)), 0)
        for host, size in zip(self.host_of, sizes, strict=True):
            by_host[host] += size
        if len(by_host) > 1:
            if self.host_rank == 0:
                shared = self._shared[: sum(sizes)]
                own = dict(zip(by_host, shared.split_with_sizes([*by_host.values()]), strict=True))
                mine = own[self.world_rank].clone()
                self._allgatherv(self._leaders, mine, shared, [*by_host.values()])
            self._sync()
        self._count_by_host(sizes, by_host)
        return placed

    def alltoall(
        self, buffers: list[Tensor], counts: Sequence[Sequence[int]] | None = None
    ) -> list[Tensor]:
        if counts is None or self.host_size < self.world_size:
            return super().alltoall(buffers, counts)
        sent = [buffer.numel() for buffer in buffers]
        _check_count(sent, list(counts[self.world_rank]))
        placed = self._put(_joined(buffers), [sum(row) for row in counts])
        sizes = [row[self.world_rank] for row in counts]
        self._count(sent, sizes)
        return [
            message.split_with_sizes(list(row))[self.world_rank]
            for message, row in zip(placed, counts, strict=True)
        ]

    def _shared_space(self, num_bytes: int) -> Tensor:
        """The first num_bytes of the host's window, which grows where it is too small."""
        if num_bytes > len(self._shared):
            self._free_window()
            self._comm.Barrier()  # the last process to free it gives its pages back
            self._check_shared_memory(num_bytes)
            own = num_bytes if self.host_rank == 0 else 0
            self._window = self._mpi.Win.Allocate_shared(own, 1, comm=self._host)
            memory, _ = self._window.Shared_query(0)
            self._shared = torch.from_numpy(np.frombuffer(memory, np.uint8, num_bytes))
            self._window.Lock_all()
        return self._shared[:num_bytes]

    def _check_shared_memory(self, num_bytes: int) -> None:
        """Raise InputError on every process unless each host has room for a window of this size:
        pages that do not fit would end the job with SIGBUS when they are touched. One process by
        itself needs none of it."""
        free = np.array([num_bytes])
        if self.host_size > 1 and os.path.isdir(_SHARED_MEMORY):
            free[0] = shutil.disk_usage(_SHARED_MEMORY).free
        self._comm.Allreduce(self._mpi.IN_PLACE, free, op=self._mpi.MIN)
        if free[0] < num_bytes:
            raise InputError(
                f"--comm mpi-node: a round's messages take {num_bytes / 1e6:.0f} MB of shared "
                f"memory, and {_SHARED_MEMORY} has {free[0] / 1e6:.0f} MB free; allowed: a larger "
                "one (in a container --shm-size), or --comm mpi"
            )

    def _sync(self) -> None:
        """What any process of this host wrote into the window is there for all of them."""
        if self._window is not None:  # none while nobody has sent anything
            self._window.Sync()
            self._host.Barrier()
            self._window.Sync()

    def _count_by_host(self, counts: Sequence[int], by_host: Mapping[int, int]) -> None:
        """Each message goes to its host's leader; leaders exchange what their hosts have."""
        own = self.host_of[self.world_rank]
        sent = [0] * self.world_size
        if self.world_rank != own:
            sent[own] = counts[self.world_rank]
            self._count(sent, [0] * self.world_size)
            return
        for host in by_host:
            sent[host] = by_host[own]
        self._count(sent, counts)

    def _free_window(self) -> None:
        if self._window is not None:
            self._window.Unlock_all()
            self._window.Free()
        self._window, self._shared = None, _EMPTY

    def close(self) -> None:
        self._free_window()


class TorchCommunicator(Communicator):
    """torch.distributed under torchrun: NCCL where every process has a GPU of its own, else gloo.

    gloo has no uneven all_gather: sizes are exchanged first, then buffers padded to the longest;
    the padding is counted.
    """

    kind = "torch"

    def __init__(self) -> None:
        super().__init__()
        missing = [key for key in _TORCH_KEYS if key not in os.environ]
        if missing:
            raise InputError(
                f"--comm torch: {', '.join(missing)} not set; allowed: start with "
                "torchrun --nproc-per-node N -m bench run CONFIG"
            )
        import torch.distributed as dist

        # Functions of this module keep the process group that exists when it is first imported
        # (transformers does), and close() can not end the threads of a group that is kept.
        from torch.distributed.nn import functional as _  # noqa: F401

        self._dist: Any = dist
        self.host_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.host_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        use_nccl = dist.is_nccl_available() and torch.cuda.device_count() >= self.host_size
        self._device = torch.device("cuda", self.host_rank) if use_nccl else torch.device("cpu")
        if use_nccl:
            torch.cuda.set_device(self._device)
        self.library = "nccl" if use_nccl else "gloo"
        # A process may wait for a slower one for hours; torchrun ends the job if one dies.
        dist.init_process_group(self.library, timeout=timedelta(days=1))
        self.world_rank, self.world_size = dist.get_rank(), dist.get_world_size()
        # torchrun numbers the processes host by host.
        self.host_of = tuple(rank - rank % self.host_size for rank in range(self.world_size))

    def allgather(self, buffer: Tensor, counts: Sequence[int] | None = None) -> list[Tensor]:
        lengths = self._gather_counts(buffer.numel(), counts)
        longest = max(lengths)
        padded = torch.zeros(longest, dtype=torch.uint8, device=self._device)
        padded[: buffer.numel()] = buffer.to(self._device)
        gathered = [torch.empty_like(padded) for _ in range(self.world_size)]
        if longest:
            self._dist.all_gather(gathered, padded)
        self._count([longest] * self.world_size, [longest] * self.world_size)
        return [part[:length].cpu() for part, length in zip(gathered, lengths, strict=True)]

    def _gather_counts(self, count: int, known: Sequence[int] | None) -> list[int]:
        """Every process's count; unless known, the 8 bytes of each travel too."""
        if known is not None:
            _check_count(count, known[self.world_rank])
            return list(known)
        mine = torch.tensor([count], dtype=torch.int64, device=self._device)
        counts = [torch.zeros_like(mine) for _ in range(self.world_size)]
        self._dist.all_gather(counts, mine)
        self._count([8] * self.world_size, [8] * self.world_size)
        return [int(count) for count in counts]

    def alltoall(
        self, buffers: list[Tensor], counts: Sequence[Sequence[int]] | None = None
    ) -> list[Tensor]:
        sent = [buffer.numel() for buffer in buffers]
        if counts is None:
            told = torch.empty(self.world_size, dtype=torch.int64, device=self._device)
            self._dist.all_to_all_single(told, torch.tensor(sent, device=self._device))
            self._count([8] * self.world_size, [8] * self.world_size)
            sizes = told.tolist()
        else:
            _check_count(sent, list(counts[self.world_rank]))
            sizes = [row[self.world_rank] for row in counts]
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
        mine = _joined(buffers).to(self._device)
        self._dist.all_to_all_single(received, mine, sizes, sent)
        self._count(sent, sizes)
        return list(torch.split(received.cpu(), sizes))

    def allreduce(self, values: Tensor) -> None:
        there = values.to(self._device)
        self._dist.all_reduce(there)
        self._count_allreduce(values.numel() * values.element_size())
        values.copy_(there)

    def _broadcast_piece(self, piece: np.ndarray) -> None:
        buffer = torch.from_numpy(piece).to(self._device)
        self._dist.broadcast(buffer, src=0)
        piece[:] = buffer.cpu().numpy()

    def barrier(self) -> None:
        self._dist.barrier()

    def close(self) -> None:
        self._dist.destroy_process_group()


def _check_count(found: object, told: object) -> None:
    """The others receive what they were told of, and wait for ever for what does not come."""
    if found != told:
        raise ValueError(f"a message of {found} bytes, where the other processes expect {told}")


def _joined(buffers: list[Tensor]) -> Tensor:
    """Vectors one after another: as they lie if they lie so, else copied."""
    filled = [buffer for buffer in buffers if buffer.numel()]  # an empty one lies nowhere
    if not filled:
        return _EMPTY
    start = end = filled[0].data_ptr()
    for buffer in filled:
        if buffer.data_ptr() != end:
            return torch.cat(filled)
        end += buffer.numel()
    return filled[0].as_strided((end - start,), (1,))


def _in_pieces(
    call: Callable[[int, int, Tensor, Sequence[int]], None],
    received: Tensor,
    counts: Sequence[int],
    longest: int,
) -> None:
    """Make the call once, or once for each piece of the messages that it can count.

    call: with the range of the pieces, where they go one after another, and their sizes; received:
    room for the whole messages of counts (P,) bytes; longest: of all messages of all processes.
    """
    limit = MAX_COUNT // len(counts)
    if longest <= limit:
        call(0, longest, received, counts)
        return
    parts = torch.split(received, list(counts))
    for first in range(0, longest, limit):
        pieces = [part[first : first + limit] for part in parts]
        sizes = [len(piece) for piece in pieces]
        landed = torch.empty(sum(sizes), dtype=torch.uint8)
        call(first, first + limit, landed, sizes)
        for piece, values in zip(pieces, torch.split(landed, sizes), strict=True):
            piece.copy_(values)


def detect(environ: Mapping[str, str]) -> str:
    """The communicator that the launcher's environment asks for: serial, mpi or torch."""
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torch"
    if _launched_processes(environ):
        return "mpi"
    return "serial"


def open_communicator(kind: str, environ: Mapping[str, str] = os.environ) -> Communicator:
    """Join the job. Raises InputError for an unknown kind or a launcher that MPI does not see."""
    if kind not in KINDS:
        raise InputError(f"--comm {kind!r} is not allowed; allowed: {', '.join(KINDS)}")
    chosen = detect(environ) if kind == "auto" else kind
    if chosen == "torch":
        return TorchCommunicator()
    launched = _launched_processes(environ)
    if chosen == "serial":
        if launched > 1:
            raise InputError(
                f"--comm serial: the launcher started {launched} processes, and each would run "
                "alone; allowed: one process, or --comm mpi or torch as the launcher asks"
            )
        return Communicator()
    cls = NodeCommunicator if chosen == "mpi-node" else MpiCommunicator
    communicator = cls(environ)
    if launched > 1 and communicator.world_size == 1:
        raise InputError(
            f"the launcher started {launched} processes but MPI sees 1; allowed: the mpiexec of "
            "the MPI that mpi4py was built for, srun --mpi=pmi2 (srun --mpi=list shows the "
            "choices), or --comm torch under torchrun"
        )
    return communicator


def _launched_processes(environ: Mapping[str, str]) -> int:
    """How many processes torchrun, mpiexec or srun says it started; 0 without a launcher."""
    if "TORCHELASTIC_RUN_ID" in environ:
        return int(environ["WORLD_SIZE"])
    for key in _MPI_SIZES:
        if environ.get(key, "").isdigit():
            return int(environ[key])
    # srun sets SLURM_PROCID for its tasks; a batch step's size is 1 and needs no MPI.
    size = environ.get(_SRUN_SIZE, "")
    return int(size) if size.isdigit() and int(size) > 1 else 0


def together(communicator: Communicator, action: Callable[[], T]) -> T:
    """Run `action` everywhere; if it raises InputError anywhere, raise the first one everywhere."""
    result, refusal = None, ""
    try:
        result = action()
    except InputError as error:
        refusal = str(error)
    refusals = [part.decode() for part in communicator.gather_bytes(refusal.encode())]
    for text in refusals:
        if text:
            raise InputError(text)
    return result  # type: ignore[return-value]


def abort_on_error(communicator: Communicator, error: BaseException) -> NoReturn:
    """Print the traceback with the world_rank and end the job, so that nobody waits for ever."""
    text = "".join(traceback.format_exception(error))
    sys.stderr.write(f"world_rank {communicator.world_rank} failed:\n{text}")
    sys.stderr.flush()
    communicator.abort()
