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
    chunks = []
    for upload in uploads:
        num_values = upload.values.numel()
        header = _HEADER.pack(
            _MARK,
            CODECS.index(upload.codec),
            num_values >> 32,
            num_values & 0xFFFFFFFF,
            upload.client_id,
            upload.num_examples,
            upload.bits.numel(),
            upload.train_loss,
        )
        chunks.append(np.frombuffer(header, np.uint8))
        if num_values:
            chunks.append(upload.coded.numpy())
        if upload.bits.numel():
            chunks.append(np.packbits(upload.bits.numpy(), bitorder="little"))
    return torch.from_numpy(np.concatenate(chunks) if chunks else np.zeros(0, np.uint8))


def unpack(buffer: Tensor, reference: Tensor | None = None) -> list[Upload]:
    """The uploads of a packed vector, in packed order.

    reference: what lossy codecs coded the difference from. Raises ValueError for a message that is
    cut short, or is none.
    """
    data = buffer.numpy()
    uploads = []
    start = 0
    while start < data.size:
        if data.size - start < _HEADER.size:
            raise ValueError(f"packed uploads end inside a header, at byte {data.size}")
        mark, codec_index, high, low, *rest = _HEADER.unpack_from(data.data, start)
        if mark != _MARK or codec_index >= len(CODECS):
            raise ValueError(f"no upload starts at byte {start}: {mark:#04x}, {codec_index:#04x}")
        (client_id, num_examples, num_bits, loss) = rest
        num_values, codec = (high << 32) + low, CODECS[codec_index]
        end = start + message_bytes(num_values, num_bits, codec)
        if end > data.size:
            raise ValueError(f"upload of client {client_id} needs {end} bytes of {data.size}")
        bits_start = start + message_bytes(num_values, codec=codec)
        coded, payload = data[start + _HEADER.size : bits_start].copy(), None
        if codec == "fp32":
            values = torch.from_numpy(coded.view(np.float32))
        else:
            payload = torch.from_numpy(coded)
            values = decode_rows(codec, payload, message_widths(num_values))
            if reference is not None:
                values = add_reference(values, reference)
        bits = np.unpackbits(data[bits_start:end], count=num_bits, bitorder="little")
        uploads.append(
            Upload(
                client_id=client_id,
                num_examples=num_examples,
                train_loss=loss,
                values=values,
                bits=torch.from_numpy(bits.view(bool)),
                codec=codec,
                payload=payload,
            )
        )
        start = end
    return uploads
