"""Payload codecs: how the float32 values of a message become bytes, and back.

Values are coded in rows, each on its own, so that a run of rows is a run of bytes. Bytes of a row
of w values, and what its values are off by at most (one drawn rounding; the mean error is zero):

fp32   4 w          exact
bf16   2 w          2^-7 |value|
fp16   2 w          2^-10 |value| for |value| of at least 2^-14, 2^-24 below; at most 65504
int8   4 + w        max |row| / 127
int4   4 + ceil(w/2)  max |row| / 7

int8 and int4 hold the row's scale max |row| / L (float32) and then whole numbers from -L to L, L =
127 or 7; QSGD's uniform levels (arXiv 1610.02132) with the row's largest value as its norm.
Rounding is stochastic: up with the probability that leaves the mean where it was. A row with a
value that is no finite number is decoded as NaN throughout by int8 and int4, and as it is by the
others.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fedara_core.schema import CODECS as CODECS

ROW_VALUES = 128  # of a message's values, which have no rows of their own
_LEVELS = {"int8": 127, "int4": 7}
_SCALE_BYTES = 4
_LARGEST_FP16 = 65504.0


def row_bytes(codec: str, widths: Tensor) -> Tensor:
    """Bytes (R,) that rows of these widths (R,) int64 take."""
    if codec == "fp32":
        return 4 * widths
    if codec in ("bf16", "fp16"):
        return 2 * widths
    assert codec in _LEVELS, codec
    return _SCALE_BYTES + (widths if codec == "int8" else (widths + 1) // 2)


def payload_bytes(codec: str, num_values: int) -> int:
    """Bytes of a message's values, in rows of ROW_VALUES and one of what is left."""
    if codec == "fp32":
        return 4 * num_values
    full, rest = divmod(num_values, ROW_VALUES)
    of_full, of_rest = map(int, row_bytes(codec, torch.tensor([ROW_VALUES, rest])))
    return full * of_full + (of_rest if rest else 0)


def message_widths(num_values: int) -> Tensor:
    """The rows (R,) int64 in which a message's values are coded."""
    full, rest = divmod(num_values, ROW_VALUES)
    widths = torch.full((full + (rest > 0),), ROW_VALUES)
    if rest:
        widths[-1] = rest
    return widths


def encode_rows(codec: str, values: Tensor, widths: Tensor, draw: torch.Generator | None) -> Tensor:
    """Values (n,) float32 in rows of these widths (R,) as a uint8 vector.

    draw: where the rounding comes from; only fp32 goes without.
    """
    if codec == "fp32":
        return torch.from_numpy(np.ascontiguousarray(values.numpy()).view(np.uint8))
    assert draw is not None
    pieces = [torch.zeros(0, dtype=torch.uint8)]
    for rows in _equal_rows(values, widths, widths):
        pieces.append(_encode_matrix(codec, rows, torch.rand(rows.shape, generator=draw)).flatten())
    return torch.cat(pieces)


def decode_rows(codec: str, payload: Tensor, widths: Tensor) -> Tensor:
    """Inverse of `encode_rows`, up to its rounding: (n,) float32."""
    if codec == "fp32":
        return _as(payload, torch.float32)
    pieces = [torch.zeros(0)]
    for rows, width in zip(
        _equal_rows(payload, row_bytes(codec, widths), widths),
        torch.unique_consecutive(widths).tolist(),
        strict=True,
    ):
        pieces.append(_decode_matrix(codec, rows, width).flatten())
    return torch.cat(pieces)


def _equal_rows(vector: Tensor, lengths: Tensor, widths: Tensor) -> Iterator[Tensor]:
    """A vector's stretches of rows of one width, each as a matrix (rows, length of one)."""
    start = 0
    _, counts = torch.unique_consecutive(widths, return_counts=True)
    firsts = counts.cumsum(0) - counts
    for count, length in zip(counts.tolist(), lengths[firsts].tolist(), strict=True):
        yield vector[start : start + count * length].view(count, length)
        start += count * length


def _encode_matrix(codec: str, rows: Tensor, drawn: Tensor) -> Tensor:
    """Rows (R, w) float32 as bytes (R, b); drawn (R, w) from [0, 1)."""
    if codec == "bf16":
        # A float32 is a bfloat16 and 16 more bits: a random number below 2^16 carries or does not.
        raised = rows.contiguous().view(torch.int32) + (drawn * 65536).to(torch.int32)
        kept = torch.where(rows.isfinite(), raised, rows.contiguous().view(torch.int32))
        return (kept >> 16).to(torch.int16).view(torch.uint8)
    if codec == "fp16":
        return _round_to_half(rows, drawn).view(torch.uint8)
    levels = _LEVELS[codec]
    scale = rows.abs().amax(dim=1, keepdim=True) / levels  # (R, 1)
    finite = scale.isfinite()
    scale = torch.where(finite, scale, torch.nan)
    steps = torch.where(finite & (scale > 0), rows / scale, 0.0)
    whole = (steps + drawn).floor().clamp(-levels, levels).to(torch.int8)  # (R, w)
    if codec == "int4":
        whole = _two_to_a_byte(whole)
    return torch.cat([scale.view(torch.uint8), whole.view(torch.uint8)], dim=1)


def _decode_matrix(codec: str, rows: Tensor, width: int) -> Tensor:
    """Inverse of `_encode_matrix`: (R, width) float32."""
    if codec == "bf16":
        return _as(rows, torch.bfloat16).float()
    if codec == "fp16":
        return _as(rows, torch.float16).float()
    scale = _as(rows[:, :_SCALE_BYTES], torch.float32)  # (R, 1)
    whole = rows[:, _SCALE_BYTES:].view(torch.int8)
    if codec == "int4":
        whole = _from_two_to_a_byte(whole)[:, :width]
    return whole.float() * scale


def _as(payload: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers; copied where they do not lie as such numbers must."""
    if payload.dim() > 1 or payload.storage_offset() % dtype.itemsize or not payload.numel():
        payload = payload.new_empty(payload.shape).copy_(payload)
    return payload.view(dtype)


def _round_to_half(rows: Tensor, drawn: Tensor) -> Tensor:
    """One of the two float16 around each value; (R, w) float16. What is too large is cut off."""
    inside = torch.where(rows.isfinite(), rows.clamp(-_LARGEST_FP16, _LARGEST_FP16), rows)
    near = inside.half()
    # The other neighbour: in float16 the next number is the next bit pattern.
    away = (inside - near.float()).sign() * near.float().sign()
    bits = near.view(torch.int16)
    other = torch.where(
        near == 0, torch.copysign(torch.tensor(2.0**-24), inside).half(), _step(bits, away)
    )
    gap = (other.float() - near.float()).abs()
    chance = torch.where(gap > 0, (inside - near.float()).abs() / gap, 0.0)
    return torch.where(drawn < chance, other, near)


def _step(bits: Tensor, away: Tensor) -> Tensor:
    """The next float16 to the one of these bits: away from zero (1) or towards it (-1)."""
    return (bits + away.to(torch.int16)).view(torch.float16)


def _two_to_a_byte(whole: Tensor) -> Tensor:
    """(R, w) int8 from -7 to 7 as (R, ceil(w/2)): the first of two in the low half of the byte."""
    if whole.shape[1] % 2:
        whole = torch.cat([whole, whole.new_zeros(len(whole), 1)], dim=1)
    return (whole[:, ::2] & 15) | (whole[:, 1::2] << 4)


def _from_two_to_a_byte(packed: Tensor) -> Tensor:
    """Inverse of `_two_to_a_byte`: (R, 2 b) int8."""
    low = (packed << 4) >> 4  # the shift back brings the sign down
    return torch.stack([low, packed >> 4], dim=2).flatten(1)
