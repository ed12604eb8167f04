"""The vector of what trains, and the index that says which slice of it is what.

All that a client trains lies in one float32 vector, in an order that makes every use of it a run:

    rows that travel, part by part | whole parameters | local parts | frozen parts
    <------------------ num_sent ------------------->
    <------------------------- num_trained ------------------------>
    <------------------------------- size --------------------------------------->

Within a part the adapters come in name order, each with its live rows (r_live, width). So the rows
of one triplet lie at the same place of every part's run. A whole parameter, such as the
classification head, trains outside the adapters.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

Shape = tuple[int, int]  # (d_out, d_in) of a layer
Masks = Mapping[str, Tensor]  # adapter name -> (r,) bool: which of its triplets are live
Tensors = dict[str, Tensor]  # adapter or parameter name -> tensor
Parts = Mapping[str, Mapping[str, Tensor]]  # part of a row -> adapter name -> (r_live, width)


class Parted(Protocol):
    """How a row is divided: what the index must know of an adapter's form."""

    @property
    def frozen(self) -> tuple[str, ...]:
        """The parts that do not train."""

    @property
    def local(self) -> tuple[str, ...]:
        """The parts that train and never leave the client."""

    def widths(self, shape: Shape) -> dict[str, int]:
        """Part -> floats of one row in it, in the order of the parts."""

    def __hash__(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One tensor in the vector: a part of an adapter's rows, or a whole parameter, part ""."""

    name: str
    part: str
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)

    def of(self, vector: Tensor) -> Tensor:
        """Its view (..., *shape) of a vector (..., n); leading axes stay."""
        return vector[..., self.start : self.stop].view(*vector.shape[:-1], *self.shape)


@dataclass(frozen=True, kw_only=True)
class Index:
    """Which slice of the vector is what; a value, and the same on every process."""

    pieces: tuple[Piece, ...]
    num_sent: int
    num_trained: int

    @cached_property
    def size(self) -> int:
        """Length of the vector."""
        return self.pieces[-1].stop if self.pieces else 0

    @cached_property
    def runs(self) -> dict[str, slice]:
        """Part -> the slice that it takes in the vector; "" for the whole parameters."""
        runs: dict[str, slice] = {}
        for piece in self.pieces:
            start = runs[piece.part].start if piece.part in runs else piece.start
            runs[piece.part] = slice(start, piece.stop)
        return runs

    def parts(self, vector: Tensor) -> dict[str, Tensors]:
        """Views by part and adapter name (..., r_live, width); of live adapters only."""
        views: dict[str, Tensors] = {}
        for piece in self.pieces:
            if piece.part:
                views.setdefault(piece.part, {})[piece.name] = piece.of(vector)
        return views

    def whole(self, vector: Tensor) -> Tensors:
        """Views of the whole parameters, by name."""
        return {piece.name: piece.of(vector) for piece in self.pieces if not piece.part}

    def pack(self, parts: Parts, whole: Mapping[str, Tensor]) -> Tensor:
        """A vector (n,) with these tensors in it."""
        vector = torch.empty(self.size)
        for piece in self.pieces:
            source = parts[piece.part] if piece.part else whole
            piece.of(vector).copy_(source[piece.name])
        return vector

    @cached_property
    def num_whole(self) -> int:
        """How many parameters train whole."""
        return sum(not piece.part for piece in self.pieces)

    @cached_property
    def num_row_values(self) -> int:
        """Values of the adapters' rows that travel; whole parameters follow."""
        return sum(p.stop - p.start for p in self._sent if p.part)

    @cached_property
    def row_widths(self) -> Tensor:
        """Values in each row of what travels (R,) int64; a whole parameter is one row."""
        widths = [
            torch.full((piece.shape[0],), piece.shape[1])
            if piece.part
            else torch.tensor([piece.stop - piece.start])
            for piece in self._sent
        ]
        return torch.cat([torch.zeros(0, dtype=torch.int64), *widths])

    def per_row(self, per_triplet: Tensor, whole: float) -> Tensor:
        """A number of each triplet for each row of what travels (R,), `whole` for the parameters.

        per_triplet: (live triplets,), over the adapters in name order.
        """
        num_parts = len({piece.part for piece in self._sent if piece.part})
        of_whole = torch.full((self.num_whole,), whole, dtype=per_triplet.dtype)
        return torch.cat([*[per_triplet] * num_parts, of_whole])

    def per_value(self, per_triplet: Tensor, whole: float) -> Tensor:
        """The same for each value of what travels (num_sent,)."""
        return self.per_row(per_triplet, whole).repeat_interleave(self.row_widths)

    @property
    def _sent(self) -> Iterator[Piece]:
        return (piece for piece in self.pieces if piece.start < self.num_sent)

    def take(self, sent: Tensor, bits: Tensor) -> Tensor:
        """Of values that would travel (num_sent,) those of these triplets, and the whole
        parameters."""
        return take_rows(sent, self.per_row(bits, whole=True), self.row_widths)


EMPTY = Index(pieces=(), num_sent=0, num_trained=0)


def make_index(
    form: Parted,
    shapes: Mapping[str, Shape],
    num_live: Mapping[str, int],
    whole: Mapping[str, tuple[int, ...]],
) -> Index:
    """The index of these adapters and whole parameters.

    shapes: of the layers; num_live: live rows by adapter; whole: shapes of the parameters.
    """
    live = [(name, shapes[name], num_live[name]) for name in sorted(num_live) if num_live[name]]
    return _make_index(form, tuple(live), tuple(sorted(whole.items())))


@lru_cache(maxsize=256)  # one object an index, so that comparing two costs nothing
def _make_index(
    form: Parted,
    live: tuple[tuple[str, Shape, int], ...],
    whole: tuple[tuple[str, tuple[int, ...]], ...],
) -> Index:
    widths = {name: form.widths(shape) for name, shape, _ in live}
    names = list(form.widths(live[0][1])) if live else []
    pieces: list[Piece] = []

    def add(items: Iterable[tuple[str, str, tuple[int, ...]]]) -> int:
        """Append these pieces; returns where the next one starts."""
        end = pieces[-1].stop if pieces else 0
        for name, part, shape in items:
            pieces.append(Piece(name=name, part=part, shape=shape, start=end))
            end = pieces[-1].stop
        return end

    def rows(parts: Iterable[str]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        return ((n, part, (r, widths[n][part])) for part in parts for n, _, r in live)

    add(rows(part for part in names if part not in (*form.frozen, *form.local)))
    num_sent = add((name, "", shape) for name, shape in whole)
    num_trained = add(rows(part for part in names if part in form.local))
    add(rows(part for part in names if part in form.frozen))
    return Index(pieces=tuple(pieces), num_sent=num_sent, num_trained=num_trained)


def count_live(rank_masks: Masks) -> dict[str, int]:
    """Live triplets by adapter, in name order. Counted together: one by one takes much longer."""
    names = sorted(rank_masks)
    masks = [rank_masks[name] for name in names]
    before = np.concatenate([[0], np.cumsum(torch.cat([_NO_BITS, *masks]).numpy())])
    ends = [0, *accumulate(map(torch.numel, masks))]
    return dict(zip(names, np.diff(before[ends]).tolist(), strict=True))


def masks_of_bits(bits: Tensor, rank_masks: Masks) -> dict[str, Tensor]:
    """rank_masks with only those live triplets whose bit is set: bits (live triplets,) bool."""
    live = count_live(rank_masks)
    pieces = torch.split(bits, list(live.values()))
    return {
        name: rank_masks[name].masked_scatter(rank_masks[name], piece)
        for name, piece in zip(live, pieces, strict=True)
    }


def bits_of_masks(chosen: Masks, rank_masks: Masks) -> Tensor:
    """Inverse of `masks_of_bits`: (live triplets,) bool, whether each live triplet is chosen."""
    return torch.cat([_NO_BITS, *(chosen[n][rank_masks[n]] for n in sorted(rank_masks))])


def first_rows(rank_masks: Masks, lora_rank: int) -> dict[str, Tensor]:
    """The live rows among the first lora_rank ones: what a client of that capacity trains."""
    return {name: mask & (torch.arange(len(mask)) < lora_rank) for name, mask in rank_masks.items()}


def take_rows(values: Tensor, held: Tensor, widths: Tensor) -> Tensor:
    """Of rows of these widths (R,) those that are held (R,) bool."""
    if held.all():
        return values
    taken = torch.empty(int(widths[held].sum()))
    for index, rows, own in equal_widths(held, widths, values, taken):
        torch.index_select(rows, 0, index, out=own)
    return taken


def put_rows(taken: Tensor, held: Tensor, widths: Tensor) -> Tensor:
    """Inverse of `take_rows`, with zeros for the rows that are not held."""
    values = torch.zeros(int(widths.sum()))
    for index, rows, own in equal_widths(held, widths, values, taken):
        rows.index_copy_(0, index, own)
    return values


def equal_widths(
    held: Tensor, widths: Tensor, values: Tensor, taken: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each run of rows of one width w: which are held (k,), all of them (rows, w) in `values`,
    and those that are held (k, w) in `taken`."""
    row = start = used = 0
    for width, count in zip(
        *(t.tolist() for t in torch.unique_consecutive(widths, return_counts=True)), strict=True
    ):
        index = held[row : row + count].nonzero().flatten()
        own = taken[used : used + len(index) * width].view(len(index), width)
        yield index, values[start : start + count * width].view(count, width), own
        row, start, used = row + count, start + count * width, used + len(index) * width


_NO_BITS = torch.zeros(0, dtype=torch.bool)
