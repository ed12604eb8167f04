"""What the first process of each host makes and the others of that host map: one copy in memory."""

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from bench.sealed import unseal
from fedara_core.comm.base import Communicator
from fedara_core.comm.launch import together

Contents = tuple[dict[str, str], dict[str, Tensor]]  # metadata and tensors of a sealed file


def once_per_host(communicator: Communicator, make: Callable[[], bytes]) -> Contents:
    """The contents of the sealed file whose bytes `make` gives; every process calls it.

    A host's processes map one file in its temporary folder, which has no name any more once all
    have it: nobody can change or remove it. Pages that a process writes to become its own. Where
    there is no room for the file, each process makes its own. What `make` raises as InputError on
    one process is raised on all.
    """
    leads = communicator.host_rank == 0

    def lead() -> bytes:
        try:
            return make() if leads else b""
        finally:
            communicator.idle_barrier()  # what is made has the cores to itself

    data = together(communicator, lead)
    path = _written(data) if leads and communicator.host_size > 1 else ""
    try:
        paths = communicator.gather_json(path)
        place = paths[communicator.host_of[communicator.world_rank]]
        return together(communicator, lambda: _mapped(place) or unseal(data or make()))
    finally:
        if path:
            Path(path).unlink(missing_ok=True)


def _written(data: bytes) -> str:
    """The path of a temporary file with these bytes; empty where there is no room for it."""
    path = ""
    try:
        descriptor, path = tempfile.mkstemp(prefix="fedara-", suffix=".safetensors")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    except OSError:
        if path:
            Path(path).unlink(missing_ok=True)
        return ""
    return path


def _mapped(path: str) -> Contents | None:
    """The file's contents, whose tensors share its pages; None where it can not be opened."""
    with suppress(OSError, SafetensorError):
        if path:
            with safe_open(path, "pt") as file:
                return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return None
