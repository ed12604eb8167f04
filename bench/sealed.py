"""Safetensors files whose metadata hold a checksum over everything in them, so that a file that was
cut off or damaged is never taken for a whole one."""

import hashlib
import json
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

_CHECKSUM = "sha256"
ALIGNMENT = 64  # bytes, as of torch's own memory


class Damaged(Exception):
    """Bytes that are no whole file; the text says why."""


def seal(facts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a file with these metadata and contiguous tensors. Their values start at a
    multiple of ALIGNMENT: the last bits of some products depend on where an operand lies."""
    data = save(dict(tensors), metadata={**facts, _CHECKSUM: _checksum(facts, tensors)})
    length = int.from_bytes(data[:8], "little")  # of the header, which may end in spaces
    fill = -(8 + length) % ALIGNMENT
    start = (length + fill).to_bytes(8, "little") + data[8 : 8 + length]
    return b"".join([start, b" " * fill, memoryview(data)[8 + length :]])


def unseal(data: bytes) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Inverse of `seal`. Raises Damaged."""
    facts, tensors, whole = inspect(data)
    if not whole:
        raise Damaged("its checksum is not that of its contents")
    return facts, tensors


def inspect(data: bytes) -> tuple[dict[str, str], dict[str, Tensor], bool | None]:
    """Metadata, tensors, and whether the checksum is theirs; None where there is none. Raises
    Damaged for bytes that are no safetensors file."""
    try:
        tensors = load(data)
        facts = metadata(data)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise Damaged(str(error)) from None
    checksum = facts.pop(_CHECKSUM, None)
    return facts, tensors, None if checksum is None else checksum == _checksum(facts, tensors)


def metadata(start: bytes) -> dict[str, str]:
    """The metadata of a file that starts so (safetensors: u64 header length, then JSON). Raises
    ValueError."""
    length = int.from_bytes(start[:8], "little")
    found: dict[str, str] = json.loads(start[8 : 8 + length]).get("__metadata__", {})
    return found


def _checksum(facts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over metadata, names, types, shapes and values, in hex."""
    sha = hashlib.sha256(json.dumps(sorted(facts.items())).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        sha.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
