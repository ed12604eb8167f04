"""Merge paths: the weighted sum of rows over the clients of all processes, as they come.

Every client holds some of the same rows; one that it lacks counts as zero. All paths give the same
sum on every process:

allgather   every process gets every client's rows and adds them in client_id order in float64: the
            same bits for any number of processes. The reference.
split       each process owns a part of the rows; clients' rows go to their owners, which add them
            in client_id order in float64; the sums are gathered: the same bits again.
allreduce   each process adds its own clients, in float32 by eights and the eights in float64; the
            sums are allreduced: equal but for rounding.
dense       the same over all rows, whether a client holds them or not: what everybody has.

What each costs: merge/cost.py. A weight is a whole number below 2^29 or a float32: its product with
a float32 is exact in float64, so that no fused multiply-add can change a bit. Rows may travel under
a codec (fedara_core/codec.py); they are decoded to be added, and the sums travel as float32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fedara_core.codec import decode_rows, row_bytes
from fedara_core.comm.base import Communicator
from fedara_core.merge.cost import PATHS, SAME_BITS
from fedara_core.values import equal_widths

BLOCK_VALUES = 1 << 24  # values of all clients that the allgather path receives at a time
_SUM_VALUES = 1 << 20  # values summed at a time: their float64 sum stays in the cache
# Clients that the allreduce paths add in float32, in a third of float64's time: eight roundings are
# off by at most 2^-21 of the sum of the absolute values, which must be below 3e38.
_FLOAT32_CLIENTS = 8
_EMPTY = torch.zeros(0, dtype=torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows (R,) of a sum: values in each, how they travel, and from which row on a client's
    whole_weight counts instead of its row_weight."""

    widths: Tensor  # (R,) int64
    codec: str = "fp32"
    first_whole: int = 0


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What every process knows of one client's rows before they come."""

    world_rank: int
    client_id: int
    row_weight: float
    whole_weight: float
    starts: np.ndarray  # (R + 1,) int64: where each row's bytes start in the client's
    held: Tensor  # (R,) bool


def running_sum(rows: Rows, communicator: Communicator, path: str) -> "RunningSum":
    """A sum by this path. Raises ValueError for an unknown one."""
    if path not in PATHS:
        raise ValueError(f"merge path {path!r} is unknown; allowed: {', '.join(PATHS)}")
    cls = OrderedSum if path in SAME_BITS else OwnSum
    return cls(rows, communicator, path)


class RunningSum:
    """The weighted sum over rows of which each client holds some.

    Clients come in chunks, lower client_ids first. In a chunk each process adds its own clients,
    then all exchange.
    """

    def __init__(self, rows: Rows, communicator: Communicator, path: str) -> None:
        self._rows, self._communicator, self._path = rows, communicator, path
        self._value_starts = cumulated(rows.widths.numpy())  # (R + 1,)
        self._byte_starts = cumulated(row_bytes(rows.codec, rows.widths).numpy())  # (R + 1,)

    def add(self, contribution: Contribution, payload: Tensor) -> None:
        """One of this process's clients: its rows as uint8."""
        raise NotImplementedError

    def exchange(self, contributions: Sequence[Contribution]) -> None:
        """Add what all processes have added since the last exchange: these, in client_id order."""
        raise NotImplementedError

    def result(self, row_divisor: float = 1, whole_divisor: float = 1) -> Tensor:
        """The sum of all clients, divided: (n,) float32; called once, by every process."""
        raise NotImplementedError

    def _blocks(self, first: int, end: int, num_values: int) -> Iterator[tuple[int, int]]:
        """Ranges of the rows with about num_values values each, cut where the weight changes."""
        while first < end:
            wanted = self._value_starts[first] + num_values
            last = int(np.searchsorted(self._value_starts, wanted, side="right")) - 1
            last = min(end, max(first + 1, last))
            if first < self._rows.first_whole:
                last = min(last, self._rows.first_whole)
            yield first, last
            first = last

    def _add_rows(
        self, total: Tensor, contribution: Contribution, payload: Tensor, first: int, last: int
    ) -> None:
        """Add one client's rows first to last to the sum over them; they have one weight."""
        weight = contribution.row_weight
        if first >= self._rows.first_whole:
            weight = contribution.whole_weight
        widths, codec = self._rows.widths[first:last], self._rows.codec
        if len(payload) == self._byte_starts[last] - self._byte_starts[first]:  # all held
            total.add_(decode_rows(codec, payload, widths), alpha=weight)
            return
        held = contribution.held[first:last]
        values = decode_rows(codec, payload, widths[held])
        for index, sums, own in equal_widths(held, widths, total, values):
            sums.index_add_(0, index, own.to(total.dtype), alpha=weight)

    def _divide(self, total: Tensor, first: int, row_divisor: float, whole_divisor: float) -> None:
        """Divide the sum over the rows from `first` on."""
        num_row_values = self._value_starts[self._rows.first_whole] - self._value_starts[first]
        cut = min(max(0, int(num_row_values)), len(total))
        total[:cut].div_(row_divisor)
        total[cut:].div_(whole_divisor)


class OrderedSum(RunningSum):
    """allgather and split: in client_id order in float64."""

    def __init__(self, rows: Rows, communicator: Communicator, path: str) -> None:
        super().__init__(rows, communicator, path)
        num_rows = len(rows.widths)
        # split: process p owns the p-th of P row ranges that have about equally many values.
        world_size, world_rank = communicator.world_size, communicator.world_rank
        shares = np.arange(1, world_size) * (self._value_starts[-1] / world_size)
        self._cuts = [0, *np.searchsorted(self._value_starts, shares).tolist(), num_rows]
        self._range = (0, num_rows)
        if path == "split":
            self._range = self._cuts[world_rank], self._cuts[world_rank + 1]
        first, last = self._value_starts[[*self._range]].tolist()
        self._total = torch.zeros(last - first, dtype=torch.float64)
        self._own: list[tuple[Contribution, Tensor]] = []

    def add(self, contribution: Contribution, payload: Tensor) -> None:
        # The others find a process's clients in the order of their headers, by client_id.
        assert not self._own or self._own[-1][0].client_id <= contribution.client_id
        self._own.append((contribution, payload))

    def exchange(self, contributions: Sequence[Contribution]) -> None:
        if self._path == "split":
            received = self._send_to_owners(contributions)
            self._add_received(contributions, received, *self._range)
        else:
            step = max(1, BLOCK_VALUES // max(1, len(contributions)))
            for first, last in self._blocks(*self._range, step):
                counts = [row[0] for row in self._counts(contributions, [first, last])]
                room = self._communicator.room("allgather", counts)
                mine = _join(self._slices(first, last), room)
                received = self._communicator.allgather(mine, counts)
                self._add_received(contributions, received, first, last)
        self._own.clear()

    def _send_to_owners(self, contributions: Sequence[Contribution]) -> list[Tensor]:
        """What the other processes have of this one's rows; their `_slices`."""
        world_rank = self._communicator.world_rank
        slices = [self._slices(first, last) for first, last in pairwise(self._cuts)]
        slices[world_rank] = []  # what a process has itself need not travel
        counts = self._counts(contributions, self._cuts)
        for sender, row in enumerate(counts):
            row[sender] = 0
        room = self._communicator.room("alltoall", [sum(row) for row in counts])
        joined = _join([piece for pieces in slices for piece in pieces], room)
        buffers = list(joined.split_with_sizes(counts[world_rank]))
        return self._communicator.alltoall(buffers, counts)

    def _counts(
        self, contributions: Sequence[Contribution], cuts: Sequence[int]
    ) -> list[list[int]]:
        """Bytes of each process's rows between one cut and the next: (P, len(cuts) - 1)."""
        counts = np.zeros((self._communicator.world_size, len(cuts) - 1), np.int64)
        for contribution in contributions:
            counts[contribution.world_rank] += np.diff(contribution.starts[cuts])
        return counts.tolist()

    def _slices(self, first: int, last: int) -> list[Tensor]:
        """Bytes of rows first to last of each client that this process has added."""
        return [payload[c.starts[first] : c.starts[last]] for c, payload in self._own]

    def _add_received(
        self,
        contributions: Sequence[Contribution],
        received: Sequence[Tensor],
        first: int,
        last: int,
    ) -> None:
        """Add these rows of all clients; received: the other processes' `_slices` of them."""
        own = iter(self._own)
        found: list[tuple[Tensor, int]] = []  # each client's bytes, and which of them comes first
        used = [0] * len(received)
        for contribution in contributions:
            start, end = contribution.starts[[first, last]].tolist()
            sender = contribution.world_rank
            if sender == self._communicator.world_rank:
                found.append((next(own)[1], 0))
            else:
                found.append((received[sender][used[sender] :], start))
                used[sender] += end - start
        offset = self._value_starts[self._range[0]]
        for block in self._blocks(first, last, _SUM_VALUES):
            total = self._total[slice(*(self._value_starts[[*block]] - offset))]
            for contribution, (payload, start) in zip(contributions, found, strict=True):
                piece = payload[slice(*(contribution.starts[[*block]] - start))]
                self._add_rows(total, contribution, piece, *block)

    def result(self, row_divisor: float = 1, whole_divisor: float = 1) -> Tensor:
        self._divide(self._total, self._range[0], row_divisor, whole_divisor)
        values = self._total.float()
        if self._path != "split":
            return values
        counts = (4 * np.diff(self._value_starts[self._cuts])).tolist()
        gathered = self._communicator.allgather(values.view(torch.uint8), counts)
        return torch.cat([buffer.view(torch.float32) for buffer in gathered])


class OwnSum(RunningSum):
    """allreduce and dense: each process's own clients, in float32 by eights and the eights in
    float64."""

    def __init__(self, rows: Rows, communicator: Communicator, path: str) -> None:
        super().__init__(rows, communicator, path)
        self._eight = torch.zeros(int(self._value_starts[-1]))
        self._num_added = 0  # to `_eight`
        self._total: Tensor | None = None  # float64: the eights before

    def add(self, contribution: Contribution, payload: Tensor) -> None:
        if self._num_added == _FLOAT32_CLIENTS:
            self._total = self._sum().double()
            self._eight.zero_()
            self._num_added = 0
        num_rows = len(self._rows.widths)
        for first, last in self._blocks(0, num_rows, int(self._value_starts[-1])):
            total = self._eight[self._value_starts[first] : self._value_starts[last]]
            piece = payload[contribution.starts[first] : contribution.starts[last]]
            self._add_rows(total, contribution, piece, first, last)
        self._num_added += 1

    def _sum(self) -> Tensor:
        """The sum of this process's clients, in the memory of `_total`, or else of `_eight`."""
        return self._eight if self._total is None else self._total.add_(self._eight)

    def exchange(self, contributions: Sequence[Contribution]) -> None:
        """Nothing travels but the sums, at the end."""

    def result(self, row_divisor: float = 1, whole_divisor: float = 1) -> Tensor:
        total = self._sum()
        self._divide(total, 0, row_divisor, whole_divisor)
        values = total.float()
        self._communicator.allreduce(values)
        return values


def cumulated(sizes: np.ndarray) -> np.ndarray:
    """What lies before each of (R,), and all of them: (R + 1,) int64."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def byte_starts(held: Tensor, rows: Rows) -> np.ndarray:
    """Bytes of the rows that are held before each row, and of all: (R + 1,) int64."""
    return cumulated(np.where(held.numpy(), row_bytes(rows.codec, rows.widths).numpy(), 0))


def _join(pieces: Sequence[Tensor], room: Tensor) -> Tensor:
    """uint8 vectors one after another, in this memory."""
    return torch.cat([_EMPTY, *pieces], out=room)
