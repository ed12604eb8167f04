"""A round's record from what each process measured: sums and maxima over processes and hosts."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.metering.meter import Measured
from fedara_core.schema import PHASES


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
    """The record's counted energy: the sum over hosts, by the phases of each host's sampler. Empty
    if a host has no counter or hosts differ in them; a source lost in the round is left out."""
    hosts = [part for part in parts if part.joules is not None]
    labels = {host.labels.get("energy_source") for host in hosts}
    if len(labels) != 1 or None in labels:
        return {}
    label = str(labels.pop())
    sources = label.split("+")
    gross = [_joules_of(host, sources, {}) for host in hosts]
    reduced: dict[str, Any] = {"energy_joules": _sum_phases(gross)}
    if all(source in host.idle_watts for host in hosts for source in sources):
        net = [_joules_of(host, sources, host.idle_watts) for host in hosts]
        reduced["energy_net_joules"] = _sum_phases(net)
    by_source = {
        source: sum(by.get(source, 0.0) for host in hosts for by in (host.joules or {}).values())
        for source in sources
    }
    scopes = dict.fromkeys(host.labels["energy_scope"] for host in hosts)
    return reduced | {
        "energy_joules_by_source": {source: round(value, 6) for source, value in by_source.items()},
        "energy_source": label,
        "energy_scope": "; ".join(scopes),
    }


def _joules_of(
    host: Measured, sources: Sequence[str], idle_watts: Mapping[str, float]
) -> dict[str, float]:
    """Joules by phase, and `total`, less those of idle_watts (by source) in that time."""
    phases = host.joules or {}
    total = {source: sum(by.get(source, 0.0) for by in phases.values()) for source in sources}
    joules = {}
    for phase, by in {**phases, "total": total}.items():
        seconds = host.seconds.get(phase, 0.0)
        joules[phase] = sum(by[s] - idle_watts.get(s, 0.0) * seconds for s in sources if s in by)
    return joules


def _sum_phases(hosts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    phases = [phase for phase in (*PHASES, "total") if any(phase in host for host in hosts)]
    return {phase: round(sum(host.get(phase, 0.0) for host in hosts), 6) for phase in phases}
