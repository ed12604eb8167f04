"""Energy of a whole run by codecarbon, the choice of each host's sampler, and a self-check."""

import logging
import os
import socket
import time
import warnings
from collections import Counter as Tally
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench.ask import MISSING, NO_ANSWER, ask
from bench.metering.counters import (
    POWERCAP,
    Counter,
    EnergyCounters,
    NoCounter,
    nvml_indices,
    open_nvml,
    open_rapl,
    scope,
)
from fedara_core.comm.base import Communicator

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_JOULES_PER_KWH = 3.6e6
_CPU_SOURCES = {"intel_rapl": "rapl", "cpu_load": "load-model", "constant": "tdp-model"}


def host_identity() -> str:
    """The same for all processes of one physical host, also of several emulated Slurm nodes."""
    boot_id = ""
    with suppress(OSError):
        boot_id = _BOOT_ID.read_text(encoding="ascii").strip()
    return f"{boot_id} {socket.gethostname()}"


def samplers(identities: Sequence[str]) -> list[int]:
    """Each host's sampler: its lowest world_rank, from the identities of all processes."""
    return [identities.index(identity) for identity in dict.fromkeys(identities)]


class NullEnergy:
    """Stands in for EnergyCounters and RunEnergy on a process that does not sample."""

    samples = False

    def __init__(self, missing: str = "") -> None:
        self.missing = missing

    def joules(self) -> dict[str, float]:
        return {}

    def idle_watts(self, seconds: float) -> dict[str, float]:
        """Sleep like the sampler: a process that waits in MPI keeps a core busy."""
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

    country_iso_code: three letters, or None for no CO2. gpus: NVML indices or UUIDs of the GPUs
    that the job uses. missing: why `stop` gave nothing. codecarbon starts short child processes
    (lscpu, cpuinfo, nvidia-smi, under Slurm scontrol) and two timer threads. The first start takes
    about 2 seconds.
    """

    samples = True

    def __init__(self, country_iso_code: str | None, gpus: Sequence[int | str] = ()) -> None:
        self._country_iso_code = country_iso_code
        self._gpus = gpus
        self.missing = ""
        self._indices: list[int] = []
        self._tracker: Any = None

    def start(self) -> None:
        """Start to measure. If that fails, there is one warning, and `stop` gives nothing."""
        with suppress(NoCounter):
            self._indices = nvml_indices(self._gpus) if self._gpus else []
        try:
            _check_scontrol()
            # It needs a country even if no CO2 is wanted.
            tracker = _offline_tracker(self._country_iso_code or "USA", self._indices)
            tracker.get_detected_hardware()  # start() would hide its errors
            tracker.start()
        except Exception as error:  # the run continues without codecarbon
            self.missing = _warn_no_energy(error)
        else:
            self._tracker = tracker

    def stop(self) -> dict[str, Any]:
        """The run's energy; empty if it is unknown.

        energy_joules and energy_part_sources by part (cpu, ram, gpu), energy_source, energy_scope,
        and co2_grams if codecarbon knows the country's electricity mix. A source that ends in
        -model is modelled; any other is a counter or a sensor. codecarbon always models ram.
        """
        tracker, self._tracker = self._tracker, None
        if tracker is None:
            return {}
        try:
            tracker.stop()
            return _result(tracker, len(self._indices), co2=self._country_iso_code is not None)
        except Exception as error:  # as in start
            self.missing = _warn_no_energy(error)
            return {}


def _check_scontrol() -> None:
    """Raise RuntimeError where codecarbon would fail or wait for ever: in a Slurm job it asks
    scontrol, without a limit."""
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("SLURM_JOBID")
    if job:
        done = ask("scontrol", "show", "job", job)
        if done.returncode in (MISSING, NO_ANSWER):
            raise RuntimeError(f"in Slurm job {job} codecarbon asks scontrol; {done.stderr}")


def _offline_tracker(country_iso_code: str, indices: list[int]) -> Any:
    """A tracker that writes and sends nothing, whatever codecarbon's own settings say."""
    from codecarbon import OfflineEmissionsTracker  # its import starts NVML

    # Failures give one warning here. log_level alone comes after the tracker's first lines.
    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    return OfflineEmissionsTracker(
        country_iso_code=country_iso_code,
        gpu_ids=indices,  # it does not find UUIDs
        tracking_mode="machine",
        output_methods=[],
        output_dir=os.curdir,
        emissions_endpoint=None,
        electricitymaps_api_token="",  # None would look for an older key
        pue=1.0,
        log_level="critical",
        allow_multiple_runs=True,
    )


def _result(tracker: Any, num_gpus: int, *, co2: bool) -> dict[str, Any]:
    """What `RunEnergy.stop` gives. Raises RuntimeError if codecarbon has no data."""
    data = getattr(tracker, "final_emissions_data", None)
    if data is None:
        raise RuntimeError("it gave no data")
    # No public function of codecarbon 3.3 says how it measured a part.
    sources = dict(_part_source(hardware) for hardware in tracker._hardware)
    if not num_gpus:  # without a list it counts all GPUs from the second run of a process on
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
    if not co2:
        return result
    if data.country_name:
        counted = sum(joules.values()) / (data.energy_consumed * _JOULES_PER_KWH)
        result["co2_grams"] = data.emissions * 1000 * counted  # of the parts above only
    else:  # codecarbon would use the world's average
        text = f"no CO2: codecarbon knows no electricity mix of {data.country_iso_code!r}"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    return result


def _part_source(hardware: Any) -> tuple[str, str]:
    """The part (cpu, ram, gpu) of one of codecarbon's hardware objects, and its source."""
    kind = type(hardware).__name__
    if kind == "CPU":
        return "cpu", _CPU_SOURCES.get(hardware._mode, hardware._mode)
    if kind == "RAM":
        return "ram", "ram-model"
    if kind == "GPU":  # without a counter codecarbon adds up power, read once a second
        powers = [device._use_power_fallback for device in hardware.devices.devices]
        return "gpu", "nvml-power" if any(powers) else "nvml"
    return hardware.chip_part.lower(), kind.lower()  # a board's own sensors


def _warn_no_energy(error: Exception) -> str:
    text = f"no codecarbon energy: {type(error).__name__}: {error}"
    warnings.warn(text, RuntimeWarning, stacklevel=3)
    return text


@dataclass(frozen=True, kw_only=True)
class HostEnergy:
    """The energy meters of this process: its host's counters and codecarbon, or stand-ins.
    idle_watts: of this host, by source of the counters. num_hosts: hosts of the job."""

    counters: EnergyCounters | NullEnergy = field(default_factory=NullEnergy)
    run: RunEnergy | NullEnergy = field(default_factory=NullEnergy)
    idle_watts: Mapping[str, float] = field(default_factory=dict)
    num_hosts: int = 0


def no_energy(missing: str) -> HostEnergy:
    """For a job that measures no energy. missing: the reason, for the record."""
    return HostEnergy(run=NullEnergy(missing))


def open_energy(
    *,
    country_iso_code: str | None,
    idle_seconds: float,
    gpu: str | None,
    communicator: Communicator,
) -> HostEnergy:
    """Choose each host's sampler, open its counters, and measure the idle host. All processes call
    it together. gpu: UUID of the GPU that this process uses."""
    identity = host_identity()
    everyone = communicator.gather_json([identity, gpu])
    world_ranks = samplers([host for host, _ in everyone])
    if communicator.world_rank in world_ranks:
        gpus = list(dict.fromkeys(uuid for host, uuid in everyone if host == identity and uuid))
        counters: EnergyCounters | NullEnergy = EnergyCounters(gpus)
        run: RunEnergy | NullEnergy = RunEnergy(country_iso_code, gpus)
    else:
        counters, run = NullEnergy(), NullEnergy()
    labels = "+".join(counters.labels().values())
    counted = any(communicator.gather_bytes(labels.encode()))
    idle = counters.idle_watts(idle_seconds) if counted and idle_seconds else {}
    return HostEnergy(counters=counters, run=run, idle_watts=idle, num_hosts=len(world_ranks))


def add_hosts(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of what `RunEnergy.stop` gave on each host; empty if their sources differ."""
    scopes = Tally(str(result.get("energy_scope")) for result in results)
    text = ", ".join(s if n == 1 else f"{n} x ({s})" for s, n in scopes.items())
    return _add(results, text)


def add_parts(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same sum over the parts of a run that was resumed."""
    scopes = dict.fromkeys(str(result.get("energy_scope")) for result in results)
    return _add(results, "; ".join(scopes))


def _add(results: Sequence[Mapping[str, Any]], energy_scope: str) -> dict[str, Any]:
    if not all(results) or len({result["energy_source"] for result in results}) != 1:
        return {}
    first = results[0]
    joules = [result["energy_joules"] for result in results]
    total: dict[str, Any] = {
        "energy_joules": {part: sum(by_part[part] for by_part in joules) for part in joules[0]},
        "energy_part_sources": first["energy_part_sources"],
        "energy_source": first["energy_source"],
        "energy_scope": energy_scope,
    }
    if all("co2_grams" in result for result in results):
        total["co2_grams"] = sum(result["co2_grams"] for result in results)
    return total


@dataclass(frozen=True)
class SourceCheck:
    """Whether an energy source works here; if not, advice says what to do."""

    source: str
    works: bool
    text: str
    advice: str = ""


def check_sources(powercap: Path = POWERCAP) -> list[SourceCheck]:
    """Try each energy source. Takes about 2 seconds."""
    return [
        _check_counter("rapl", partial(open_rapl, powercap)),
        _check_counter("nvml", open_nvml),
        _check_codecarbon(),
    ]


def _check_counter(source: str, opener: Callable[[], list[Counter]]) -> SourceCheck:
    try:
        return SourceCheck(source, True, f"counts {scope(opener())}")
    except NoCounter as error:
        return SourceCheck(source, False, error.reason, error.advice)


def _check_codecarbon() -> SourceCheck:
    run = RunEnergy("USA")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.start()
        time.sleep(0.1)  # codecarbon ignores less than 0.05 seconds
        result = run.stop()
    if not result:
        text = str(caught[-1].message) if caught else "no energy"
        advice = (
            "bind Slurm's programs into the container, or unset SLURM_JOB_ID and SLURM_JOBID"
            if "scontrol" in text
            else "--no-energy runs without it"
        )
        return SourceCheck("codecarbon", False, text, advice)
    parts = ", ".join(f"{part} by {how}" for part, how in result["energy_part_sources"].items())
    return SourceCheck("codecarbon", True, parts)
