"""Frozen weights that the processes of a host share.

Weights that transformers maps from a safetensors file as they lie there are shared already. Those
that it casts, transposes or reads from another format are memory of each process's own, until
`share_frozen` lets one copy of each host take their place.
"""

import gc
from bisect import bisect_right
from contextlib import suppress
from pathlib import Path

from torch import Tensor, nn

from bench.metering.memory import give_back_freed
from bench.run.host import once_per_host
from bench.sealed import ALIGNMENT, seal
from fedara_core.comm.base import Communicator

_LEAST_BYTES = 1 << 24  # a smaller model is not worth a file


def share_frozen(module: nn.Module, communicator: Communicator) -> None:
    """Let parameters that do not train share one copy of each host; every process calls it.

    Where a process writes to a page later, that page becomes its own. Nothing is done on GPUs, for
    models of less than _LEAST_BYTES, and where each process has a host of its own.
    """
    frozen = {
        name: parameter
        for name, parameter in module.named_parameters()
        if not parameter.requires_grad and parameter.device.type == "cpu"
    }
    num_bytes = sum(parameter.nbytes for parameter in frozen.values())
    alone = len(set(communicator.host_of)) == communicator.world_size
    # The same on every process, or they would not make the same calls.
    if alone or min(communicator.gather_json(num_bytes)) < _LEAST_BYTES:
        return

    def own_memory() -> bytes:
        files = _mapped_files()
        own = {n: p.detach().contiguous() for n, p in frozen.items() if not _lies_in(p, files)}
        return seal({}, own)

    _, shared = once_per_host(communicator, own_memory)
    for name, tensor in shared.items():
        if tensor.data_ptr() % ALIGNMENT == 0:  # else products with it could have other bits
            frozen[name].data = tensor
    gc.collect()
    give_back_freed()


def _mapped_files() -> list[tuple[int, int]]:
    """The address ranges, sorted, that are mapped from files; none where /proc does not tell."""
    ranges = []
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith("/"):
                start, end = (int(address, 16) for address in fields[0].split("-"))
                ranges.append((start, end))
    return ranges


def _lies_in(tensor: Tensor, ranges: list[tuple[int, int]]) -> bool:
    """Whether a tensor's memory starts in one of the sorted ranges."""
    place = bisect_right(ranges, (tensor.data_ptr(), 1 << 64)) - 1
    return place >= 0 and tensor.data_ptr() < ranges[place][1]
