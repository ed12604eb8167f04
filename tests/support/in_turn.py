"""A job's processes as threads of this one, in turn: digests on any number of them, cheaply."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fedara_core.comm.base import Communicator


def in_turn(world_size: int, run: Callable[[Communicator], Any]) -> list[Any]:
    """What run(communicator) returns in each process of a job.

    The processes are threads of which one at a time runs, from one collective call to the next: so
    each has torch's global generator to itself while it trains a client.
    """
    board = _Board(world_size)

    def work(world_rank: int) -> Any:
        with board.turn:
            try:
                return run(_Process(board, world_rank))
            except BaseException:
                board.together.abort()
                raise

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(work, range(world_size)))


class _Board:
    """Where the processes of `in_turn` leave their messages."""

    def __init__(self, world_size: int) -> None:
        self.turn = threading.Lock()
        self.together = threading.Barrier(world_size, timeout=60)
        self.messages: list[Tensor] = [torch.zeros(0, dtype=torch.uint8)] * world_size

    def meet(self) -> None:
        """Let the others run until they are here, too."""
        self.turn.release()
        try:
            self.together.wait()
        finally:
            self.turn.acquire()


class _Process(Communicator):
    """One process of `in_turn`."""

    def __init__(self, board: _Board, world_rank: int) -> None:
        super().__init__()
        self.board = board
        self.world_rank, self.world_size = world_rank, len(board.messages)
        self.host_of = tuple(range(self.world_size))  # each is alone on its host

    def allgather(self, buffer: Tensor, counts: object = None) -> list[Tensor]:
        self.board.messages[self.world_rank] = buffer.clone()
        self.board.meet()
        gathered = list(self.board.messages)
        self.board.meet()
        return gathered

    def alltoall(self, buffers: list[Tensor], counts: object = None) -> list[Tensor]:
        sizes = torch.tensor([len(buffer) for buffer in buffers])
        everyone = [s.view(torch.int64) for s in self.allgather(sizes.view(torch.uint8))]
        sent = self.allgather(torch.cat(buffers))
        return [
            data.split_with_sizes(lengths.tolist())[self.world_rank].clone()
            for data, lengths in zip(sent, everyone, strict=True)
        ]

    def allreduce(self, values: Tensor) -> None:
        gathered = self.allgather(values.view(torch.uint8))
        values.copy_(torch.stack([part.view(torch.float32) for part in gathered]).sum(dim=0))
