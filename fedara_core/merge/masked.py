"""The weighted sum of rank-masked rows: clients whose masks differ, summed over the masks' union.

Clients that choose their triplets, or can afford fewer (AdaLoRA, LoRA-A2, HetLoRA), send the rows
of their rank_mask alone; a row that a client left out counts as zero. `masked_sum` is what such a
round runs, and what `fedara micro collectives` times.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedara_core.codec import encode_rows
from fedara_core.comm.base import Communicator
from fedara_core.merge.mean import gather_headers
from fedara_core.merge.received import Received
from fedara_core.merge.sums import Contribution, Rows, byte_starts, running_sum
from fedara_core.seeds import generator
from fedara_core.values import Index, put_rows, take_rows
from fedara_core.wire import Header, Upload


@dataclass(frozen=True, kw_only=True)
class MaskedSum:
    """headers: of all clients, in client_id order; union (R,) bool: rows that some client holds;
    values (U,) float32: the sum over these rows, in their order."""

    headers: Sequence[Header]
    union: Tensor
    values: Tensor


def masked_sum(
    uploads: Sequence[Upload],
    widths: Tensor,
    communicator: Communicator,
    path: str,
    *,
    held_rows: Callable[[Header], Tensor] = lambda header: header.bits,
    first_whole: int | None = None,
    average: bool = False,
    codec: str = "fp32",
    seed: int = 0,
) -> MaskedSum:
    """The weighted sum of all processes' uploads; every process calls it and gets the whole sum.

    Args:
        uploads: this process's clients, maybe none; values in the order of the rows.
        widths: (R,) int64, values in each row.
        held_rows: which rows a client has sent (R,) bool, from its header.
        first_whole: rows before it weigh row_weight (or num_examples), the others num_examples.
        average: divide the sum by all clients' weights.
        codec: how rows travel; seed: of its rounding.

    Raises ValueError for an unknown path, and on every process if an upload does not fit the rows.
    """
    uploads = sorted(uploads, key=lambda upload: upload.client_id)
    gathered = gather_headers([upload.header for upload in uploads], communicator)
    headers = [header for _, header in gathered]
    held = [held_rows(header) for header in headers]
    _check_fit(headers, held, widths)
    union = torch.zeros(len(widths), dtype=torch.bool)
    for rows_held in held:
        union |= rows_held
    summed = torch.ones_like(union) if path == "dense" else union
    first_whole = len(widths) if first_whole is None else first_whole
    rows = Rows(widths=widths[summed], codec=codec, first_whole=int(summed[:first_whole].sum()))
    total = running_sum(rows, communicator, path)
    contributions = [
        Contribution(
            world_rank=world_rank,
            client_id=header.client_id,
            row_weight=row_weight(header),
            whole_weight=header.num_examples,
            starts=byte_starts(rows_held[summed], rows),
            held=rows_held[summed],
        )
        for (world_rank, header), rows_held in zip(gathered, held, strict=True)
    ]
    own = [c for c in contributions if c.world_rank == communicator.world_rank]
    for contribution, upload in zip(own, uploads, strict=True):
        draw = generator(seed, "codec", upload.client_id)
        own_widths = rows.widths[contribution.held]
        total.add(contribution, encode_rows(codec, upload.values, own_widths, draw))
    total.exchange(contributions)
    row_divisor, whole_divisor = 1.0, 1.0
    if average:
        row_divisor = sum(map(row_weight, headers))
        whole_divisor = sum(header.num_examples for header in headers)
    values = total.result(row_divisor, whole_divisor)
    if path == "dense":
        values = take_rows(values, union, widths)
    return MaskedSum(headers=headers, union=union, values=values)


class MaskedAveraging:
    """An exchange (merge/mean.py, Exchange) of clients that send rows of their own choice.

    Under a lossy codec uploads are summed decoded: the codec's rows are not the index's.
    """

    def __init__(
        self,
        communicator: Communicator,
        path: str,
        index: Index,
        sent_bits: Callable[[Header], Tensor],
        row_weight: Callable[[Upload], float | None],
    ) -> None:
        """sent_bits: header -> (live triplets,) bool, the triplets that the client has sent;
        row_weight: upload -> what they weigh."""
        self._communicator, self._path, self._index = communicator, path, index
        self._sent_bits, self._row_weight = sent_bits, row_weight
        self._uploads: list[Upload] = []
        self._sum: MaskedSum | None = None

    def add(self, upload: Upload) -> None:
        header = replace(upload.header, row_weight=self._row_weight(upload))
        self._uploads.append(Upload(header=header, values=upload.values))

    def exchange(self) -> None:
        """Called once: a sum over the union of the masks needs all headers first."""
        index = self._index
        assert self._sum is None
        self._sum = masked_sum(
            self._uploads,
            index.row_widths,
            self._communicator,
            self._path,
            held_rows=lambda header: index.per_row(self._sent_bits(header), whole=True),
            first_whole=len(index.row_widths) - index.num_whole,
            average=True,
        )

    def result(self) -> Received | None:
        if self._sum is None or not self._sum.headers:  # no chunk of clients, or an empty one
            return None
        mean = put_rows(self._sum.values, self._sum.union, self._index.row_widths)
        return Received(self._sum.headers, mean=mean)


def row_weight(header: Header) -> float:
    """What a client's rows weigh in a sum."""
    return header.num_examples if header.row_weight is None else header.row_weight


def _check_fit(headers: Sequence[Header], held: Sequence[Tensor], widths: Tensor) -> None:
    """Raise ValueError, on every process alike, unless each upload has the values of its rows."""
    for header, rows_held in zip(headers, held, strict=True):
        who = f"client {header.client_id}"
        if len(rows_held) != len(widths):
            raise ValueError(f"{who}: a rank_mask of {len(rows_held)} rows, not {len(widths)}")
        expected = int(widths[rows_held].sum())
        if header.num_values != expected:
            raise ValueError(f"{who}: {header.num_values} values, and a rank_mask for {expected}")
