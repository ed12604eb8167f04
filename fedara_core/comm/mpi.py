"""MPI by mpi4py. mpi4py is imported when the communicator is made, not before."""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from fedara_core.comm.base import Communicator, ReusedBuffer, check_counts, concatenated
from fedara_core.errors import InputError

MAX_COUNT = (1 << 31) - 1  # the largest count that one call of an MPI-3 library takes
_POLL_SECONDS = 0.005
_FORWARD_SECONDS = 0.5  # the launcher's time to forward the output of a process that aborts


class MpiCommunicator(Communicator):
    """mpi4py's upper-case calls on contiguous buffers, with any MPI that mpi4py was built for.

    A message that is too long for one call's counts travels in several calls.
    """

    kind = "mpi"

    def __init__(self, *, host_processes: int | None = None) -> None:
        """host_processes: so many consecutive processes count as one host; by default a host's
        processes are those that can share memory."""
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
        self._host: Any = (
            self._comm.Split_type(MPI.COMM_TYPE_SHARED, self.world_rank)
            if host_processes is None
            else self._comm.Split(self.world_rank // host_processes, self.world_rank)
        )
        self.host_rank, self.host_size = self._host.Get_rank(), self._host.Get_size()
        leader, leaders = np.array([self.world_rank]), np.zeros(self.world_size, np.int64)
        self._host.Bcast(leader, root=0)
        self._comm.Allgather(leader, leaders)
        self.host_of = tuple(leaders.tolist())
        self.library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
        self._incoming = ReusedBuffer()

    def allgather(self, buffer: Tensor, counts: Sequence[int] | None = None) -> list[Tensor]:
        sizes = self._gather_counts(buffer.numel(), counts)
        gathered = self._incoming.first(sum(sizes))
        self._allgatherv(self._comm, buffer.contiguous(), gathered, sizes)
        self._count([buffer.numel()] * self.world_size, sizes)
        return list(torch.split(gathered, list(sizes)))

    def _gather_counts(self, count: int, known: Sequence[int] | None) -> Sequence[int]:
        """Every process's count (world_size,). Unless known, they travel: 8 bytes of each."""
        if known is not None:
            check_counts(count, known[self.world_rank])
            return known
        counts = np.zeros(self.world_size, np.int64)
        self._comm.Allgather(np.array([count], np.int64), counts)
        self._count([8] * self.world_size, [8] * self.world_size)
        return counts.tolist()

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
            # With each length travels its sender's longest: all agree on the number of pieces.
            gathered = np.zeros((self.world_size, 2), np.int64)
            self._comm.Alltoall(np.array([[size, max(sent)] for size in sent]), gathered)
            self._count([16] * self.world_size, [16] * self.world_size)
            sizes, longest = gathered[:, 0].tolist(), int(gathered[:, 1].max())
        else:
            check_counts(sent, list(counts[self.world_rank]))
            sizes, longest = [row[self.world_rank] for row in counts], max(map(max, counts))
        received = self._incoming.first(sum(sizes))

        def call(first: int, last: int, block: Tensor, lengths: Sequence[int]) -> None:
            pieces = [buffer[first:last] for buffer in buffers]
            self._comm.Alltoallv(
                [concatenated(pieces).numpy(), [len(p) for p in pieces], None, self._mpi.BYTE],
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

    def idle_barrier(self) -> None:
        request = self._comm.Ibarrier()  # MPI libraries poll without a pause in a blocking call
        while not request.Test():
            time.sleep(_POLL_SECONDS)

    def abort(self) -> NoReturn:
        # The launcher reads output and aborts from separate descriptors. On a busy machine mpiexec
        # ended at the abort and left the traceback unread.
        time.sleep(_FORWARD_SECONDS)
        self._comm.Abort(1)
        os._exit(1)


def _in_pieces(
    call: Callable[[int, int, Tensor, Sequence[int]], None],
    received: Tensor,
    counts: Sequence[int],
    longest: int,
) -> None:
    """Make the call once, or once for each piece of the messages where they are too long for it.

    call: takes a piece's first and last byte, where the pieces land one after another, and their
        sizes.
    received: memory for the whole messages, of counts (P,) bytes.
    longest: bytes of the longest message of all processes.
    """
    limit = MAX_COUNT // len(counts)
    if longest <= limit:
        call(0, longest, received, counts)
        return
    messages = torch.split(received, list(counts))
    for first in range(0, longest, limit):
        pieces = [message[first : first + limit] for message in messages]
        sizes = [len(piece) for piece in pieces]
        landed = torch.empty(sum(sizes), dtype=torch.uint8)
        call(first, first + limit, landed, sizes)
        for piece, values in zip(pieces, torch.split(landed, sizes), strict=True):
            piece.copy_(values)
