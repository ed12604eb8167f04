"""Checks for every process of a job: every merge path on random masks."""

from dataclasses import replace

import pytest
import torch

from fedara_core.codec import CODECS, decode_rows, encode_rows
from fedara_core.comm.base import Communicator
from fedara_core.merge import sums
from fedara_core.merge.cost import PATHS, SAME_BITS
from fedara_core.merge.masked import masked_sum
from fedara_core.seeds import generator
from fedara_core.wire import Upload, make_upload

# Rows of the layout, chance that a client has a row, clients.
CASES = {
    "half": (40, 0.5, 7),
    "equal masks": (12, 1.0, 5),
    "nothing live": (9, 0.0, 4),
    "one client": (20, 0.3, 1),
    "no client": (20, 0.3, 0),
    "sparse": (300, 0.02, 10),
    "one row": (1, 1.0, 3),
    "no rows": (0, 1.0, 3),
    "many clients": (12, 1.0, 25),
}


def masked_upload(
    client_id: int, weight: int, rank_mask: torch.Tensor, values: torch.Tensor
) -> Upload:
    """An upload of the rows of this mask."""
    return make_upload(
        client_id=client_id, num_examples=weight, train_loss=0.0, values=values, bits=rank_mask
    )


def make_uploads(case: str) -> tuple[list[Upload], torch.Tensor]:
    """The same clients on every process; ragged capacities, a client and an adapter all dead."""
    num_rows, density, num_clients = CASES[case]
    drawn = torch.Generator().manual_seed(sum(case.encode()))
    widths = torch.randint(1, 90, (num_rows,), generator=drawn)
    parts = []
    for client_id in torch.randperm(3 * num_clients, generator=drawn)[:num_clients].tolist():
        rank_mask = torch.rand(num_rows, generator=drawn) < density
        if density < 1:
            rank_mask[num_rows // 2 : num_rows // 2 + 5] = False
            rank_mask[num_rows - client_id % 7 :] = False
            rank_mask &= client_id % 5 != 0
        count = int(widths[rank_mask].sum())
        scale = 10.0 ** torch.randint(-4, 5, (count,), generator=drawn)
        parts.append(
            masked_upload(
                client_id,
                int(torch.randint(0, 1 << 20, (), generator=drawn)),
                rank_mask,
                torch.randn(count, generator=drawn) * scale,
            )
        )
    return parts, widths


def with_values(upload: Upload, values: torch.Tensor) -> Upload:
    return masked_upload(upload.client_id, upload.num_examples, upload.bits, values)


def by_hand(parts: list[Upload], widths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The union and the sum over it, row by row."""
    union = torch.zeros(len(widths), dtype=torch.bool)
    rows = [torch.zeros(int(width), dtype=torch.float64) for width in widths]
    for part in sorted(parts, key=lambda part: part.client_id):
        union |= part.bits
        start = 0
        for index in part.bits.nonzero().flatten().tolist():
            stop = start + int(widths[index])
            rows[index] += part.values[start:stop].double() * part.num_examples
            start = stop
    live = [row for row, kept in zip(rows, union.tolist(), strict=True) if kept]
    return union, torch.cat([torch.zeros(0, dtype=torch.float64), *live]).float()


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether all numbers are the same to the last bit, the sign of a zero included."""
    return torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


def check_zeros(communicator: Communicator) -> None:
    """A sum starts from 0, so that it is no -0 where all values are, whoever has which rows."""
    for held in ([True] * 4, [True, False, True, True]):
        rank_mask = torch.tensor(held)
        part = masked_upload(5, 3, rank_mask, torch.full((sum(held),), -0.0))
        mine = [part] if communicator.world_rank == 0 else []
        for path in PATHS:
            found = masked_sum(mine, torch.ones(4, dtype=torch.int64), communicator, path)
            assert same_bits(found.values, torch.zeros(sum(held))), (path, found)


def check_own_sum(communicator: Communicator) -> None:
    """What float32 can not add to a large value is not lost for more than eight clients."""
    if communicator.world_rank != 0:
        parts = []
    else:
        parts = [
            masked_upload(
                client_id,
                1,
                torch.tensor([True]),
                torch.tensor([1.0 if client_id else 2.0**24]),
            )
            for client_id in range(33)
        ]
    for path in PATHS:
        found = masked_sum(parts, torch.tensor([1]), communicator, path).values.item()
        wanted = 2.0**24 + 32
        assert abs(found - wanted) <= (0 if path in SAME_BITS else 1e-6 * wanted), (path, found)


def check_order(communicator: Communicator) -> None:
    """2^60 + 1 - 2^60 in client_id order is 0 in float64, and 1 in the order 0, 2, 1."""
    values = {0: 2.0**60, 1: 1.0, 2: -(2.0**60)}
    parts = [
        masked_upload(client_id, 1, torch.tensor([True]), torch.tensor([value]))
        for client_id, value in values.items()
    ]
    mine = parts[::-1][communicator.world_rank :: communicator.world_size]
    for path in SAME_BITS:
        found = masked_sum(mine, torch.tensor([1]), communicator, path)
        assert found.values.tolist() == [0.0], path


def check_unlike_weights(communicator: Communicator) -> None:
    """Rows by their own weight, whole parameters by num_examples: a mean of both, by hand."""
    masks = [torch.tensor([True, False, True]), torch.tensor([True, True, True])]
    values = [torch.tensor([1.0, 7.0]), torch.tensor([3.0, 5.0, 9.0])]
    uploads = [masked_upload(i, (10, 30)[i], masks[i], values[i]) for i in (0, 1)]
    uploads = [
        replace(upload, header=replace(upload.header, row_weight=weight))
        for upload, weight in zip(uploads, (0.5, 1.5), strict=True)
    ]
    mine = uploads[communicator.world_rank :: communicator.world_size]
    widths = torch.ones(3, dtype=torch.int64)
    for path in PATHS:
        found = masked_sum(mine, widths, communicator, path, first_whole=2, average=True)
        # (0.5 x 1 + 1.5 x 3) / 2, (1.5 x 5) / 2, (10 x 7 + 30 x 9) / 40
        assert found.values.tolist() == [2.5, 3.75, 8.5], (path, found.values)


def check_misfit(communicator: Communicator) -> None:
    """One process's wrong part is refused on all of them, and nobody waits."""
    ones = torch.ones(1, dtype=torch.bool)
    part = masked_upload(3, 1, ones, torch.zeros(4))
    mine = [part] if communicator.world_rank == communicator.world_size - 1 else []
    with pytest.raises(ValueError, match="client 3: 4 values, and a rank_mask for 5"):
        masked_sum(mine, torch.tensor([5]), communicator, "split")


def check(case: str, communicator: Communicator) -> None:
    parts, widths = make_uploads(case)
    union, expected = by_hand(parts, widths)
    # In turn, so that with few clients some processes have none.
    mine = parts[communicator.world_rank :: communicator.world_size]
    largest = expected.abs().max() if len(expected) else torch.tensor(0.0)
    for path in PATHS:
        found = masked_sum(mine, widths, communicator, path)
        assert torch.equal(found.union, union), (case, path)
        assert found.values.dtype == torch.float32
        if path in SAME_BITS:
            assert same_bits(found.values, expected), (case, path)
        else:
            assert found.values.shape == expected.shape, (case, path)
            assert ((found.values - expected).abs() <= 1e-6 * largest).all(), (case, path)


def check_codecs(communicator: Communicator) -> None:
    """What is summed is what each client's rows are decoded to."""
    for case in ("half", "nothing live", "no client"):
        parts, widths = make_uploads(case)
        # fp16 ends at 65504.
        parts = [with_values(part, part.values.clamp(-100, 100)) for part in parts]
        mine = parts[communicator.world_rank :: communicator.world_size]
        for codec in CODECS:
            decoded = []
            for part in parts:
                own, draw = widths[part.bits], generator(7, "codec", part.client_id)
                rows = encode_rows(codec, part.values, own, draw)
                decoded.append(with_values(part, decode_rows(codec, rows, own)))
            union, expected = by_hand(decoded, widths)
            for path in SAME_BITS:
                found = masked_sum(mine, widths, communicator, path, codec=codec, seed=7)
                assert torch.equal(found.union, union), (case, codec, path)
                assert same_bits(found.values, expected), (case, codec, path)


def check_dead_rows_are_free(communicator: Communicator) -> None:
    """A row that nobody has takes neither memory nor time, however wide it is."""
    widths = torch.tensor([4, 1 << 45])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    part = masked_upload(2, 3, torch.tensor([True, False]), values)
    mine = [part] if communicator.world_rank == 0 else []
    for path in (*SAME_BITS, "allreduce"):  # dense sums the layout
        found = masked_sum(mine, widths, communicator, path)
        assert torch.equal(found.values, 3 * values), path


def check_all(communicator: Communicator) -> None:
    # The second time rows travel and are added in many blocks.
    for block_values in (sums.BLOCK_VALUES, 200):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sums, "BLOCK_VALUES", block_values)
            patch.setattr(sums, "_SUM_VALUES", min(sums._SUM_VALUES, block_values))
            for case in CASES:
                check(case, communicator)
    check_codecs(communicator)
    check_dead_rows_are_free(communicator)
    check_zeros(communicator)
    check_own_sum(communicator)
    check_order(communicator)
    check_unlike_weights(communicator)
    check_misfit(communicator)
    communicator.barrier()
