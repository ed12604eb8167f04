"""Phases of a round: seconds, joules and peak bytes of named windows, device sync on both ends.

Phases never nest, and together they take the whole round: what measuring itself takes, and what
passes between two phases, is the phase "meter".
"""

import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.metering.codecarbon import NullEnergy
from bench.metering.counters import EnergyCounters, net_joules
from fedara_core.schema import PHASES


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one process measured of one round.

    seconds: by phase, and `total`. joules: phase -> source -> joules of the host; None on a process
    that does not sample. idle_watts: source -> watts. labels: energy_source and energy_scope.
    memory: record key -> peak bytes of this process, or phase -> peak bytes.
    """

    seconds: dict[str, float]
    joules: dict[str, dict[str, float]] | None = None
    idle_watts: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)


class Meter:
    """What the phases of this process take since the last `take`."""

    def __init__(
        self,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
        counters: EnergyCounters | NullEnergy | None = None,
        idle_watts: Mapping[str, float] | None = None,
    ) -> None:
        self.device = device
        self._clock = clock
        self._counters = counters or NullEnergy()
        self._idle_watts = idle_watts or {}
        self._peaks = _Peaks(device)
        self._seconds: dict[str, float] = {}
        self._joules: dict[str, dict[str, float]] = {}
        self._counters.joules()  # what was used before belongs to no round
        self._start = self._last = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        assert name in PHASES, name
        self._now()  # the device's work before the phase is not the phase's
        self._add_joules("meter")
        self._pass("meter")
        yield
        self._pass(name, self._now())
        self._add_joules(name)
        self._peaks.read(name)
        self._pass("meter")

    def take(self) -> Measured:
        """What was measured since the last call; then start afresh."""
        self._now()
        self._add_joules("meter")
        self._pass("meter")
        measured = Measured(
            seconds={**self._seconds, "total": self._last - self._start},
            joules=self._joules if self._counters.samples else None,
            idle_watts=self._idle_watts,
            labels=self._counters.labels(),
            memory=self._peaks.take(),
        )
        self._seconds, self._joules, self._start = {}, {}, self._last
        return measured

    def device_bytes_above_rest(self) -> int | None:
        """Peak bytes on the GPU in the last phase above what lies there now; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return self._peaks.last_device_bytes - torch.cuda.memory_allocated(self.device)

    def _pass(self, name: str, now: float | None = None) -> None:
        """Charge the phase with the time since the last call."""
        now = self._clock() if now is None else now
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    def _add_joules(self, name: str) -> None:
        """Charge the phase with what the host took since the last reading."""
        for source, joules in self._counters.joules().items():
            by_source = self._joules.setdefault(name, {})
            by_source[source] = by_source.get(source, 0.0) + joules

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._clock()


class _Peaks:
    """Peak bytes of this process and of its GPU: of each phase, and since this object was made.

    Where the platform does not tell (no /proc), keys are absent.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = _ProcessPeak()
        self._run: dict[str, int] = {}
        self._by_phase: dict[str, dict[str, int]] = {}
        self.last_device_bytes = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def read(self, phase: str) -> None:
        """Note the peaks since the last call as this phase's, and start afresh."""
        for key, peak in self._now().items():
            by_phase = self._by_phase.setdefault(f"{key}_by_phase", {})
            by_phase[phase] = max(peak, by_phase.get(phase, 0))
            self._run[key] = max(peak, self._run.get(key, 0))

    def take(self) -> dict[str, Any]:
        """The peaks since the start, and those of the phases since the last call."""
        taken: dict[str, Any] = {**self._run, **self._by_phase}
        if not self._process.restarts:  # the peak of the process, whatever the phase
            taken.pop("peak_memory_bytes_by_phase", None)
        self._by_phase = {}
        return taken

    def _now(self) -> dict[str, int]:
        peaks = {}
        process_bytes = self._process.take()
        if process_bytes is not None:
            peaks["peak_memory_bytes"] = process_bytes
        if self._device.type == "cuda":
            self.last_device_bytes = torch.cuda.max_memory_allocated(self._device)
            peaks["peak_device_memory_bytes"] = self.last_device_bytes
            torch.cuda.reset_peak_memory_stats(self._device)
        return peaks


class _ProcessPeak:
    """The most bytes of this process that were resident since the last `take`.

    Resident memory grows by page faults: without one, and with as much resident as at the last
    call, that is the peak. To read so much takes 3 us, and VmHWM takes 10.
    """

    def __init__(self) -> None:
        self._statm = self._status = self._clear_refs = -1
        with suppress(OSError):
            self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
            self._status = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
            self._clear_refs = os.open("/proc/self/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
        self._faults = self._resident = -1
        self.take()

    def __del__(self) -> None:
        for descriptor in (self._statm, self._status, self._clear_refs):
            if descriptor >= 0:
                os.close(descriptor)

    @property
    def restarts(self) -> bool:
        """Whether the platform lets the peak start afresh; else it is that since the start."""
        return self._clear_refs >= 0

    def take(self) -> int | None:
        """The peak, to start afresh; None where the platform does not tell."""
        if self._status < 0:
            return None
        usage = resource.getrusage(resource.RUSAGE_SELF)
        faults = usage.ru_minflt + usage.ru_majflt
        resident = int(os.pread(self._statm, 128, 0).split(maxsplit=2)[1]) * _PAGE_BYTES
        if (faults, resident) == (self._faults, self._resident):
            return resident
        self._faults, self._resident = faults, resident
        text = os.pread(self._status, 4096, 0)
        if self.restarts:
            with suppress(OSError):
                os.pwrite(self._clear_refs, b"5", 0)  # resets VmHWM, proc(5)
        found = text.partition(b"VmHWM:")[2].split(maxsplit=1)
        return int(found[0]) * 1024 if found else None  # the file says kB


_PAGE_BYTES = resource.getpagesize()


def proportional_bytes() -> int | None:
    """This process's share of physical memory, pages that it shares divided by who shares them.

    None where the platform does not tell. Takes about 10 ms for 1 GB.
    """
    with suppress(OSError, ValueError, IndexError):
        text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
        return int(text.partition("\nPss:")[2].split(maxsplit=1)[0]) * 1024  # the file says kB
    return None


def reduce_seconds(parts: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The record's seconds from every process's: maximum, mean, sum, and one by one."""
    phases = [phase for phase in (*PHASES, "total") if any(phase in part for part in parts)]
    by_process = {phase: [round(part.get(phase, 0.0), 6) for part in parts] for phase in phases}
    sums = {phase: sum(seconds) for phase, seconds in by_process.items()}
    return {
        "seconds": {phase: max(seconds) for phase, seconds in by_process.items()},
        "seconds_mean": {phase: round(value / len(parts), 6) for phase, value in sums.items()},
        "seconds_sum": {phase: round(value, 6) for phase, value in sums.items()},
        "seconds_by_process": by_process,
    }


def reduce_memory(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The record's memory from every process's: maxima, and peaks and shares one by one."""
    reduced: dict[str, Any] = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        found = [part[key] for part in parts if key in part]
        if key.endswith("_by_phase"):
            phases = [phase for phase in PHASES if any(phase in peaks for peaks in found)]
            reduced[key] = {phase: max(peaks.get(phase, 0) for peaks in found) for phase in phases}
        elif len(found) == len(parts):
            reduced |= {key: max(found), f"{key}_by_process": found}
    return reduced


def reduce_energy(parts: Sequence[Measured]) -> dict[str, Any]:
    """The record's counted energy: the sum over the hosts, by the phases of their samplers.

    Nothing where a host has no counter, or where hosts have different ones. A source that was lost
    in mid-round is left out.
    """
    hosts = [part for part in parts if part.joules is not None]
    sources = {host.labels.get("energy_source") for host in hosts}
    if len(sources) != 1 or None in sources:
        return {}
    kept = str(sources.pop()).split("+")
    gross = [_joules_of(host, kept) for host in hosts]
    reduced: dict[str, Any] = {"energy_joules": _sum_phases(gross)}
    if all(source in host.idle_watts for host in hosts for source in kept):
        net = [_net_of(host, kept) for host in hosts]
        reduced["energy_net_joules"] = _sum_phases(net)
    by_source = {
        source: sum(by.get(source, 0.0) for host in hosts for by in (host.joules or {}).values())
        for source in kept
    }
    scopes = dict.fromkeys(host.labels["energy_scope"] for host in hosts)
    return reduced | {
        "energy_joules_by_source": {source: round(value, 6) for source, value in by_source.items()},
        "energy_source": hosts[0].labels["energy_source"],
        "energy_scope": "; ".join(scopes),
    }


def _joules_of(host: Measured, sources: Sequence[str]) -> dict[str, float]:
    """Joules by phase, and `total`."""
    phases = host.joules or {}
    joules = {phase: sum(by.get(s, 0.0) for s in sources) for phase, by in phases.items()}
    return {**joules, "total": sum(joules.values())}


def _net_of(host: Measured, sources: Sequence[str]) -> dict[str, float]:
    """The same, less what the idle host takes in that time."""
    watts = {source: host.idle_watts[source] for source in sources}
    gross = {**(host.joules or {}), "total": {source: 0.0 for source in sources}}
    for by_source in (host.joules or {}).values():
        for source in sources:
            gross["total"][source] += by_source.get(source, 0.0)
    return {
        phase: sum(net_joules(by_source, watts, host.seconds.get(phase, 0.0)).values())
        for phase, by_source in gross.items()
    }


def _sum_phases(hosts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    phases = [phase for phase in (*PHASES, "total") if any(phase in host for host in hosts)]
    return {phase: round(sum(host.get(phase, 0.0) for host in hosts), 6) for phase in phases}
