"""The clients of `fedara micro collectives`: masks, sizes and weights, from seeds or from a run.

Every process can make every client's upload, and so knows the result of a call without the call:
values are random ones from seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.metering.meter import Meter
from bench.run.clients import draw_cohort, train_client
from bench.run.job import prepare
from bench.tools.export import load_trained
from fedara_core.comm.base import Communicator
from fedara_core.comm.launch import together
from fedara_core.errors import InputError
from fedara_core.merge.cost import SAME_BITS
from fedara_core.merge.masked import MaskedSum, row_weight
from fedara_core.merge.mean import gather_headers
from fedara_core.seeds import generator
from fedara_core.wire import Header, Upload

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
    """The clients of one sum.

    axes: keys of the record that tell which sum it is. widths (R,) int64: values in each row.
    headers: of all clients, in client_id order. held_rows, first_whole, average: as `masked_sum`
    takes them.
    """

    axes: Mapping[str, Any]
    widths: Tensor
    headers: Sequence[Header]
    seed: int
    first_whole: int
    held_rows: Callable[[Header], Tensor] = lambda header: header.bits
    average: bool = False

    @cached_property
    def held(self) -> Tensor:
        """Which rows each client holds: (num_clients, R) bool."""
        return torch.stack([self.held_rows(header) for header in self.headers])

    @cached_property
    def union_values(self) -> int:
        return int(self.widths[self.held.any(dim=0)].sum())

    @property
    def part_values(self) -> int:
        """Of a client, the mean."""
        return round(sum(header.num_values for header in self.headers) / len(self.headers))

    def upload(self, header: Header) -> Upload:
        """The client's upload: the same on every process."""
        drawn = generator(self.seed, "micro_values", header.client_id)
        return Upload(header=header, values=torch.randn(header.num_values, generator=drawn))

    def expected(self) -> MaskedSum:
        """The weighted sum of all clients, in client_id order in float64: by one process alone."""
        union, is_row = self.held.any(dim=0), torch.arange(len(self.widths)) < self.first_whole
        total = torch.zeros(self.union_values, dtype=torch.float64)
        for header, held in zip(self.headers, self.held, strict=True):
            weighted = self.upload(header).values.double()
            num_row_values = int(self.widths[held & is_row].sum())
            weighted[:num_row_values] *= row_weight(header)
            weighted[num_row_values:] *= header.num_examples
            total[held[union].repeat_interleave(self.widths[union])] += weighted
        if self.average:
            num_row_values = int(self.widths[union & is_row].sum())
            total[:num_row_values] /= sum(map(row_weight, self.headers))
            total[num_row_values:] /= sum(header.num_examples for header in self.headers)
        return MaskedSum(headers=(), union=union, values=total.float())


def make_layout(
    *, payload_bytes: float, density: float, overlap: float, num_clients: int, seed: int
) -> Layout:
    """Clients that hold about payload_bytes each, in rows of equal width.

    overlap of their rows are everybody's. The others go round among the clients, so that masks
    overlap no more than they must.
    """
    values = max(_MIN_LIVE_ROWS, round(payload_bytes / VALUE_BYTES))
    live_rows = max(_MIN_LIVE_ROWS, round(values / _ROW_VALUES))
    num_rows = max(live_rows, round(live_rows / density))
    width, num_shared = round(values / live_rows), round(overlap * live_rows)
    drawn = torch.randperm(num_rows, generator=generator(seed, "micro_rows"))
    shared, free = drawn[:num_shared], drawn[num_shared:]
    own = torch.arange(live_rows - num_shared)
    headers = []
    for client_id in range(num_clients):
        bits = torch.zeros(num_rows, dtype=torch.bool)
        bits[shared] = True
        if len(own):
            bits[free[(client_id * len(own) + own) % len(free)]] = True
        header = Header(
            client_id=client_id,
            num_examples=1 + client_id % 8,
            train_loss=0.0,
            num_values=live_rows * width,
            bits=bits,
        )
        headers.append(header)
    # weighted_sum is the first name of masked_sum.
    axes = {"call": "weighted_sum", "payload_bytes": payload_bytes, "num_clients": num_clients}
    return Layout(
        axes={**axes, "density": density, "overlap": overlap},
        widths=torch.full((num_rows,), width),
        headers=headers,
        seed=seed,
        first_whole=num_rows,
    )


def run_layout(run_dir: Path, communicator: Communicator, seed: int) -> Layout:
    """The clients of the round that follows a run's last checkpoint; every process calls it.

    The processes share the clients out, train each as the run would, and keep its upload's header:
    masks, sizes and weights are those of real uploads. Raises InputError on every process.
    """
    trained = together(communicator, lambda: load_trained(run_dir))
    config, method = trained.config, trained.config.method.name
    job = prepare(config, communicator)
    if job.method.combine != "masked":
        raise InputError(
            f"--runs {run_dir}: clients of {method} send no rows of their own choice that are "
            "summed; allowed: runs of methods whose clients do"
        )
    state, _ = job.compression.send_down(trained.state)
    own: list[Header] = []

    def keep_header(upload: Upload) -> None:
        own.append(replace(upload.header, row_weight=job.method.row_weight(state, upload)))

    cohort = draw_cohort(job, state.round_index)
    for client_id in cohort[communicator.world_rank :: communicator.world_size]:
        train_client(job, state, client_id, Meter(job.device), keep_header)
    index, sent_bits = state.index, job.method.sent_bits
    layout = Layout(
        axes={},
        widths=index.row_widths,
        headers=[header for _, header in gather_headers(own, communicator)],
        seed=seed,
        first_whole=len(index.row_widths) - index.num_whole,
        held_rows=lambda header: index.per_row(sent_bits(state, header), whole=True),
        average=True,
    )
    axes = {
        "call": "masked_sum",
        "method": method,
        "model": config.model.name,
        "payload_bytes": layout.part_values * VALUE_BYTES,
        "num_clients": len(cohort),
        "density": layout.part_values / layout.union_values,
    }
    return replace(layout, axes=axes)


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
    for world_rank, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        if not torch.equal(mine, theirs):
            raise WrongResult(f"allgather: the bytes of world_rank {world_rank} are not its own")
