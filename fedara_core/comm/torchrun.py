"""torch.distributed, for jobs that torchrun starts."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedara_core.comm.base import Communicator, check_counts, concatenated
from fedara_core.comm.rendezvous import Rendezvous, check_interfaces, no_connection, read_place

_DAY = timedelta(days=1)  # a process may wait for a slower one; torchrun ends the job if one dies


class TorchCommunicator(Communicator):
    """torch.distributed: NCCL where every process has a GPU of its own, else gloo.

    gloo has no uneven all_gather. Buffers are padded to the longest, and the padding is counted.
    """

    kind = "torch"

    def __init__(self) -> None:
        super().__init__()
        place = read_place()
        import torch.distributed as dist

        # Functions of this module keep the process group that exists when it is first imported
        # (transformers does), and close() can not end the threads of a group that is kept.
        from torch.distributed.nn import functional as _  # noqa: F401

        self._dist: Any = dist
        self.host_rank, self.host_size = place.host_rank, place.host_size
        use_nccl = dist.is_nccl_available() and torch.cuda.device_count() >= self.host_size
        self._device = torch.device("cuda", self.host_rank) if use_nccl else torch.device("cpu")
        if use_nccl:
            torch.cuda.set_device(self._device)
        self.library = "nccl" if use_nccl else "gloo"
        rendezvous = Rendezvous(place)
        store = rendezvous.store("" if use_nccl else check_interfaces())
        try:
            dist.init_process_group(
                self.library,
                store=store,
                rank=place.world_rank,
                world_size=place.world_size,
                timeout=rendezvous.left,
            )
            dist.all_reduce(torch.zeros(1, device=self._device))  # NCCL connects only now
        except RuntimeError as error:
            raise no_connection(self.library, error, place) from None
        dist.distributed_c10d._set_pg_timeout(_DAY)  # it has no public name
        store.set_timeout(_DAY)
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
        """Every process's count (world_size,). Unless known, they travel: 8 bytes of each."""
        if known is not None:
            check_counts(count, known[self.world_rank])
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
            gathered = torch.empty(self.world_size, dtype=torch.int64, device=self._device)
            self._dist.all_to_all_single(gathered, torch.tensor(sent, device=self._device))
            self._count([8] * self.world_size, [8] * self.world_size)
            sizes = gathered.tolist()
        else:
            check_counts(sent, list(counts[self.world_rank]))
            sizes = [row[self.world_rank] for row in counts]
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
        mine = concatenated(buffers).to(self._device)
        self._dist.all_to_all_single(received, mine, sizes, sent)
        self._count(sent, sizes)
        return list(torch.split(received.cpu(), sizes))

    def allreduce(self, values: Tensor) -> None:
        on_device = values.to(self._device)
        self._dist.all_reduce(on_device)
        self._count_allreduce(values.numel() * values.element_size())
        values.copy_(on_device)

    def _broadcast_piece(self, piece: np.ndarray) -> None:
        buffer = torch.from_numpy(piece).to(self._device)
        self._dist.broadcast(buffer, src=0)
        piece[:] = buffer.cpu().numpy()

    def barrier(self) -> None:
        self._dist.barrier()

    def close(self) -> None:
        self._dist.destroy_process_group()
