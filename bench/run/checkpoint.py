"""Checkpoints: the server state after a round and what clients keep, as one safetensors file.

The file's metadata says what it belongs to and holds a checksum over everything in it, so that a
file that was cut off, damaged, copied from elsewhere or written by another version is never taken
for the right one. The file before it stays beside it.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from bench.run.identity import differences
from bench.run.job import ClientState
from bench.sealed import Damaged, inspect, seal
from fedara_core.errors import InputError
from fedara_core.state import ServerState, index_from_lists, pieces_as_lists

FILE = "checkpoint.safetensors"
PREVIOUS = "checkpoint.previous.safetensors"
FORMAT = "2"  # other ones are refused
_CLIENT = "client-"

Identity = Mapping[str, Any]  # what a checkpoint belongs to: JSON values by key


@dataclass(frozen=True, kw_only=True)
class Found:
    """The newest whole checkpoint of a run, and the round that it is of. notice: what is wrong with
    the one that is newer."""

    data: bytes
    round_index: int
    notice: str = ""


def save_checkpoint(
    run_dir: Path, state: ServerState, client_state: ClientState, identity: Identity
) -> None:
    """Replace the run's checkpoint, which stays as the previous one. At any moment at least one of
    them is whole on disk. Raises OSError, and leaves them as they are then."""
    newest = run_dir / FILE

    def keep_previous() -> None:
        if newest.exists():
            newest.replace(run_dir / PREVIOUS)

    write_atomically(newest, dump(state, client_state, identity), keep_previous)


def dump(state: ServerState, client_state: ClientState, identity: Identity) -> bytes:
    """A state, and what clients keep between rounds, as the bytes of a safetensors file."""
    tensors = {name: tensor.contiguous() for name, tensor in state.tensors().items()} | _named(
        client_state
    )
    facts = {
        "format": FORMAT,
        "round_index": str(state.round_index),
        "identity": json.dumps(identity, sort_keys=True),
        "index": json.dumps(pieces_as_lists(state.index)),
    }
    return seal(facts, tensors)


def find_checkpoint(run_dir: Path) -> Found | None:
    """The newest whole checkpoint of the run; None if it has none.

    InputError if all are damaged, or one is of another format.
    """
    reasons = {}
    for name in (FILE, PREVIOUS):
        try:
            data = (run_dir / name).read_bytes()
            facts, _ = _load(data)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise InputError(
                f"{run_dir / name}: {error.strerror}; allowed: a file that can be read, or none "
                "(delete it to start over)"
            ) from None
        except Damaged as error:
            reasons[name] = str(error)
            continue
        notice = "; ".join(f"{name} is damaged ({reason})" for name, reason in reasons.items())
        return Found(data=data, round_index=int(facts["round_index"]), notice=notice)
    if not reasons:
        return None
    said = "; ".join(f"{name} is damaged ({reason})" for name, reason in reasons.items())
    raise InputError(f"{run_dir}: {said}; allowed: a whole one, or none (delete it to start over)")


def restore(state: ServerState, data: bytes, identity: Identity) -> tuple[ServerState, ClientState]:
    """`state` with the tensors and round of a checkpoint's bytes, and what its clients keep.

    InputError, with the keys that differ, if it belongs to something else than `identity`.
    """
    try:
        facts, tensors = _load(data)
    except Damaged as error:
        raise InputError(f"{FILE} is damaged ({error}); allowed: a whole one") from None
    differing = differences(json.loads(facts["identity"]), identity)
    if differing:
        raise InputError(
            f"{FILE} belongs to another run: {'; '.join(differing)}; allowed: the checkpoint of "
            "this run, or none (delete it to start over)"
        )
    client_state = _unnamed({name: t for name, t in tensors.items() if name.startswith(_CLIENT)})
    server = {name: t for name, t in tensors.items() if not name.startswith(_CLIENT)}
    index = index_from_lists(json.loads(facts["index"]))
    return state.with_tensors(server, index, int(facts["round_index"])), client_state


def dump_client_state(client_state: ClientState) -> bytes:
    """What clients keep, for another process."""
    return save(_named(client_state))


def load_client_state(data: bytes) -> ClientState:
    """Inverse of `dump_client_state`."""
    return _unnamed(load(data))


def _load(data: bytes) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors. Raises Damaged, and InputError for a whole file of another format."""
    facts, tensors, whole = inspect(data)
    found = facts.get("format")
    if (whole and found != FORMAT) or (whole is None and found is None):
        raise InputError(
            f"{FILE} has format {found}; allowed: {FORMAT} (delete it to start over, or resume "
            "with the version that wrote it)"
        )
    if not whole:
        raise Damaged("its checksum is not that of its contents")
    return facts, tensors


def _named(client_state: ClientState) -> dict[str, Tensor]:
    return {
        f"{_CLIENT}{client_id}/{name}": tensor.contiguous()
        for client_id, tensors in sorted(client_state.items())
        for name, tensor in tensors.items()
    }


def _unnamed(tensors: dict[str, Tensor]) -> ClientState:
    client_state: ClientState = {}
    for key, tensor in tensors.items():
        client, _, name = key.partition("/")
        client_state.setdefault(int(client.removeprefix(_CLIENT)), {})[name] = tensor
    return client_state


def write_atomically(path: Path, data: bytes, before: Callable[[], None] | None = None) -> None:
    """Write beside `path`, flush to disk, call `before`, then rename over it.

    Where that fails, with OSError, `path` is as it was and nothing is left beside it.
    """
    beside = path.with_name(path.name + ".part")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    if before is not None:
        before()
    beside.replace(path)
