"""Merge paths: the weighted sum of rank-masked rows over the clients of all processes.

Every client holds some rows of a common layout, as its rank_mask says; a row that it lacks counts
as zero. All paths give the same sum over the union of the masks, on every process:

allgather   every process gets every client's rows and adds them in client_id order in float64: the
            same bits for any number of processes. The reference.
split       each process owns a part of the rows; clients' rows go to their owners, which add them
            in client_id order in float64; the sums are gathered: the same bits again.
allreduce   each process adds its own clients as they come, in float32 by eights and the eights in
            float64; the sums are allreduced: equal but for rounding.
dense       the same over the whole layout: what everybody has.

All but dense sum over the union of the masks, which every process knows from the headers.

What each costs: fedara_core/merge/cost.py.

A sum may take its clients in several goes, lower client_ids first: what a process holds is then one
sum and the clients of one go, however many there are in all. Weights are whole numbers, such as
numbers of examples: their products with float32 are exact in float64, so no fused multiply-add can
change a bit. Rows may travel under a codec (fedara_core/codec.py); they are decoded to be added,
and the sums of split travel as float32.
"""

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fedara_core.codec import decode_rows, encode_rows, message_widths, row_bytes
from fedara_core.comm.base import Communicator
from fedara_core.merge.cost import PATHS, SAME_BITS
from fedara_core.seeds import generator
from fedara_core.wire import Upload, add_reference, message_bytes, pack_heads, unpack_heads

BLOCK_VALUES = 1 << 24  # values of all clients that the allgather path receives at a time
_SUM_VALUES = 1 << 20  # values summed at a time: their float64 sum stays in the cache
# Clients that the allreduce paths add in float32, in a third of float64's time: eight roundings are
# off by at most 2^-21 of the sum of the absolute values, which must be below 3e38.
_FLOAT32_CLIENTS = 8


@dataclass(frozen=True, kw_only=True)
class Part:
    """One client's rows: rank_mask (R,) bool over the layout, values (n,) float32 of its rows in
    the order of the layout, and the weight that they have in the sum, below 2^29."""

    client_id: int
    weight: int
    rank_mask: Tensor
    values: Tensor


@dataclass(frozen=True, kw_only=True)
class Sum:
    """The union of the masks (R,) bool, and the sum over its rows in layout order (U,) float32."""

    rank_mask: Tensor
    values: Tensor


@dataclass(frozen=True, kw_only=True)
class _Header:
    """What every process knows of one client's part before its rows come: S rows are summed."""

    world_rank: int
    client_id: int
    weight: int
    starts: np.ndarray  # (S + 1,) int64: where each row's bytes start in the part's
    rank_mask: Tensor  # (S,) bool


def weighted_sum(
    parts: Sequence[Part],
    widths: Tensor,
    communicator: Communicator,
    path: str,
    codec: str = "fp32",
    seed: int = 0,
) -> Sum:
    """The weighted sum of all processes' parts; every process calls it and gets the whole sum.

    parts: this process's clients, maybe none; widths (R,) int64: values in each row; seed: of a
    codec's rounding. Raises ValueError for an unknown path, and on every process if some part does
    not fit the layout.
    """
    parts = sorted(parts, key=lambda part: part.client_id)
    masks = _gather_masks(parts, widths, communicator)
    union = torch.zeros(len(widths), dtype=torch.bool)
    for _, _, _, rank_mask in masks:
        union |= rank_mask
    dense = path == "dense"
    summed = torch.ones_like(union) if dense else union
    total = _running_sum(widths[summed], communicator, path, codec)
    sizes = row_bytes(codec, widths[summed])
    headers = [
        _Header(
            world_rank=world_rank,
            client_id=client_id,
            weight=weight,
            starts=_starts(held, sizes),
            rank_mask=held,
        )
        for world_rank, client_id, weight, rank_mask in masks
        for held in [rank_mask[summed]]
    ]
    own = [header for header in headers if header.world_rank == communicator.world_rank]
    for header, part in zip(own, parts, strict=True):
        draw = generator(seed, "codec", part.client_id)
        total.take(header, encode_rows(codec, part.values, widths[part.rank_mask], draw))
    total.meet(headers)
    values = total.result()
    return Sum(rank_mask=union, values=_rows_of(values, union, widths) if dense else values)


class RunningMean:
    """The mean of equally long uploads, weighted by their numbers of examples, as they come.

    Each process takes its clients' uploads, maybe none, in client_id order; then all meet. They may
    do so in several goes, with higher client_ids in each.
    """

    def __init__(self, communicator: Communicator, path: str, reference: Tensor) -> None:
        """reference: what a lossy codec coded the uploads' difference from."""
        self._communicator, self._path, self._reference = communicator, path, reference
        self._taken: list[tuple[Upload, int]] = []  # without values, and how many it has
        self._heads: list[Upload] = []
        self._lengths: dict[int, int] = {}
        self._num_values = 0
        self._total: _RunningSum | None = None

    def take(self, upload: Upload) -> None:
        """One of this process's uploads. Where sums travel it is added and its values forgotten."""
        num_values, payload = upload.values.numel(), upload.coded
        # One whose values are not all finite is told by a train_loss of NaN.
        loss = upload.train_loss if upload.is_finite else math.nan
        head = replace(upload, values=torch.zeros(0), payload=None, train_loss=loss)
        self._taken.append((head, num_values))
        total = self._sum_of(num_values, head.codec)
        if num_values == self._num_values:  # if not, all say so when they meet
            total.take(_header(self._communicator.world_rank, head, num_values), payload)

    def meet(self) -> None:
        """Add what all processes have taken since they last met. Raises ValueError on every process
        if uploads are not equally long."""
        heads = self._gather_heads()
        self._taken.clear()
        if heads:
            codec, num_values = heads[0][1].codec, heads[0][2]
            headers = [_header(world_rank, head, num_values) for world_rank, head, _ in heads]
            self._sum_of(num_values, codec).meet(headers)
            self._heads += [head for _, head, _ in heads]

    def _sum_of(self, num_values: int, codec: str) -> "_RunningSum":
        """The sum of all uploads; the first one says how long they are."""
        if self._total is None:
            widths = message_widths(num_values)
            self._total = _running_sum(widths, self._communicator, self._path, codec)
            self._num_values = num_values
        return self._total

    def _gather_heads(self) -> list[tuple[int, Upload, int]]:
        """world_rank, upload without its values and their number of each client that any process
        has taken, in client_id order."""
        told = self._communicator.gather_bytes(pack_heads(self._taken))
        heads = [
            (world_rank, head, num_values)
            for world_rank, data in enumerate(told)
            for head, num_values in unpack_heads(data)
        ]
        self._lengths |= {head.client_id: num_values for _, head, num_values in heads}
        if len(set(self._lengths.values())) > 1:
            raise ValueError(
                f"uploads differ in length, so they have no mean; by client_id: {self._lengths}"
            )
        return sorted(heads, key=lambda item: item[1].client_id)

    def result(self) -> tuple[list[Upload], int]:
        """All uploads in client_id order, each with the weighted mean as its values, and the bytes
        that they have with their own."""
        if self._total is None:
            return [], 0
        mean = self._total.result(sum(head.num_examples for head in self._heads))
        codec = self._heads[0].codec
        if codec != "fp32":
            mean = add_reference(mean, self._reference)
        num_bytes = sum(message_bytes(len(mean), len(head.bits), codec) for head in self._heads)
        uploads = [replace(u, codec="fp32", payload=None, values=mean) for u in self._heads]
        return uploads, num_bytes


class _RunningSum:
    """A weighted sum over rows of which each client has some, the rows in a fixed order.

    It takes its clients in several goes, lower client_ids first. In a go each process takes its own
    parts, then all meet.
    """

    def __init__(self, widths: Tensor, communicator: Communicator, path: str, codec: str) -> None:
        self._widths, self._communicator = widths, communicator
        self._path, self._codec = path, codec
        self._value_starts = _cumulated(widths.numpy())  # (S + 1,)
        self._byte_starts = _cumulated(row_bytes(codec, widths).numpy())  # (S + 1,)

    def take(self, header: _Header, payload: Tensor) -> None:
        """One of this process's parts, uint8 rows."""
        raise NotImplementedError

    def meet(self, headers: Sequence[_Header]) -> None:
        """Add what all processes have taken since they last met: these parts, in order."""
        raise NotImplementedError

    def result(self, divisor: int = 1) -> Tensor:
        """The sum of what was added, or its part by the divisor: (n,) float32; once."""
        raise NotImplementedError

    def _blocks(self, rows: tuple[int, int], num_values: int) -> Iterator[tuple[int, int]]:
        """Ranges (first, last) of the rows with about num_values values each."""
        first, end = rows
        while first < end:
            wanted = self._value_starts[first] + num_values
            last = int(np.searchsorted(self._value_starts, wanted, side="right")) - 1
            last = min(end, max(first + 1, last))
            yield first, last
            first = last

    def _add_rows(
        self, total: Tensor, header: _Header, payload: Tensor, rows: tuple[int, int]
    ) -> None:
        """Add one part's rows first to last to the sum over them."""
        first, last = rows
        widths = self._widths[first:last]
        if len(payload) == self._byte_starts[last] - self._byte_starts[first]:  # all held
            total.add_(decode_rows(self._codec, payload, widths), alpha=header.weight)
            return
        held = header.rank_mask[first:last]
        values = decode_rows(self._codec, payload, widths[held])
        for index, sums, own in _equal_widths(held, widths, total, values):
            sums.index_add_(0, index, own.to(total.dtype), alpha=header.weight)


class _OrderedSum(_RunningSum):
    """allgather and split: in client_id order in float64."""

    def __init__(self, widths: Tensor, communicator: Communicator, path: str, codec: str) -> None:
        super().__init__(widths, communicator, path, codec)
        # split: process p owns the p-th of P row ranges that have about equally many values.
        world_size, world_rank = communicator.world_size, communicator.world_rank
        shares = np.arange(1, world_size) * (self._value_starts[-1] / world_size)
        self._cuts = [0, *np.searchsorted(self._value_starts, shares).tolist(), len(widths)]
        self._rows = (0, len(widths))
        if path == "split":
            self._rows = self._cuts[world_rank], self._cuts[world_rank + 1]
        first, last = self._value_starts[[*self._rows]].tolist()
        self._memory = _totals.take(8 * (last - first))
        self._total = self._memory.view(torch.float64).zero_()
        self._own: list[tuple[_Header, Tensor]] = []

    def take(self, header: _Header, payload: Tensor) -> None:
        # The others find a process's parts in the order of their headers, by client_id.
        assert not self._own or self._own[-1][0].client_id <= header.client_id
        self._own.append((header, payload))

    def meet(self, headers: Sequence[_Header]) -> None:
        if self._path == "split":
            self._add_received(headers, self._to_owners(headers), self._rows)
        else:
            step = max(1, BLOCK_VALUES // max(1, len(headers)))
            for first, last in self._blocks(self._rows, step):
                counts = [row[0] for row in self._counts(headers, [first, last])]
                mine = _join(
                    self._slices(first, last), self._communicator.room("allgather", counts)
                )
                received = self._communicator.allgather(mine, counts)
                self._add_received(headers, received, (first, last))
        self._own.clear()

    def _to_owners(self, headers: Sequence[_Header]) -> list[Tensor]:
        """What the other processes have of this one's rows; their `_slices`."""
        world_rank = self._communicator.world_rank
        slices = [self._slices(first, last) for first, last in pairwise(self._cuts)]
        slices[world_rank] = []  # what a process has itself need not travel
        counts = self._counts(headers, self._cuts)
        for sender, row in enumerate(counts):
            row[sender] = 0
        room = self._communicator.room("alltoall", [sum(row) for row in counts])
        joined = _join([piece for pieces in slices for piece in pieces], room)
        return self._communicator.alltoall(
            list(joined.split_with_sizes(counts[world_rank])), counts
        )

    def _counts(self, headers: Sequence[_Header], cuts: Sequence[int]) -> list[list[int]]:
        """Bytes of each process's rows between one cut and the next: (P, len(cuts) - 1)."""
        counts = np.zeros((self._communicator.world_size, len(cuts) - 1), np.int64)
        for header in headers:
            counts[header.world_rank] += np.diff(header.starts[cuts])
        return counts.tolist()

    def _slices(self, first: int, last: int) -> list[Tensor]:
        """Bytes of rows first to last of each part that this process has taken."""
        return [
            payload[header.starts[first] : header.starts[last]] for header, payload in self._own
        ]

    def _add_received(
        self, headers: Sequence[_Header], received: Sequence[Tensor], rows: tuple[int, int]
    ) -> None:
        """Add these rows of all headers' parts; received: the other processes' `_slices` of them,
        each one's in the order of its headers."""
        own = iter(self._own)
        found: list[tuple[Tensor, int]] = []  # each part's bytes, and where in the part they start
        taken = [0] * len(received)
        for header in headers:
            first, last = header.starts[[*rows]].tolist()
            if header.world_rank == self._communicator.world_rank:
                found.append((next(own)[1], 0))
            else:
                found.append((received[header.world_rank][taken[header.world_rank] :], first))
                taken[header.world_rank] += last - first
        offset = self._value_starts[self._rows[0]]
        for block in self._blocks(rows, _SUM_VALUES):
            total = self._total[slice(*(self._value_starts[[*block]] - offset))]
            for header, (payload, start) in zip(headers, found, strict=True):
                piece = payload[slice(*(header.starts[[*block]] - start))]
                self._add_rows(total, header, piece, block)

    def result(self, divisor: int = 1) -> Tensor:
        values = self._total.div_(divisor).float()
        _totals.give_back(self._memory)
        if self._path != "split":
            return values
        counts = (4 * np.diff(self._value_starts[self._cuts])).tolist()
        gathered = self._communicator.allgather(values.view(torch.uint8), counts)
        return torch.cat([buffer.view(torch.float32) for buffer in gathered])


class _OwnSum(_RunningSum):
    """allreduce and dense: each process's own clients as they come, in float32 by eights and the
    eights in float64."""

    def __init__(self, widths: Tensor, communicator: Communicator, path: str, codec: str) -> None:
        super().__init__(widths, communicator, path, codec)
        self._total = torch.zeros(self._value_starts[-1])
        self._num_added = 0  # to `_total`
        self._before: Tensor | None = None  # float64: what was in `_total` before

    def take(self, header: _Header, payload: Tensor) -> None:
        if self._num_added == _FLOAT32_CLIENTS:
            self._before = self._all_added().double()
            self._total.zero_()
            self._num_added = 0
        self._add_rows(self._total, header, payload, (0, len(self._widths)))
        self._num_added += 1

    def _all_added(self) -> Tensor:
        """The sum of this process's clients, in the memory of `_before`, or else of `_total`."""
        return self._total if self._before is None else self._before.add_(self._total)

    def meet(self, headers: Sequence[_Header]) -> None:
        """Nothing travels but the sums, at the end."""

    def result(self, divisor: int = 1) -> Tensor:
        values = self._all_added().div_(divisor).float()
        self._communicator.allreduce(values)
        return values


def _running_sum(
    widths: Tensor, communicator: Communicator, path: str, codec: str = "fp32"
) -> _RunningSum:
    """Over rows of these widths (S,), by this path. Raises ValueError for an unknown one."""
    if path not in PATHS:
        raise ValueError(f"merge path {path!r} is unknown; allowed: {', '.join(PATHS)}")
    cls = _OrderedSum if path in SAME_BITS else _OwnSum
    return cls(widths, communicator, path, codec)


class _Memory:
    """Memory that one exchange leaves to the next: touching new pages takes as long as adding a
    client."""

    def __init__(self) -> None:
        self._spare = torch.zeros(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """A uint8 vector of that length, nobody else's until it is given back; any contents."""
        spare, self._spare = self._spare, torch.zeros(0, dtype=torch.uint8)
        if len(spare) < num_bytes:
            spare = torch.empty(num_bytes, dtype=torch.uint8)
        return spare[:num_bytes]

    def give_back(self, memory: Tensor) -> None:
        """What `take` gave. The larger of this and what is spare is kept, if it is not huge."""
        whole = memory.untyped_storage().nbytes()
        if len(self._spare) < whole <= _KEPT_BYTES:
            self._spare = memory.as_strided((whole,), (1,), 0)


_KEPT_BYTES = 1 << 28
_totals = _Memory()
_EMPTY = torch.zeros(0, dtype=torch.uint8)
_FITS, _MISFIT = b"\0", b"\1"  # what precedes a process's headers, or what is wrong
_HEADER = struct.Struct("<IQ")  # client_id, weight; the rank_mask's bits follow


def _gather_masks(
    parts: Sequence[Part], widths: Tensor, communicator: Communicator
) -> list[tuple[int, int, int, Tensor]]:
    """world_rank, client_id, weight and rank_mask of every process's parts, in client_id order."""
    wrong = [text for part in parts if (text := _misfit(part, widths))]
    mine = _MISFIT + wrong[0].encode() if wrong else _FITS
    if not wrong:
        for part in parts:
            mine += _HEADER.pack(part.client_id, part.weight)
            mine += np.packbits(part.rank_mask.numpy()).tobytes()
    told = communicator.gather_bytes(mine)
    for data in told:  # the same on every process, so that none waits for one that has given up
        if data.startswith(_MISFIT):
            raise ValueError(data.removeprefix(_MISFIT).decode())
    length = _HEADER.size + (len(widths) + 7) // 8
    masks = []
    for world_rank, data in enumerate(told):
        for start in range(len(_FITS), len(data), length):
            client_id, weight = _HEADER.unpack_from(data, start)
            packed = np.frombuffer(data[start + _HEADER.size : start + length], np.uint8)
            bits = np.unpackbits(packed, count=len(widths)).view(bool)
            masks.append((world_rank, client_id, weight, torch.from_numpy(bits)))
    return sorted(masks, key=lambda mask: mask[1])


def _misfit(part: Part, widths: Tensor) -> str:
    """What is wrong with a part, in words; empty if nothing is."""
    if len(part.rank_mask) != len(widths):
        rows = len(part.rank_mask)
        return f"client {part.client_id}: a rank_mask of {rows} rows, not {len(widths)}"
    expected = int(widths[part.rank_mask].sum())
    if part.values.numel() == expected:
        return ""
    return f"client {part.client_id}: {part.values.numel()} values, and a rank_mask for {expected}"


@lru_cache(maxsize=4)
def _all_rows(codec: str, num_values: int) -> tuple[Tensor, np.ndarray]:
    """The rank_mask (R,) of a client that has every row of a message, and its rows' starts."""
    widths = message_widths(num_values)
    rank_mask = torch.ones(len(widths), dtype=torch.bool)
    return rank_mask, _starts(rank_mask, row_bytes(codec, widths))


def _header(world_rank: int, upload: Upload, num_values: int) -> _Header:
    """Of a client that has every row of a message."""
    rank_mask, starts = _all_rows(upload.codec, num_values)
    return _Header(
        world_rank=world_rank,
        client_id=upload.client_id,
        weight=upload.num_examples,
        starts=starts,
        rank_mask=rank_mask,
    )


def _starts(rank_mask: Tensor, sizes: Tensor) -> np.ndarray:
    """Bytes before each row and in all: (R + 1,) int64."""
    return _cumulated(np.where(rank_mask.numpy(), sizes.numpy(), 0))


def _cumulated(sizes: np.ndarray) -> np.ndarray:
    """What lies before each of (R,), and all of them: (R + 1,) int64."""
    return np.concatenate([[0], np.cumsum(sizes)])


def _rows_of(values: Tensor, kept: Tensor, widths: Tensor) -> Tensor:
    """Of the values of rows of these widths (R,) those of the rows that are kept (R,)."""
    if kept.all():
        return values
    chosen = torch.empty(int(widths[kept].sum()))
    for index, rows, live in _equal_widths(kept, widths, values, chosen):
        torch.index_select(rows, 0, index, out=live)
    return chosen


def _equal_widths(
    held: Tensor, widths: Tensor, total: Tensor, values: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each run of rows of one width w: which are held (k,), all of them (rows, w) in `total`,
    and those that are held (k, w) in `values`."""
    row = start = taken = 0
    for width, count in zip(
        *(t.tolist() for t in torch.unique_consecutive(widths, return_counts=True)), strict=True
    ):
        index = held[row : row + count].nonzero().flatten()
        own = values[taken : taken + len(index) * width].view(len(index), width)
        yield index, total[start : start + count * width].view(count, width), own
        row, start, taken = row + count, start + count * width, taken + len(index) * width


def _join(pieces: Sequence[Tensor], room: Tensor) -> Tensor:
    """uint8 vectors one after another, in this memory."""
    return torch.cat([_EMPTY, *pieces], out=room)
