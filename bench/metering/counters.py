"""Hardware counters of energy: RAPL through powercap, and NVML's total energy. A reading costs a
few small files, so that phases can be measured one by one. RAPL advances every millisecond, NVML's
counter about ten times a second: on a GPU short phases are coarse, their sum is not."""

import importlib
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")

_RAPL_PERMISSION = (
    "sudo chmod -R a+r /sys/class/powercap/intel-rapl* (until the next boot), or a udev rule that "
    "lets a group read energy_uj"
)
_MIRROR_MICROJOULES = 1_000_000  # what a package may use between two reads of the same counter


class NoCounter(Exception):
    """A source can not be read here. advice: what to do about it, or empty."""

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(f"{reason}; {advice}" if advice else reason)
        self.reason, self.advice = reason, advice


@dataclass
class Counter:
    """One hardware counter. It grows, and starts again at 0 past its range; two such starts between
    two readings go unnoticed (a package at 300 W takes about 15 minutes to its range)."""

    part: str  # package, dram or gpu
    name: str  # RAPL domain or GPU UUID
    read: Callable[[], int]  # raises OSError or ValueError
    joules_per_count: float
    range: int = 0  # 0: it never starts again
    last: int = field(init=False)

    def __post_init__(self) -> None:
        self.last = self.read()

    def joules(self) -> float:
        """Joules since the last call. Raises OSError or ValueError."""
        now = self.read()
        step = now - self.last if now >= self.last else now - self.last + self.range
        if step < 0:
            raise ValueError(f"{self.name} went back from {self.last} to {now}")
        self.last = now
        return step * self.joules_per_count


class EnergyCounters:
    """The counters of this host's processors and memory, and of the GPUs that the job uses.

    gpus: NVML indices or UUIDs; a GPU that is named twice counts once. A source that can not be
    read, from the start or later, gives one warning and is absent from then on.
    """

    samples = True

    def __init__(self, gpus: Sequence[int | str] = (), *, powercap: Path = POWERCAP) -> None:
        openers = {"rapl": partial(open_rapl, powercap)}
        if gpus:
            openers["nvml"] = partial(open_nvml, gpus)
        self._counters: dict[str, list[Counter]] = {}
        for source, opener in openers.items():
            try:
                self._counters[source] = opener()
            except NoCounter as error:
                warnings.warn(f"no {source} energy: {error}", RuntimeWarning, stacklevel=2)

    def joules(self) -> dict[str, float]:
        """Joules since the last call (or since the start) by source: rapl, nvml."""
        joules = {}
        for source, counters in list(self._counters.items()):
            try:
                joules[source] = sum(counter.joules() for counter in counters)
            except (OSError, ValueError) as error:
                # The rest of the source's counters would measure another scope.
                del self._counters[source]
                text = f"{source} energy is lost from here on: {error}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
        return joules

    def idle_watts(self, seconds: float) -> dict[str, float]:
        """Watts of the idle host by source: sleep, and read before and after. Resets `joules`."""
        self.joules()
        start = time.perf_counter()
        time.sleep(seconds)
        joules = self.joules()
        elapsed = time.perf_counter() - start
        return {source: value / elapsed for source, value in joules.items()}

    def labels(self) -> dict[str, str]:
        """energy_source and energy_scope of what `joules` gives; empty without counters."""
        if not self._counters:
            return {}
        scopes = [scope(counters) for counters in self._counters.values()]
        return {"energy_source": "+".join(self._counters), "energy_scope": ", ".join(scopes)}


def scope(counters: Sequence[Counter]) -> str:
    """The energy_scope of one source's counters: `host:package+dram` or `gpu:1`."""
    parts = list(dict.fromkeys(counter.part for counter in counters))
    return f"gpu:{len(counters)}" if parts == ["gpu"] else f"host:{'+'.join(parts)}"


def open_rapl(powercap: Path = POWERCAP) -> list[Counter]:
    """The package and dram domains, also of AMD hosts. Raises NoCounter. core and uncore are parts
    of package, and psys contains package; they are left out."""
    try:
        domains = {
            folder: (folder / "name").read_text(encoding="ascii").strip()
            for folder in sorted(powercap.glob("intel-rapl:*"))
        }
        counters = [
            _rapl_counter(folder, domain)
            for folder, domain in domains.items()
            if domain.startswith("package") or domain == "dram"
        ]
    except PermissionError as error:
        raise NoCounter(f"no permission to read {error.filename}", _RAPL_PERMISSION) from error
    except (OSError, ValueError) as error:
        raise NoCounter(f"powercap can not be read: {error}") from error
    if not counters:
        raise NoCounter(f"no counters in {powercap}", "usual in virtual machines and containers")
    # Some virtual machines and boards show domains that never count.
    counters = [counter for counter in counters if counter.last]
    if not counters:
        raise NoCounter(f"the counters in {powercap} stand at 0")
    return _without_mirrors(counters)


def _rapl_counter(folder: Path, domain: str) -> Counter:
    energy = folder / "energy_uj"
    return Counter(
        part="dram" if domain == "dram" else "package",
        name=domain,
        read=lambda: int(energy.read_text(encoding="ascii")),
        joules_per_count=1e-6,
        range=int((folder / "max_energy_range_uj").read_text(encoding="ascii")),
    )


def _without_mirrors(counters: Sequence[Counter]) -> list[Counter]:
    """Without the copies of one counter that some kernels show for each die of a package."""
    distinct: list[Counter] = []
    for counter in counters:
        package, is_die, _ = counter.name.partition("-die-")
        mirrors = [
            other
            for other in distinct
            if is_die
            and other.name.startswith(f"{package}-die-")
            and abs(counter.last - other.last) < _MIRROR_MICROJOULES
        ]
        if not mirrors:
            distinct.append(counter)
    return distinct


def open_nvml(gpus: Sequence[int | str] | None = None) -> list[Counter]:
    """The total energy counters of these GPUs, or of all. Raises NoCounter."""
    nvml, handles = _nvml_handles(gpus)
    counters = []
    for uuid, handle in handles.items():
        try:
            read = partial(_read_gpu, nvml, handle)
            counters.append(Counter(part="gpu", name=uuid, read=read, joules_per_count=1e-3))
        except OSError as error:
            advice = "GPUs before Volta and MIG slices have none"
            raise NoCounter(f"{uuid}: {error}", advice) from error
    return counters


def nvml_indices(gpus: Sequence[int | str]) -> list[int]:
    """NVML's indices of these GPUs, each once. Raises NoCounter."""
    nvml, handles = _nvml_handles(gpus)
    try:
        return sorted(nvml.nvmlDeviceGetIndex(handle) for handle in handles.values())
    except nvml.NVMLError as error:
        raise NoCounter(f"NVML: {error}") from error


def _nvml_handles(gpus: Sequence[int | str] | None) -> tuple[Any, dict[str, Any]]:
    """The NVML module, and UUID -> handle of these GPUs, or of all. Raises NoCounter."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError as error:
        raise NoCounter("nvidia-ml-py is not installed", "pip install nvidia-ml-py") from error
    try:
        nvml.nvmlInit()
        handles = [
            nvml.nvmlDeviceGetHandleByIndex(gpu)
            if isinstance(gpu, int)
            else nvml.nvmlDeviceGetHandleByUUID(gpu)
            for gpu in (range(nvml.nvmlDeviceGetCount()) if gpus is None else gpus)
        ]
        by_uuid = {nvml.nvmlDeviceGetUUID(handle): handle for handle in handles}
    except nvml.NVMLError as error:
        raise NoCounter(f"NVML: {error}") from error
    if not by_uuid:
        raise NoCounter("NVML: no GPU")
    return nvml, by_uuid


def _read_gpu(nvml: Any, handle: Any) -> int:
    """Millijoules since the driver was loaded. Raises OSError."""
    try:
        return int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
    except nvml.NVMLError as error:
        raise OSError(f"NVML: {error}") from error
