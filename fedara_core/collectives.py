"""Merge paths: the weighted sum of rank-masked rows over the clients of all processes.

Every client holds some rows of a common layout, as its rank_mask says; a row that it lacks counts
as zero. All paths give the same sum over the union of the masks, on every process:

allgather   every process gets every client's rows and adds them in client_id order in float64: the
            same bits for any number of processes. The reference.
split       each process owns a part of the layout; clients' rows go to their owners, which add them
            in client_id order in float64; the sums are gathered: the same bits again.
allreduce   each process adds its own clients over the union of all masks; the sums are allreduced.
dense       the same over the whole layout: what everybody has.

What each costs: fedara_core/paths.py.

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
from fedara_core.comm import Communicator
from fedara_core.paths import PATHS
from fedara_core.seeds import generator
from fedara_core.wire import Upload, add_reference, pack, unpack

BLOCK_VALUES = 1 << 24  # values of all clients that the allgather path receives at a time
_SUM_VALUES = 1 << 20  # values summed at a time: their float64 sum stays in the cache


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
    """What every process knows of one client's part before its rows come."""

    world_rank: int
    client_id: int
    weight: int
    starts: Tensor  # (R + 1,) int64: where each row's bytes start in the part's
    rank_mask: Tensor


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
    total = _RunningSum(widths, communicator, path, codec)
    parts = sorted(parts, key=lambda part: part.client_id)
    headers = _gather_headers(parts, widths, codec, communicator)
    payloads = [
        encode_rows(codec, p.values, widths[p.rank_mask], generator(seed, "codec", p.client_id))
        for p in parts
    ]
    total.add(headers, payloads)
    return total.result()


class RunningMean:
    """The mean of equally long uploads, weighted by their numbers of examples, as they come."""

    def __init__(self, communicator: Communicator, path: str, reference: Tensor) -> None:
        """reference: what a lossy codec coded the uploads' difference from."""
        self._communicator, self._path, self._reference = communicator, path, reference
        self._lengths: dict[int, int] = {}
        self._heads: list[Upload] = []
        self._total: _RunningSum | None = None

    def add(self, uploads: Sequence[Upload]) -> None:
        """Every process's clients of this go, maybe none here; all have higher client_ids than
        those before. Raises ValueError on every process if uploads are not equally long."""
        uploads = sorted(uploads, key=lambda upload: upload.client_id)
        heads = self._gather_heads(uploads)
        if not heads:
            return
        codec, num_values = heads[0][1].codec, next(iter(self._lengths.values()))
        widths = message_widths(num_values)
        if self._total is None:
            self._total = _RunningSum(widths, self._communicator, self._path, codec)
        rank_mask, starts = _all_rows(codec, num_values)
        headers = [
            _Header(
                world_rank=world_rank,
                client_id=head.client_id,
                weight=head.num_examples,
                starts=starts,
                rank_mask=rank_mask,
            )
            for world_rank, head in heads
        ]
        self._total.add(headers, [upload.coded for upload in uploads])
        self._heads += [head for _, head in heads]

    def _gather_heads(self, uploads: Sequence[Upload]) -> list[tuple[int, Upload]]:
        """world_rank and upload without its values of each client, in client_id order.

        One whose values are not all finite has a train_loss of NaN.
        """
        sizes, mine = _COUNT.pack(len(uploads)), []
        for upload in uploads:
            sizes += _SIZE.pack(upload.client_id, upload.values.numel())
            loss = upload.train_loss if upload.is_finite else math.nan
            none = None if upload.payload is None else torch.zeros(0, dtype=torch.uint8)
            mine.append(replace(upload, values=torch.zeros(0), payload=none, train_loss=loss))
        told = torch.frombuffer(bytearray(sizes), dtype=torch.uint8)
        heads: list[tuple[int, Upload]] = []
        for world_rank, buffer in enumerate(
            self._communicator.allgather(torch.cat([told, pack(mine)]))
        ):
            data = buffer.numpy().tobytes()
            end = _COUNT.size + _COUNT.unpack_from(data)[0] * _SIZE.size
            self._lengths |= dict(_SIZE.iter_unpack(data[_COUNT.size : end]))
            heads += [(world_rank, head) for head in unpack(buffer[end:])]
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
        mean = self._total.result(sum(head.num_examples for head in self._heads)).values
        if self._heads[0].codec != "fp32":
            mean = add_reference(mean, self._reference)
        uploads = [replace(head, values=mean) for head in self._heads]
        num_bytes = sum(upload.num_bytes for upload in uploads)
        return [replace(u, codec="fp32", payload=None) for u in uploads], num_bytes


class _RunningSum:
    """A weighted sum over the layout that takes its clients in several goes, in client_id order."""

    def __init__(
        self, widths: Tensor, communicator: Communicator, path: str, codec: str = "fp32"
    ) -> None:
        if path not in PATHS:
            raise ValueError(f"merge path {path!r} is unknown; allowed: {', '.join(PATHS)}")
        self._widths, self._communicator, self._path = widths, communicator, path
        self._codec = codec
        self._union = torch.zeros(len(widths), dtype=torch.bool)
        self._value_starts = _starts(torch.ones_like(self._union), widths)  # (R + 1,)
        # split: process p owns the p-th of P row ranges that have about equally many values.
        world_size = communicator.world_size
        shares = torch.arange(1, world_size) * (self._value_starts[-1] / world_size)
        cuts = torch.searchsorted(self._value_starts, shares).tolist()
        self._cuts = [0, *cuts, len(widths)]
        self._rows = (0, len(widths))
        if path == "split":
            self._rows = (
                self._cuts[communicator.world_rank],
                self._cuts[communicator.world_rank + 1],
            )
        first, last = self._value_starts[list(self._rows)].tolist()
        self._memory = _totals.take(8 * (last - first))
        self._total = self._memory.view(torch.float64).zero_()

    def add(self, headers: Sequence[_Header], payloads: Sequence[Tensor]) -> None:
        """headers: of all processes' parts, in client_id order; payloads: uint8 rows of this
        process's parts, in the same order."""
        for header in headers:
            self._union |= header.rank_mask
        world_rank = self._communicator.world_rank
        own = [header for header in headers if header.world_rank == world_rank]
        if self._path == "allgather":
            step = max(1, BLOCK_VALUES // max(1, len(headers)))
            for first, last in self._blocks(self._rows, step):
                mine = _join(_slices(payloads, own, first, last))
                counts = self._counts(headers, [first, last])[:, 0].tolist()
                received = self._communicator.allgather(mine, counts)
                _joined.give_back(mine)
                self._add_received(headers, received, (first, last))
        elif self._path == "split":
            counts = self._counts(headers, self._cuts).tolist()
            joined, pieces = self._for_owners(payloads, own)
            received = self._communicator.alltoall(pieces, counts)
            _joined.give_back(joined)
            self._add_received(headers, received, self._rows)
        else:
            for header, payload in zip(own, payloads, strict=True):
                for first, last in self._blocks(self._rows, _SUM_VALUES):
                    start, stop = header.starts[[first, last]].tolist()
                    self._add_rows(header, payload[start:stop], first, last)

    def _counts(self, headers: Sequence[_Header], cuts: Sequence[int]) -> Tensor:
        """Bytes of each process's rows between one cut and the next: (P, len(cuts) - 1) int64."""
        counts = torch.zeros(self._communicator.world_size, len(cuts) - 1, dtype=torch.int64)
        for header in headers:
            counts[header.world_rank] += header.starts[cuts].diff()
        return counts

    def result(self, divisor: int = 1) -> Sum:
        """The sum of what was added, or its part by the divisor; once."""
        values = self._values(divisor)
        _totals.give_back(self._memory)
        return Sum(rank_mask=self._union, values=values)

    def _values(self, divisor: int) -> Tensor:
        """The whole sum's values over the union, by the divisor."""
        first, last = self._rows
        union, widths = self._union, self._widths
        live: slice | Tensor = slice(None)
        if not union[first:last].all():
            live = union[first:last].repeat_interleave(widths[first:last])
        mean = self._total.div_(divisor).float()
        if self._path == "dense":
            self._communicator.allreduce(mean)
        values = mean[live]
        if self._path == "allreduce":
            self._communicator.allreduce(values)
        elif self._path == "split":
            widths = torch.where(union, widths, 0)
            counts = [4 * int(widths[a:b].sum()) for a, b in pairwise(self._cuts)]
            gathered = self._communicator.allgather(values.view(torch.uint8), counts)
            values = torch.cat([buffer.view(torch.float32) for buffer in gathered])
        return values

    def _for_owners(
        self, payloads: Sequence[Tensor], own: Sequence[_Header]
    ) -> tuple[Tensor, list[Tensor]]:
        """What goes to all processes, and to each: its parts, one after another."""
        slices = [_slices(payloads, own, first, last) for first, last in pairwise(self._cuts)]
        sizes = [sum(map(len, pieces)) for pieces in slices]
        joined = _join([piece for pieces in slices for piece in pieces])
        return joined, list(torch.split(joined, sizes))

    def _blocks(self, rows: tuple[int, int], num_values: int) -> Iterator[tuple[int, int]]:
        """Ranges (first, last) of the rows with about num_values values of the layout each."""
        first, end = rows
        while first < end:
            wanted = self._value_starts[first] + num_values
            last = int(torch.searchsorted(self._value_starts, wanted, right=True)) - 1
            last = min(end, max(first + 1, last))
            yield first, last
            first = last

    def _add_received(
        self, headers: Sequence[_Header], received: Sequence[Tensor], rows: tuple[int, int]
    ) -> None:
        """Add rows of all headers' parts; received: each process's `_slices` for these rows."""
        # Where each part's slice starts: a process's slices lie in the order of its headers.
        starts, taken = [], [0] * len(received)
        for header in headers:
            size = int(header.starts[rows[1]] - header.starts[rows[0]])
            starts.append(taken[header.world_rank] - int(header.starts[rows[0]]))
            taken[header.world_rank] += size
        for first, last in self._blocks(rows, _SUM_VALUES):
            for header, start in zip(headers, starts, strict=True):
                begin, end = header.starts[[first, last]].tolist()
                payload = received[header.world_rank][start + begin : start + end]
                self._add_rows(header, payload, first, last)

    def _add_rows(self, header: _Header, payload: Tensor, first: int, last: int) -> None:
        """Add one part's rows first to last to the sum."""
        if not len(payload):
            return
        held, widths = header.rank_mask[first:last], self._widths[first:last]
        values = decode_rows(self._codec, payload, widths if held.all() else widths[held])
        offset = self._value_starts[self._rows[0]]
        begin, end = (self._value_starts[[first, last]] - offset).tolist()
        total = self._total[begin:end]
        if len(values) == len(total):
            total.add_(values, alpha=header.weight)
            return
        for rows, sums, own in _equal_widths(held, widths, total, values):
            sums.index_add_(0, rows, own.double(), alpha=header.weight)


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
_totals, _joined = _Memory(), _Memory()
_EMPTY = torch.zeros(0, dtype=torch.uint8)
_COUNT = struct.Struct("<I")
_SIZE = struct.Struct("<IQ")  # client_id, number of values
_FITS, _MISFIT = b"\0", b"\1"  # what precedes a process's headers, or what is wrong
_HEADER = struct.Struct("<IQ")  # client_id, weight; the rank_mask's bits follow


def _gather_headers(
    parts: Sequence[Part], widths: Tensor, codec: str, communicator: Communicator
) -> list[_Header]:
    """Every process's headers, in client_id order."""
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
    row_sizes = row_bytes(codec, widths)
    headers = []
    for world_rank, data in enumerate(told):
        for start in range(len(_FITS), len(data), length):
            client_id, weight = _HEADER.unpack_from(data, start)
            bits = np.frombuffer(data[start + _HEADER.size : start + length], np.uint8)
            rank_mask = torch.from_numpy(np.unpackbits(bits, count=len(widths)).astype(bool))
            headers.append(
                _Header(
                    world_rank=world_rank,
                    client_id=client_id,
                    weight=weight,
                    starts=_starts(rank_mask, row_sizes),
                    rank_mask=rank_mask,
                )
            )
    return sorted(headers, key=lambda header: header.client_id)


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
def _all_rows(codec: str, num_values: int) -> tuple[Tensor, Tensor]:
    """The rank_mask (R,) of a client that has every row of a message, and its rows' starts."""
    widths = message_widths(num_values)
    rank_mask = torch.ones(len(widths), dtype=torch.bool)
    return rank_mask, _starts(rank_mask, row_bytes(codec, widths))


def _starts(rank_mask: Tensor, sizes: Tensor) -> Tensor:
    """Values or bytes before each row and in all: (R + 1,) int64."""
    held = torch.where(rank_mask, sizes, 0)
    return torch.cat([torch.zeros(1, dtype=torch.int64), held.cumsum(0)])


def _equal_widths(
    held: Tensor, widths: Tensor, total: Tensor, values: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each run of rows of one width w: which are held (k,), sums (rows, w), values (k, w)."""
    row = start = taken = 0
    for width, count in zip(
        *(t.tolist() for t in torch.unique_consecutive(widths, return_counts=True)), strict=True
    ):
        rows = held[row : row + count].nonzero().flatten()
        own = values[taken : taken + len(rows) * width].view(-1, width)
        yield rows, total[start : start + count * width].view(count, width), own
        row, start, taken = row + count, start + count * width, taken + len(rows) * width


def _join(pieces: Sequence[Tensor]) -> Tensor:
    """uint8 vectors one after another, in memory to give back."""
    joined = _joined.take(sum(map(len, pieces)))
    return torch.cat([_EMPTY, *pieces], out=joined)


def _slices(
    payloads: Sequence[Tensor], headers: Sequence[_Header], first: int, last: int
) -> list[Tensor]:
    """Each part's bytes of rows first to last."""
    return [
        payload[header.starts[first] : header.starts[last]]
        for header, payload in zip(headers, payloads, strict=True)
    ]
