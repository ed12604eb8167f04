"""Phases of a round: named windows with a device sync on both ends, and peak memory."""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

PHASES = (
    "download",
    "local_train",
    "pack",
    "wait",
    "exchange",
    "aggregate",
    "evaluate",
    "checkpoint",
)


class Meter:
    """Seconds by phase since the last `take`. A phase may be entered many times; none nest."""

    def __init__(
        self, device: torch.device, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._device = device
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._start = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        assert name in PHASES, name
        start = self._now()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - start

    def take(self) -> dict[str, float]:
        """Seconds by phase, and `total` since the last call; then start afresh."""
        now = self._now()
        seconds = {**self._seconds, "total": now - self._start}
        self._seconds, self._start = {}, now
        return seconds

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()


def peak_memory_bytes() -> int:
    """Peak resident set of this process since it started."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
