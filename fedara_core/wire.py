"""What travels: Upload <-> one uint8 vector. Byte counts everywhere come from here.

Layout of one message, little-endian: header (24 bytes), values (float32), bits (8 to a byte, lowest
first). Header: number of values (u64), client_id (u32), num_examples (u32), number of bits (u32),
train_loss (f32). Messages are concatenated without padding.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_HEADER = struct.Struct("<QIIIf")


def message_bytes(num_values: int, num_bits: int = 0) -> int:
    """Length in bytes of a packed message with so many float32 values and single bits."""
    return _HEADER.size + 4 * num_values + (num_bits + 7) // 8


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What one client sends after its local training.

    values: (num_values,) float32 on the CPU; bits: (num_bits,) bool on the CPU.
    """

    client_id: int
    num_examples: int
    train_loss: float
    values: Tensor
    bits: Tensor

    @property
    def num_bytes(self) -> int:
        """The payload a real client would send, header included."""
        return message_bytes(self.values.numel(), self.bits.numel())


def pack(uploads: Iterable[Upload]) -> Tensor:
    """Uploads as one (num_bytes,) uint8 vector; none gives an empty vector."""
    chunks = []
    for upload in uploads:
        header = _HEADER.pack(
            upload.values.numel(),
            upload.client_id,
            upload.num_examples,
            upload.bits.numel(),
            upload.train_loss,
        )
        chunks.append(np.frombuffer(header, np.uint8))
        chunks.append(upload.values.numpy().astype("<f4", copy=False).view(np.uint8))
        chunks.append(np.packbits(upload.bits.numpy(), bitorder="little"))
    return torch.from_numpy(np.concatenate(chunks) if chunks else np.zeros(0, np.uint8))


def unpack(buffer: Tensor) -> list[Upload]:
    """The uploads of a packed vector, in packed order; ValueError if it is cut short."""
    data = buffer.numpy()
    uploads = []
    start = 0
    while start < data.size:
        if data.size - start < _HEADER.size:
            raise ValueError(f"packed uploads end inside a header, at byte {data.size}")
        num_values, client_id, num_examples, num_bits, loss = _HEADER.unpack_from(data.data, start)
        end = start + message_bytes(num_values, num_bits)
        if end > data.size:
            raise ValueError(f"upload of client {client_id} needs {end} bytes of {data.size}")
        bits_start = start + message_bytes(num_values)
        values = data[start + _HEADER.size : bits_start].copy().view("<f4")
        bits = np.unpackbits(data[bits_start:end], count=num_bits, bitorder="little")
        uploads.append(
            Upload(
                client_id=client_id,
                num_examples=num_examples,
                train_loss=loss,
                values=torch.from_numpy(values),
                bits=torch.from_numpy(bits.astype(bool)),
            )
        )
        start = end
    return uploads
