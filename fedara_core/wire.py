"""What travels: Upload <-> one uint8 vector. Byte counts everywhere come from here.

Layout of one message, little-endian: header (24 bytes), payload (the values as the codec has them),
bits (8 to a byte, lowest first). Header: 0xFA (u8), codec (u8, its place in CODECS), number of
values (u16 high part, u32 low part), client_id (u32), num_examples (u32), number of bits (u32),
train_loss (f32). Messages are concatenated without padding.
"""

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedara_core.codec import CODECS, decode_rows, encode_rows, message_widths, payload_bytes

_HEADER = struct.Struct("<BBHIIIIf")
_MARK = 0xFA


def message_bytes(num_values: int, num_bits: int = 0, codec: str = "fp32") -> int:
    """Length in bytes of a packed message with so many values and single bits."""
    return _HEADER.size + payload_bytes(codec, num_values) + (num_bits + 7) // 8


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What one client sends after its local training.

    values: (num_values,) float32 on the CPU, as the server has them; bits: (num_bits,) bool on the
    CPU. codec, payload: how the values travel, and the uint8 vector of it; None for fp32.
    """

    client_id: int
    num_examples: int
    train_loss: float
    values: Tensor
    bits: Tensor
    codec: str = "fp32"
    payload: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """What a real client would send, header included."""
        return message_bytes(self.values.numel(), self.bits.numel(), self.codec)

    @property
    def is_finite(self) -> bool:
        """Whether all values are numbers; a sum tells it fast, unless finite ones add up to inf."""
        return math.isfinite(self.values.sum().item()) or bool(self.values.isfinite().all())

    @property
    def coded(self) -> Tensor:
        """The values as they travel: uint8."""
        if self.payload is not None:
            return self.payload
        return encode_rows("fp32", self.values, torch.zeros(0), None)


def code(upload: Upload, codec: str, reference: Tensor, draw: torch.Generator) -> Upload:
    """The upload as a lossy codec brings it over: its values' difference from what server and
    client both have, reference (m,), of values that are at least as many; what lies beyond it is
    coded as it is."""
    widths = message_widths(upload.values.numel())
    payload = encode_rows(codec, add_reference(upload.values, -reference), widths, draw)
    values = add_reference(decode_rows(codec, payload, widths), reference)
    return replace(upload, values=values, codec=codec, payload=payload)


def add_reference(values: Tensor, reference: Tensor) -> Tensor:
    """values (n,) plus reference (m,), m <= n, at their start; a new tensor."""
    result = values.clone()
    result[: len(reference)] += reference
    return result


def pack(uploads: Iterable[Upload]) -> Tensor:
    """Uploads as one (num_bytes,) uint8 vector; none gives an empty vector."""
    chunks = [np.zeros(0, np.uint8)]
    for upload in uploads:
        chunks.append(np.frombuffer(_header(upload, upload.values.numel()), np.uint8))
        if upload.values.numel():
            chunks.append(upload.coded.numpy())
        if upload.bits.numel():
            chunks.append(_packed_bits(upload))
    return torch.from_numpy(np.concatenate(chunks))


def unpack(buffer: Tensor, reference: Tensor | None = None) -> list[Upload]:
    """The uploads of a packed vector, in packed order.

    reference: what lossy codecs coded the difference from. Raises ValueError for a message that is
    cut short, or is none.
    """
    data = buffer.numpy()
    uploads = []
    start = 0
    while start < data.size:
        head, num_values, num_bits = _read_header(data.data, start)
        bits_start = start + message_bytes(num_values, codec=head.codec)
        end = start + message_bytes(num_values, num_bits, head.codec)
        if end > data.size:
            raise ValueError(f"upload of client {head.client_id} needs {end} bytes of {data.size}")
        coded, payload = data[start + _HEADER.size : bits_start].copy(), None
        if head.codec == "fp32":
            values = torch.from_numpy(coded.view(np.float32))
        else:
            payload = torch.from_numpy(coded)
            values = decode_rows(head.codec, payload, message_widths(num_values))
            if reference is not None:
                values = add_reference(values, reference)
        bits = _unpacked_bits(data[bits_start:end], num_bits)
        uploads.append(replace(head, values=values, bits=bits, payload=payload))
        start = end
    return uploads


def pack_heads(heads: Iterable[tuple[Upload, int]]) -> bytes:
    """Uploads whose values travel by themselves: of each the header, with the number of its values,
    and its bits."""
    chunks = []
    for upload, num_values in heads:
        chunks.append(_header(upload, num_values))
        if upload.bits.numel():
            chunks.append(_packed_bits(upload).tobytes())
    return b"".join(chunks)


def unpack_heads(data: bytes) -> list[tuple[Upload, int]]:
    """Inverse of `pack_heads`: uploads without values, and how many values each has."""
    heads = []
    start = 0
    while start < len(data):
        head, num_values, num_bits = _read_header(memoryview(data), start)
        bits_start, end = start + message_bytes(0), start + message_bytes(0, num_bits)
        if end > len(data):
            raise ValueError(f"head of client {head.client_id} needs {end} bytes of {len(data)}")
        if num_bits:
            packed = np.frombuffer(data[bits_start:end], np.uint8)
            head = replace(head, bits=_unpacked_bits(packed, num_bits))
        heads.append((head, num_values))
        start = end
    return heads


def _header(upload: Upload, num_values: int) -> bytes:
    return _HEADER.pack(
        _MARK,
        CODECS.index(upload.codec),
        num_values >> 32,
        num_values & 0xFFFFFFFF,
        upload.client_id,
        upload.num_examples,
        upload.bits.numel(),
        upload.train_loss,
    )


def _read_header(data: memoryview, start: int) -> tuple[Upload, int, int]:
    """The upload that starts there, without values and bits, and how many it has of them."""
    if len(data) - start < _HEADER.size:
        raise ValueError(f"packed uploads end inside a header, at byte {len(data)}")
    mark, codec_index, high, low, client_id, num_examples, num_bits, loss = _HEADER.unpack_from(
        data, start
    )
    if mark != _MARK or codec_index >= len(CODECS):
        raise ValueError(f"no upload starts at byte {start}: {mark:#04x}, {codec_index:#04x}")
    head = Upload(
        client_id=client_id,
        num_examples=num_examples,
        train_loss=loss,
        values=_NO_VALUES,
        bits=_NO_BITS,
        codec=CODECS[codec_index],
    )
    return head, (high << 32) + low, num_bits


def _packed_bits(upload: Upload) -> np.ndarray:
    return np.packbits(upload.bits.numpy(), bitorder="little")


def _unpacked_bits(packed: np.ndarray, num_bits: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(packed, count=num_bits, bitorder="little").view(bool))


_NO_VALUES = torch.zeros(0)
_NO_BITS = torch.zeros(0, dtype=torch.bool)
