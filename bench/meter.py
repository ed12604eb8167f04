"""Phases of a round: named windows with a device sync on both ends, and peak memory."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
        self.device = device
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
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._clock()


def reset_peak_memory(device: torch.device) -> None:
    """Start the peaks afresh, so that one run of a sweep does not inherit another's."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM, proc(5)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak bytes since `reset_peak_memory`: of this process's resident set, and of its GPU.

    Where the platform does not tell (no /proc), the key is absent.
    """
    peaks = {}
    with suppress(OSError, KeyError):
        status = Path("/proc/self/status").read_text(encoding="ascii")
        lines = dict(line.split(":", 1) for line in status.splitlines())
        peaks["peak_memory_bytes"] = int(lines["VmHWM"].split()[0]) * 1024  # the file says kB
    if device.type == "cuda":
        peaks["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return peaks
