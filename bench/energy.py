"""Energy of a whole run by codecarbon, who samples on a host, and what works here."""

import logging
import os
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.energy_counters import (
    POWERCAP,
    Counter,
    NoCounter,
    nvml_indices,
    open_nvml,
    open_rapl,
    scope,
)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_JOULES_PER_KWH = 3.6e6
_CPU_SOURCES = {"intel_rapl": "rapl", "cpu_load": "load-model", "constant": "tdp-model"}


def host_identity() -> str:
    """What processes of one physical host share, also as several emulated Slurm nodes."""
    boot_id = ""
    with suppress(OSError):
        boot_id = _BOOT_ID.read_text(encoding="ascii").strip()
    return f"{boot_id} {socket.gethostname()}"


def samplers(identities: Sequence[str]) -> list[int]:
    """The world_rank that samples for each host, its lowest, from all processes' identities."""
    return [identities.index(identity) for identity in dict.fromkeys(identities)]


class NullEnergy:
    """In place of EnergyCounters and of RunEnergy on a process that does not sample: no answers."""

    def joules(self) -> dict[str, float]:
        return {}

    def idle_watts(self, seconds: float) -> dict[str, float]:
        """Sleep all the same: a process that waits in MPI spins, and the host would not idle."""
        time.sleep(seconds)
        return {}

    def labels(self) -> dict[str, str]:
        return {}

    def start(self) -> None:
        pass

    def stop(self) -> dict[str, Any]:
        return {}


class RunEnergy:
    """codecarbon in machine mode, without network and files, from `start` to `stop`.

    country_iso_code: three letters; gpus: NVML indices or UUIDs of the GPUs that the job uses.
    codecarbon starts short child processes (lscpu, cpuinfo, nvidia-smi, under Slurm scontrol) and
    two timer threads; the first start takes about 2 seconds.
    """

    def __init__(self, country_iso_code: str, gpus: Sequence[int | str] = ()) -> None:
        self._country_iso_code = country_iso_code
        self._gpus = gpus
        self._indices: list[int] = []
        self._tracker: Any = None

    def start(self) -> None:
        """Start to measure. Where that fails: one warning, and `stop` gives nothing."""
        with suppress(NoCounter):
            self._indices = nvml_indices(self._gpus) if self._gpus else []
        try:
            tracker = _offline_tracker(self._country_iso_code, self._indices)
            tracker.get_detected_hardware()  # raises what start() would swallow
            tracker.start()
        except Exception as error:  # whatever ails codecarbon, the run goes on
            _warn_no_energy(error)
        else:
            self._tracker = tracker

    def stop(self) -> dict[str, Any]:
        """What the run took, or nothing.

        energy_joules and energy_part_sources by part (cpu, ram, gpu), energy_source, energy_scope,
        and co2_grams if codecarbon knows the country's electricity. A source that ends in -model is
        modelled; any other is a counter's or a sensor's. codecarbon always models ram.
        """
        tracker, self._tracker = self._tracker, None
        if tracker is None:
            return {}
        try:
            tracker.stop()
            return _result(tracker, len(self._indices))
        except Exception as error:  # as in start
            _warn_no_energy(error)
            return {}


def _offline_tracker(country_iso_code: str, indices: list[int]) -> Any:
    """A tracker that no setting outside this file makes write, send or scale."""
    from codecarbon import OfflineEmissionsTracker  # starts NVML, so only where it is wanted

    # Silent: a failure gets one warning here. Set by hand, for log_level comes after first lines.
    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    return OfflineEmissionsTracker(
        country_iso_code=country_iso_code,
        gpu_ids=indices,  # not UUIDs: it takes the G off GPU-... and then finds none
        tracking_mode="machine",
        output_methods=[],
        output_dir=os.curdir,
        emissions_endpoint=None,
        electricitymaps_api_token="",  # None would look for an older key
        pue=1.0,
        log_level="critical",
        allow_multiple_runs=True,
    )


def _result(tracker: Any, num_gpus: int) -> dict[str, Any]:
    """`RunEnergy.stop`'s mapping. Raises where codecarbon gave no data."""
    data = getattr(tracker, "final_emissions_data", None)
    if data is None:
        raise RuntimeError("it gave no data")
    sources = dict(_part_source(hardware) for hardware in tracker._hardware)
    if not num_gpus:  # told of no GPU, it counts all of them from the second run of a process on
        sources.pop("gpu", None)
    joules = {part: getattr(data, f"{part}_energy") * _JOULES_PER_KWH for part in sources}
    joules = {part: joules[part] for part in ("cpu", "ram", "gpu") if joules.get(part)}
    if "cpu" not in joules:
        raise RuntimeError("it gave no energy for the processor")
    parts = {part: sources[part] for part in joules}
    host = "+".join(part for part in parts if part != "gpu")
    result = {
        "energy_joules": joules,
        "energy_part_sources": parts,
        "energy_source": f"codecarbon-{'+'.join(dict.fromkeys(parts.values()))}",
        "energy_scope": f"host:{host}, gpu:{num_gpus}" if "gpu" in parts else f"host:{host}",
    }
    if data.country_name:
        counted = sum(joules.values()) / (data.energy_consumed * _JOULES_PER_KWH)
        result["co2_grams"] = data.emissions * 1000 * counted  # of the parts above alone
    else:  # codecarbon would take the world's average
        text = f"no CO2: codecarbon knows no electricity mix of {data.country_iso_code!r}"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    return result


def _part_source(hardware: Any) -> tuple[str, str]:
    """Which part (cpu, ram, gpu) this piece of codecarbon's hardware is, and how it is measured."""
    kind = type(hardware).__name__
    if kind == "CPU":
        return "cpu", _CPU_SOURCES.get(hardware._mode, hardware._mode)
    if kind == "RAM":
        return "ram", "ram-model"
    if kind == "GPU":  # without a counter it adds up readings of power, one a second
        powers = [device._use_power_fallback for device in hardware.devices.devices]
        return "gpu", "nvml-power" if any(powers) else "nvml"
    return hardware.chip_part.lower(), kind.lower()  # a board's own sensors


def _warn_no_energy(error: Exception) -> None:
    text = f"no codecarbon energy: {type(error).__name__}: {error}"
    warnings.warn(text, RuntimeWarning, stacklevel=3)


@dataclass(frozen=True, kw_only=True)
class SourceCheck:
    """One line of `fedara doctor`: does this source work here; if not, advice says what to do."""

    source: str
    works: bool
    text: str
    advice: str = ""


def check_sources(powercap: Path = POWERCAP) -> list[SourceCheck]:
    """What each energy source gives here, or why nothing. Takes about 2 seconds."""
    return [
        _check_counter("rapl", partial(open_rapl, powercap)),
        _check_counter("nvml", open_nvml),
        _check_codecarbon(),
    ]


def _check_counter(source: str, opener: Callable[[], list[Counter]]) -> SourceCheck:
    try:
        return SourceCheck(source=source, works=True, text=f"counts {scope(opener())}")
    except NoCounter as error:
        return SourceCheck(source=source, works=False, text=error.reason, advice=error.advice)


def _check_codecarbon() -> SourceCheck:
    run = RunEnergy("USA")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.start()
        time.sleep(0.1)  # less than 0.05 seconds is no energy to codecarbon
        result = run.stop()
    if not result:
        text = str(caught[-1].message) if caught else "no energy"
        return SourceCheck(source="codecarbon", works=False, text=text)
    parts = ", ".join(f"{part} by {how}" for part, how in result["energy_part_sources"].items())
    return SourceCheck(source="codecarbon", works=True, text=parts)
