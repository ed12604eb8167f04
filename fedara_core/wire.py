"""What travels: uploads as one uint8 vector, and back. Byte counts everywhere come from here.

One message, little-endian: header (24 bytes), bits (8 to a byte, lowest first), values (as the
codec has them). Header: 0xFB (u8), flags and codec (u8), number of values (u16 high part, u32 low
part), client_id (u32), num_examples (u32), number of bits (u32), train_loss (f32). The lower half
of the second byte is the codec's place in CODECS; its highest bit is set where a value is not
finite, the next one where a row_weight (f32) follows, as between the processes of a sum. Messages
are concatenated without padding; where values travel apart, as in a sum, a message ends after its
bits.
"""

import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedara_core.codec import CODECS, decode_rows, encode_rows, message_widths, payload_bytes

_HEADER = struct.Struct("<BBHIIIIf")
_WEIGHT = struct.Struct("<f")
_MARK = 0xFB
_NOT_FINITE, _HAS_WEIGHT, _CODEC = 0x80, 0x40, 0x0F
_NO_BITS = torch.zeros(0, dtype=torch.bool)


def message_bytes(num_values: int, num_bits: int = 0, codec: str = "fp32") -> int:
    """Length in bytes of a packed message with so many values and single bits."""
    return _HEADER.size + payload_bytes(codec, num_values) + (num_bits + 7) // 8


@dataclass(frozen=True, kw_only=True)
class Header:
    """All of an upload but its values.

    bits: (num_bits,) bool on the CPU. codec: how the values travel. finite: whether all values are
    numbers. row_weight: what its rows weigh in a sum where that is not num_examples; it comes from
    the server, so that it is not counted as sent.
    """

    client_id: int
    num_examples: int
    train_loss: float
    num_values: int
    bits: Tensor = _NO_BITS
    codec: str = "fp32"
    finite: bool = True
    row_weight: float | None = None

    @property
    def num_bytes(self) -> int:
        """What a real client would send, header included."""
        return message_bytes(self.num_values, self.bits.numel(), self.codec)


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What one client sends after its local training.

    values: (num_values,) float32 on the CPU, as the server has them. payload: a lossy codec's uint8
    vector of them; None for fp32.
    """

    header: Header
    values: Tensor
    payload: Tensor | None = None

    @property
    def client_id(self) -> int:
        return self.header.client_id

    @property
    def num_examples(self) -> int:
        return self.header.num_examples

    @property
    def bits(self) -> Tensor:
        return self.header.bits

    @property
    def coded(self) -> Tensor:
        """The values as they travel: uint8."""
        if self.payload is not None:
            return self.payload
        return encode_rows("fp32", self.values, torch.zeros(0), None)


def make_upload(
    *,
    client_id: int,
    num_examples: int,
    train_loss: float,
    values: Tensor,
    bits: Tensor = _NO_BITS,
) -> Upload:
    """An upload of these values (n,) float32 and bits (m,) bool."""
    header = Header(
        client_id=client_id,
        num_examples=num_examples,
        train_loss=train_loss,
        num_values=values.numel(),
        bits=bits,
        finite=is_finite(values),
    )
    return Upload(header=header, values=values)


def is_finite(values: Tensor) -> bool:
    """Whether all values are numbers; a sum tells it fast, unless finite ones add up to inf."""
    return math.isfinite(values.sum().item()) or bool(values.isfinite().all())


def pack(uploads: Iterable[Upload]) -> Tensor:
    """Uploads as one (num_bytes,) uint8 vector, as clients send them; none gives an empty one."""
    chunks = [np.zeros(0, np.uint8)]
    for upload in uploads:
        header = pack_header(replace(upload.header, row_weight=None))
        chunks.append(np.frombuffer(header, np.uint8))
        chunks.append(upload.coded.numpy())
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
        header, start = _read_header(data, start)
        end = start + payload_bytes(header.codec, header.num_values)
        if end > data.size:
            raise ValueError(
                f"upload of client {header.client_id} needs {end} bytes of {data.size}"
            )
        uploads.append(_decoded(header, data[start:end].copy(), reference))
        start = end
    return uploads


def pack_header(header: Header) -> bytes:
    """A message without its values, which travel apart."""
    flags = CODECS.index(header.codec)
    flags |= 0 if header.finite else _NOT_FINITE
    flags |= 0 if header.row_weight is None else _HAS_WEIGHT
    packed = _HEADER.pack(
        _MARK,
        flags,
        header.num_values >> 32,
        header.num_values & 0xFFFFFFFF,
        header.client_id,
        header.num_examples,
        header.bits.numel(),
        header.train_loss,
    )
    if header.row_weight is not None:
        packed += _WEIGHT.pack(header.row_weight)
    if header.bits.numel():
        packed += np.packbits(header.bits.numpy(), bitorder="little").tobytes()
    return packed


def unpack_headers(data: bytes) -> Iterator[Header]:
    """The headers of messages without values. Raises ValueError as `unpack` does."""
    start = 0
    while start < len(data):
        header, start = _read_header(np.frombuffer(data, np.uint8), start)
        yield header


def add_reference(values: Tensor, reference: Tensor) -> Tensor:
    """values (n,) plus reference (m,), m <= n, at their start; a new tensor."""
    result = values.clone()
    result[: len(reference)] += reference
    return result


def _decoded(header: Header, coded: np.ndarray, reference: Tensor | None) -> Upload:
    if header.codec == "fp32":
        return Upload(header=header, values=torch.from_numpy(coded.view(np.float32)))
    payload = torch.from_numpy(coded)
    values = decode_rows(header.codec, payload, message_widths(header.num_values))
    if reference is not None:
        values = add_reference(values, reference)
    return Upload(header=header, values=values, payload=payload)


def _read_header(data: np.ndarray, start: int) -> tuple[Header, int]:
    """The header that starts there, with its bits, and where it ends."""
    end = start + _HEADER.size
    if end > data.size:
        raise ValueError(f"packed uploads end inside a header, at byte {data.size}")
    fields = _HEADER.unpack_from(data.data, start)
    mark, flags, high, low, client_id, num_examples, num_bits, loss = fields
    if mark != _MARK or flags & _CODEC >= len(CODECS):
        raise ValueError(f"no upload starts at byte {start}: {mark:#04x}, {flags:#04x}")
    header = Header(
        client_id=client_id,
        num_examples=num_examples,
        train_loss=loss,
        num_values=(high << 32) + low,
        codec=CODECS[flags & _CODEC],
        finite=not flags & _NOT_FINITE,
    )
    bits_start = end + (_WEIGHT.size if flags & _HAS_WEIGHT else 0)
    stop = bits_start + (num_bits + 7) // 8
    if stop > data.size:
        raise ValueError(f"header of client {client_id} needs {stop} bytes of {data.size}")
    if flags & _HAS_WEIGHT:
        header = replace(header, row_weight=_WEIGHT.unpack_from(data.data, end)[0])
    if num_bits:
        bits = np.unpackbits(data[bits_start:stop], count=num_bits, bitorder="little")
        header = replace(header, bits=torch.from_numpy(bits.view(bool)))
    return header, stop
