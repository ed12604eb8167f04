"""Phases of a round: seconds, joules and peak bytes, with the device in sync at both ends. Phases
never nest and cover the whole round; "meter" is measuring itself and the time between."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.metering.codecarbon import NullEnergy
from bench.metering.counters import EnergyCounters
from bench.metering.memory import Peaks
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
    """Measures the phases of this process; `take` gives what was measured since the last `take`."""

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
        self._peaks = Peaks(device)
        self._seconds: dict[str, float] = {}
        self._joules: dict[str, dict[str, float]] = {}
        self._counters.joules()  # energy from before belongs to no round
        self._start = self._last = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the body of the `with` as a part of this phase."""
        assert name in PHASES, name
        self._now()  # wait for the device: its work so far is no part of the phase
        self._add_joules("meter")
        self._add_seconds("meter")
        yield
        self._add_seconds(name, self._now())
        self._add_joules(name)
        self._peaks.end_phase(name)
        self._add_seconds("meter")

    def take(self) -> Measured:
        """What was measured since the last call."""
        self._now()
        self._add_joules("meter")
        self._add_seconds("meter")
        measured = Measured(
            seconds={**self._seconds, "total": self._last - self._start},
            joules=self._joules if self._counters.samples else None,
            idle_watts=self._idle_watts,
            labels=self._counters.labels(),
            memory=self._peaks.pop(),
        )
        self._seconds, self._joules, self._start = {}, {}, self._last
        return measured

    def device_bytes_above_rest(self) -> int | None:
        """Peak bytes on the GPU in the last phase, less those allocated now; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return self._peaks.last_device_bytes - torch.cuda.memory_allocated(self.device)

    def _add_seconds(self, name: str, now: float | None = None) -> None:
        """Add the time since the last call to the phase."""
        now = self._clock() if now is None else now
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    def _add_joules(self, name: str) -> None:
        """Add the host's energy since the last reading to the phase."""
        for source, joules in self._counters.joules().items():
            by_source = self._joules.setdefault(name, {})
            by_source[source] = by_source.get(source, 0.0) + joules

    def _now(self) -> float:
        """The time at which the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._clock()
