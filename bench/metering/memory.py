"""Peak memory of a process and of its GPU, by phase and in all."""

import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


class Peaks:
    """Peak bytes of this process and of its GPU: of each phase, and since this object was made.
    Keys are absent on platforms that do not tell (no /proc)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = _ProcessPeak()
        self._run: dict[str, int] = {}
        self._by_phase: dict[str, dict[str, int]] = {}
        self.last_device_bytes = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def end_phase(self, phase: str) -> None:
        """Record the peaks since the last call as this phase's."""
        peaks = {"peak_memory_bytes": self._process.read_and_reset()}
        if self._device.type == "cuda":
            self.last_device_bytes = torch.cuda.max_memory_allocated(self._device)
            peaks["peak_device_memory_bytes"] = self.last_device_bytes
            torch.cuda.reset_peak_memory_stats(self._device)
        for key, peak in peaks.items():
            if peak is not None:
                by_phase = self._by_phase.setdefault(f"{key}_by_phase", {})
                by_phase[phase] = max(peak, by_phase.get(phase, 0))
                self._run[key] = max(peak, self._run.get(key, 0))

    def pop(self) -> dict[str, Any]:
        """The peaks since the start, and those of the phases since the last call."""
        found: dict[str, Any] = {**self._run, **self._by_phase}
        if not self._process.resets:  # then it is the peak of the whole process, in any phase
            found.pop("peak_memory_bytes_by_phase", None)
        self._by_phase = {}
        return found


class _ProcessPeak:
    """The kernel's peak of resident bytes (VmHWM), reset by each reading where that is allowed."""

    def __init__(self) -> None:
        self._status = self._clear_refs = -1
        with suppress(OSError):
            self._status = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
            self._clear_refs = os.open("/proc/self/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
        self.read_and_reset()

    def __del__(self) -> None:
        for descriptor in (self._status, self._clear_refs):
            if descriptor >= 0:
                os.close(descriptor)

    @property
    def resets(self) -> bool:
        """Whether readings reset the peak; else it is that since the process started."""
        return self._clear_refs >= 0

    def read_and_reset(self) -> int | None:
        """The peak since the last call; None where the platform does not tell. Takes 10 us."""
        if self._status < 0:
            return None
        text = os.pread(self._status, 4096, 0)
        if self.resets:
            with suppress(OSError):
                os.pwrite(self._clear_refs, b"5", 0)  # resets VmHWM, proc(5)
        found = text.partition(b"VmHWM:")[2].split(maxsplit=1)
        return int(found[0]) * 1024 if found else None  # the file says kB


def peak_bytes_above_rest(call: Callable[[], object]) -> int | None:
    """Peak resident bytes of this process during a call, above those before it. None where the
    platform does not tell."""
    give_back_freed()  # what glibc keeps would hide what the call needs
    peak = _ProcessPeak()
    before = peak.read_and_reset()
    call()
    after = peak.read_and_reset()
    return None if before is None or after is None or not peak.resets else after - before


def give_back_freed() -> None:
    """Give freed memory back to the system: glibc keeps much of it (bench/run/runner.py)."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # other C libraries have none
        trim(0)


def proportional_bytes() -> int | None:
    """This process's share of physical memory (PSS): a page of n processes counts one n-th. None
    where the platform does not tell. Takes about 10 ms for 1 GB."""
    with suppress(OSError, ValueError, IndexError):
        text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
        return int(text.partition("\nPss:")[2].split(maxsplit=1)[0]) * 1024  # the file says kB
    return None
