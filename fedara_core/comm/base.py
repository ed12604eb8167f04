"""The interface of a communicator, and the serial one. Only buffers travel; every byte is counted.

A back end is a subclass in a file of its own. It overrides the calls, and calls `_count` with what
it moved; launch.py lists it.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor

_MAX_REUSED_BYTES = 1 << 28  # a larger buffer is given back after its call
_BROADCAST_BYTES = 1 << 28  # of one piece of a broadcast


@dataclass
class Traffic:
    """Bytes that this process sent to and received from other processes; network: other hosts'."""

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
        self._outgoing = ReusedBuffer()

    def room(self, call: Literal["allgather", "alltoall"], counts: Sequence[int]) -> Tensor:
        """A uint8 vector for what this process sends next: the call need not copy it from there.

        counts: bytes that each process sends. Every process asks for room and then makes the call.
        """
        return self._outgoing.first(counts[self.world_rank])

    def allgather(self, buffer: Tensor, counts: Sequence[int] | None = None) -> list[Tensor]:
        """Every process's uint8 vector (any length, on the CPU), in world_rank order.

        counts: their lengths, where every process knows them; otherwise these are exchanged first.
        The next call of this communicator may overwrite the vectors.
        """
        return [buffer]

    def alltoall(
        self, buffers: list[Tensor], counts: Sequence[Sequence[int]] | None = None
    ) -> list[Tensor]:
        """One uint8 vector (any length, on the CPU) for each process in, one from each out.

        counts: lengths by sender and receiver, where every process knows them; otherwise these are
        exchanged first. The next call of this communicator may overwrite the vectors.
        """
        return buffers

    def allreduce(self, values: Tensor) -> None:
        """Replace a float32 vector (n,), as long everywhere, by its sum over processes.

        The order of the additions is not fixed.
        """

    def barrier(self) -> None:
        """Return once every process is here."""

    def idle_barrier(self) -> None:
        """As `barrier`, for waits of seconds: a process that waits leaves its core to the others,
        and may return some milliseconds late."""
        self.barrier()

    def close(self) -> None:
        """Leave the job in good order; every process calls it."""

    def abort(self) -> NoReturn:
        """End the whole job at once with exit code 1, whatever the others are doing."""
        os._exit(1)

    def broadcast(self, data: bytes) -> bytes:
        """world_rank 0's bytes on every process."""
        length = int.from_bytes(self.gather_bytes(len(data).to_bytes(8, "little"))[0], "little")
        buffer = np.zeros(length, np.uint8)
        if self.world_rank == 0:
            buffer[:] = np.frombuffer(data, np.uint8)
        for start in range(0, length, _BROADCAST_BYTES):
            self._broadcast_piece(buffer[start : start + _BROADCAST_BYTES])
        return buffer.tobytes()

    def _broadcast_piece(self, piece: np.ndarray) -> None:
        """Fill `piece` with world_rank 0's bytes. They are not counted: no round sends them."""

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Every process's bytes, in world_rank order."""
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else EMPTY
        return [part.numpy().tobytes() for part in self.allgather(mine)]

    def gather_json(self, value: Any) -> list[Any]:
        """Every process's value, which JSON can hold, in world_rank order."""
        return [json.loads(part) for part in self.gather_bytes(json.dumps(value).encode())]

    def _count(self, sent: Sequence[int], received: Sequence[int]) -> None:
        """Count bytes to and from each process (world_size,); what stays here does not count."""
        self.traffic.sent += sum(sent) - sent[self.world_rank]
        self.traffic.received += sum(received) - received[self.world_rank]
        self.traffic.network_sent += sum(sent[rank] for rank in self._on_other_hosts)
        self.traffic.network_received += sum(received[rank] for rank in self._on_other_hosts)

    @cached_property
    def _on_other_hosts(self) -> list[int]:
        """The processes of other hosts."""
        own = self.host_of[self.world_rank]
        return [rank for rank, host in enumerate(self.host_of) if host != own]

    def _count_allreduce(self, num_bytes: int) -> None:
        """Count 2 (P-1)/P n bytes each way: a ring's, and no allreduce needs fewer."""
        moved = round(2 * (self.world_size - 1) / self.world_size * num_bytes)
        sent, received = [0] * self.world_size, [0] * self.world_size
        sent[(self.world_rank + 1) % self.world_size] = moved
        received[(self.world_rank - 1) % self.world_size] = moved
        self._count(sent, received)


class ReusedBuffer:
    """Memory that every call uses again: faulting in new pages costs as much as the copy itself."""

    def __init__(self) -> None:
        self._memory = EMPTY

    def first(self, num_bytes: int) -> Tensor:
        """A uint8 vector of num_bytes; the next call returns the same memory.

        Vectors above _MAX_REUSED_BYTES are new each time.
        """
        if num_bytes > _MAX_REUSED_BYTES:
            return torch.empty(num_bytes, dtype=torch.uint8)
        if num_bytes > self._memory.numel():
            self._memory = torch.empty(num_bytes, dtype=torch.uint8)
        return self._memory[:num_bytes]


EMPTY = torch.zeros(0, dtype=torch.uint8)


def check_counts(own: object, expected: object) -> None:
    """Raise ValueError where this process would send other lengths than the others wait for."""
    if own != expected:
        raise ValueError(f"a message of {own} bytes, where the other processes expect {expected}")


def concatenated(buffers: list[Tensor]) -> Tensor:
    """Vectors one after another: a view where they already lie so in memory, else a copy."""
    filled = [buffer for buffer in buffers if buffer.numel()]  # an empty one has no place
    if not filled:
        return EMPTY
    start = end = filled[0].data_ptr()
    for buffer in filled:
        if buffer.data_ptr() != end:
            return torch.cat(filled)
        end += buffer.numel()
    return filled[0].as_strided((end - start,), (1,))
