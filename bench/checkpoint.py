"""Checkpoints: the server state after a round, as one safetensors file, written atomically."""

import json
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save

from fedara_core.errors import InputError
from fedara_core.method import ServerState

FILE = "checkpoint.safetensors"
_ROUND = "round_index"


def save_checkpoint(run_dir: Path, state: ServerState) -> None:
    """Replace the run's checkpoint; the old one stays until the new one is whole on disk."""
    tensors = {name: tensor.contiguous() for name, tensor in state.tensors().items()}
    write_atomically(run_dir / FILE, save(tensors, metadata={_ROUND: str(state.round_index)}))


def read_checkpoint(run_dir: Path) -> bytes:
    """The bytes of the run's checkpoint; none if there is none."""
    path = run_dir / FILE
    return path.read_bytes() if path.exists() else b""


def restore(state: ServerState, data: bytes) -> ServerState:
    """`state` with the tensors and round of a checkpoint's bytes. InputError if it is damaged."""
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise InputError(
            f"{FILE} is damaged ({error}); allowed: a whole one, or none (delete it to start over)"
        ) from None
    return state.with_tensors(tensors, _round_index(data))


def _round_index(data: bytes) -> int:
    """The round in the file's metadata (safetensors: u64 header length, then JSON)."""
    length = int.from_bytes(data[:8], "little")
    return int(json.loads(data[8 : 8 + length])["__metadata__"][_ROUND])


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside `path`, flush to disk, then rename over it."""
    beside = path.with_name(path.name + ".part")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
