"""MPI with one copy of every message on each host, in memory that the host's processes share."""

import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedara_core.comm.base import EMPTY, check_counts, concatenated
from fedara_core.comm.mpi import MpiCommunicator
from fedara_core.errors import InputError

_SHARED_MEMORY = "/dev/shm"  # where MPI libraries on Linux keep their windows


class NodeCommunicator(MpiCommunicator):
    """MPI whose processes write messages into a window of their host and read them there.

    The first process of each host, its leader, exchanges the window's messages with those of other
    hosts. A message travels once to each other host, not once to each process, and reading it takes
    no copy. alltoall uses the window where all processes are on one host.
    """

    kind = "mpi-node"

    def __init__(self, *, host_processes: int | None = None) -> None:
        super().__init__(host_processes=host_processes)
        color = 0 if self.host_rank == 0 else self._mpi.UNDEFINED
        self._leaders: Any = self._comm.Split(color, self.world_rank)
        self._window: Any = None
        self._shared = EMPTY
        # The window holds host after host, and the processes of each in world_rank order.
        self._order = sorted(range(self.world_size), key=lambda rank: (self.host_of[rank], rank))
        self._places: list[Tensor] | None = None  # of the messages, while they are written

    def room(self, call: Literal["allgather", "alltoall"], counts: Sequence[int]) -> Tensor:
        if call == "alltoall" and self.host_size < self.world_size:
            return super().room(call, counts)
        self._sync()  # all processes are here, and so have read the last call's messages
        shared = self._shared_space(sum(counts))
        in_order = shared.split_with_sizes([counts[rank] for rank in self._order])
        place_of = dict(zip(self._order, in_order, strict=True))
        self._places = [place_of[world_rank] for world_rank in range(self.world_size)]
        return self._places[self.world_rank]

    def _write(self, message: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Write the message into the window, unless it already lies there.

        Returns the places (world_size,) of all messages, once this host's are written.
        """
        if self._places is None:
            self.room("allgather", counts).copy_(message)
        assert self._places is not None
        places, self._places = self._places, None
        self._sync()
        return places

    def allgather(self, buffer: Tensor, counts: Sequence[int] | None = None) -> list[Tensor]:
        sizes = self._gather_counts(buffer.numel(), counts)
        places = self._write(buffer, sizes)
        by_host = dict.fromkeys(sorted(set(self.host_of)), 0)
        for host, size in zip(self.host_of, sizes, strict=True):
            by_host[host] += size
        if len(by_host) > 1:
            if self.host_rank == 0:
                shared, host_sizes = self._shared[: sum(sizes)], [*by_host.values()]
                host_parts = dict(zip(by_host, shared.split_with_sizes(host_sizes), strict=True))
                mine = host_parts[self.world_rank].clone()
                self._allgatherv(self._leaders, mine, shared, host_sizes)
            self._sync()
        self._count_by_host(sizes, by_host)
        return places

    def alltoall(
        self, buffers: list[Tensor], counts: Sequence[Sequence[int]] | None = None
    ) -> list[Tensor]:
        if counts is None or self.host_size < self.world_size:
            return super().alltoall(buffers, counts)
        sent = [buffer.numel() for buffer in buffers]
        check_counts(sent, list(counts[self.world_rank]))
        places = self._write(concatenated(buffers), [sum(row) for row in counts])
        self._count(sent, [row[self.world_rank] for row in counts])
        return [
            message.split_with_sizes(list(row))[self.world_rank]
            for message, row in zip(places, counts, strict=True)
        ]

    def _shared_space(self, num_bytes: int) -> Tensor:
        """The first num_bytes of the host's window. Where it is too small a larger one is made."""
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
        """Raise InputError on every process unless each host has memory for this window.

        Touching pages that do not fit would end the job with SIGBUS. A process that is alone on its
        host needs no shared memory.
        """
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
        """Make what any process of this host wrote into the window visible to all of them."""
        if self._window is not None:  # there is none before the first message
            self._window.Sync()
            self._host.Barrier()
            self._window.Sync()

    def _count_by_host(self, counts: Sequence[int], by_host: Mapping[int, int]) -> None:
        """Count each message to its host's leader, and the leaders' exchange."""
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
        self._window, self._shared = None, EMPTY

    def close(self) -> None:
        self._free_window()
