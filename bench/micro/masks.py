"""The clients of `fedara micro collectives`: rows, masks and values from seeds, and their sum.

Every process can make every client, and so knows the result of a call without the call.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedara_core.merge.cost import SAME_BITS
from fedara_core.merge.masked import MaskedSum
from fedara_core.seeds import generator
from fedara_core.wire import Upload, make_upload

VALUE_BYTES = 4  # float32
_ROW_VALUES = 769  # of a triplet of a 384 x 384 layer
_MIN_LIVE_ROWS = 16  # that a mask can choose from in a small payload


# The largest error of a sum relative to the largest sum that a timed call may have, by codec. fp32
# is held to every bit where the path keeps the bits. The others round each client's values: by two
# of their steps here, since a sum's largest value is smaller than the sum of the largest ones.
ERRORS = {"fp32": 1e-6, "bf16": 2 / 128, "fp16": 2 / 1024, "int8": 2 / 127, "int4": 2 / 7}


class WrongResult(RuntimeError):
    """A timed call did not give the sum, or the bytes, that it had to."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Rows of equal width, of which each client holds live_rows: shared_rows are everybody's, the
    others go round among the clients, so that masks overlap no more than they must."""

    num_clients: int
    num_rows: int
    live_rows: int
    shared_rows: int
    width: int  # values
    seed: int

    @property
    def union_rows(self) -> int:
        free = self.num_rows - self.shared_rows
        return self.shared_rows + min(free, self.num_clients * (self.live_rows - self.shared_rows))

    @property
    def widths(self) -> Tensor:
        """(R,) int64."""
        return torch.full((self.num_rows,), self.width)

    def rank_mask(self, client_id: int) -> Tensor:
        """(R,) bool."""
        drawn = torch.randperm(self.num_rows, generator=generator(self.seed, "micro_rows"))
        shared, free = drawn[: self.shared_rows], drawn[self.shared_rows :]
        own = torch.arange(self.live_rows - self.shared_rows)
        rank_mask = torch.zeros(self.num_rows, dtype=torch.bool)
        rank_mask[shared] = True
        if len(own):
            rank_mask[free[(client_id * len(own) + own) % len(free)]] = True
        return rank_mask

    def upload(self, client_id: int) -> Upload:
        """The client's upload: the same on every process."""
        values = generator(self.seed, "micro_values", client_id)
        return make_upload(
            client_id=client_id,
            num_examples=1 + client_id % 8,
            train_loss=0.0,
            values=torch.randn(self.live_rows * self.width, generator=values),
            bits=self.rank_mask(client_id),
        )

    def expected(self) -> MaskedSum:
        """The weighted sum of all clients, in client_id order in float64: by one process alone."""
        union = torch.zeros(self.num_rows, dtype=torch.bool)
        for client_id in range(self.num_clients):
            union |= self.rank_mask(client_id)
        place = union.cumsum(0) - 1
        total = torch.zeros(self.union_rows, self.width, dtype=torch.float64)
        for client_id in range(self.num_clients):
            upload = self.upload(client_id)
            rows = upload.values.double().view(-1, self.width)
            total[place[upload.bits]] += rows * upload.num_examples
        return MaskedSum(headers=(), union=union, values=total.float().flatten())


def make_layout(
    *, payload_bytes: float, density: float, overlap: float, num_clients: int, seed: int
) -> Layout:
    """The layout whose clients hold about payload_bytes each."""
    values = max(_MIN_LIVE_ROWS, round(payload_bytes / VALUE_BYTES))
    live_rows = max(_MIN_LIVE_ROWS, round(values / _ROW_VALUES))
    return Layout(
        num_clients=num_clients,
        num_rows=max(live_rows, round(live_rows / density)),
        live_rows=live_rows,
        shared_rows=round(overlap * live_rows),
        width=round(values / live_rows),
        seed=seed,
    )


def check_sum(found: MaskedSum, *, expected: MaskedSum, path: str, codec: str) -> None:
    """Raise WrongResult unless the sum is as expected, bit by bit where the path keeps the bits."""
    if not torch.equal(found.union, expected.union):
        raise WrongResult(f"{path}, {codec}: the union of the masks is not the expected one")
    if found.values.shape != expected.values.shape:
        shapes = f"{tuple(found.values.shape)}, not {tuple(expected.values.shape)}"
        raise WrongResult(f"{path}, {codec}: values of shape {shapes}")
    if codec == "fp32" and path in SAME_BITS:
        if not torch.equal(found.values, expected.values):
            raise WrongResult(f"{path}, {codec}: a sum is not the expected one bit by bit")
        return
    error = float((found.values - expected.values).abs().max())
    allowed = ERRORS[codec] * float(expected.values.abs().max())
    if not error <= allowed:  # NaN fails too
        raise WrongResult(f"{path}, {codec}: a sum is off by {error:.3g}; allowed: {allowed:.3g}")


def check_buffers(found: Sequence[Tensor], *, expected: Sequence[Tensor]) -> None:
    """Raise WrongResult unless every process's bytes came back as they are."""
    same = (torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    for world_rank, right in enumerate(same):
        if not right:
            raise WrongResult(f"allgather: the bytes of world_rank {world_rank} are not its own")
