"""Energy: a fake powercap tree and a fake NVML, who samples on a host, and the real codecarbon."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.metering.codecarbon import NullEnergy, RunEnergy, check_sources, host_identity, samplers
from bench.metering.counters import EnergyCounters, nvml_indices

RANGE = 10_000_000  # microjoules at which the fake RAPL counters begin again
MODELLED = "codecarbon-load-model+ram-model"
RUN_BRIEFLY = """
import json, time, warnings
from bench.metering.codecarbon import RunEnergy
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", RuntimeWarning)
    run = RunEnergy("DEU")
    run.start()
    time.sleep(0.1)
    result = run.stop()
texts = [str(w.message) for w in caught if w.category is RuntimeWarning]
print(json.dumps({"result": result, "warnings": texts}))
"""


class Powercap:
    """A folder like /sys/class/powercap, where all domains lie side by side."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, zone: str, name: str, microjoules: int) -> None:
        folder = self.root / zone
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text(f"{RANGE}\n")
        self.set(zone, microjoules)

    def set(self, zone: str, microjoules: int) -> None:
        (self.root / zone / "energy_uj").write_text(f"{microjoules}\n")


@pytest.fixture
def powercap(tmp_path: Path) -> Powercap:
    """One package with its subdomains, and the platform domain that contains it."""
    tree = Powercap(tmp_path / "powercap")
    tree.add("intel-rapl:0", "package-0", 5_000_000)
    tree.add("intel-rapl:0:0", "core", 2_000_000)
    tree.add("intel-rapl:0:1", "uncore", 1_000_000)
    tree.add("intel-rapl:0:2", "dram", 3_000_000)
    tree.add("intel-rapl:1", "psys", 9_000_000)
    tree.add("intel-rapl-mmio:0", "package-0", 5_000_000)
    return tree


class FakeNvml:
    """The few calls of pynvml that count, on GPUs 0 and 1; millijoules can be set, or an error."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.uuids = ["GPU-a", "GPU-b"]
        self.millijoules: dict[str, int | Exception] = {"GPU-a": 1_000, "GPU-b": 7_000}

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return len(self.uuids)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        if index >= len(self.uuids):
            raise self.NVMLError("Invalid Argument")
        return self.uuids[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return self.nvmlDeviceGetHandleByIndex(self.nvmlDeviceGetIndex(uuid))

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle

    def nvmlDeviceGetIndex(self, handle: str) -> int:
        return self.uuids.index(handle)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        found = self.millijoules[handle]
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


@pytest.fixture
def deny(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """deny(zone): its energy_uj can not be read, whoever runs the tests."""
    denied: set[str] = set()
    read_text = Path.read_text

    def denying(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.name == "energy_uj" and path.parent.name in denied:
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", denying)
    return denied.add


@pytest.fixture
def silence() -> Iterator[None]:
    """Any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def only_warning(caught: pytest.WarningsRecorder) -> str:
    """The text of the one RuntimeWarning of the test."""
    (text,) = [str(w.message) for w in caught if w.category is RuntimeWarning]
    return text


@pytest.mark.usefixtures("silence")
def test_package_and_dram_once_each(powercap: Powercap) -> None:
    counters = EnergyCounters(powercap=powercap.root)
    assert counters.labels() == {"energy_source": "rapl", "energy_scope": "host:package+dram"}
    for zone, microjoules in (
        *(
            ("intel-rapl:0", 6_500_000),
            ("intel-rapl:0:0", 3_400_000),
            ("intel-rapl:0:1", 1_050_000),
        ),
        *(("intel-rapl:0:2", 3_250_000), ("intel-rapl:1", 9_990_000)),
        ("intel-rapl-mmio:0", 6_500_000),
    ):
        powercap.set(zone, microjoules)
    assert counters.joules() == pytest.approx({"rapl": 1.5 + 0.25})
    assert counters.joules() == {"rapl": 0.0}  # measured, and nothing: not the same as absent


@pytest.mark.usefixtures("silence")
def test_a_counter_that_begins_again(powercap: Powercap) -> None:
    counters = EnergyCounters(powercap=powercap.root)
    powercap.set("intel-rapl:0", 1_000_000)
    assert counters.joules() == pytest.approx({"rapl": 6.0})
    powercap.set("intel-rapl:0", 1_500_000)
    assert counters.joules() == pytest.approx({"rapl": 0.5})


@pytest.mark.usefixtures("silence")
def test_packages_are_summed(powercap: Powercap) -> None:
    powercap.add("intel-rapl:2", "package-1", 5_000_000)  # equal counts, but packages of their own
    counters = EnergyCounters(powercap=powercap.root)
    powercap.set("intel-rapl:0", 5_500_000)
    powercap.set("intel-rapl:2", 5_000_025)
    assert counters.joules() == pytest.approx({"rapl": 0.500025})


@pytest.mark.usefixtures("silence")
def test_dies_that_mirror_one_counter_count_once(tmp_path: Path) -> None:
    tree = Powercap(tmp_path)
    tree.add("intel-rapl:0", "package-0-die-0", 4_000_000)
    tree.add("intel-rapl:1", "package-0-die-1", 4_000_300)
    tree.add("intel-rapl:2", "package-1-die-0", 4_000_600)
    tree.add("intel-rapl:3", "package-1-die-1", 8_000_000)  # a die with a counter of its own
    counters = EnergyCounters(powercap=tree.root)
    for zone in range(4):
        tree.set(f"intel-rapl:{zone}", 9_000_000)
    assert counters.joules() == pytest.approx({"rapl": 5.0 + 4.9994 + 1.0})


@pytest.mark.usefixtures("silence")
def test_a_domain_that_stands_at_zero_is_not_measured(powercap: Powercap) -> None:
    powercap.set("intel-rapl:0:2", 0)
    assert EnergyCounters(powercap=powercap.root).labels()["energy_scope"] == "host:package"


def test_all_counters_at_zero(powercap: Powercap) -> None:
    powercap.set("intel-rapl:0", 0)
    powercap.set("intel-rapl:0:2", 0)
    with pytest.warns(RuntimeWarning, match="stand at 0"):
        assert EnergyCounters(powercap=powercap.root).joules() == {}


def test_no_powercap(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="usual in virtual machines") as caught:
        counters = EnergyCounters(powercap=tmp_path / "missing")
    assert len(caught) == 1
    assert not any([counters.joules(), counters.labels(), counters.idle_watts(0)])


def test_no_permission_says_how_to_get_it(powercap: Powercap, deny: Callable[[str], None]) -> None:
    deny("intel-rapl:0")
    with pytest.warns(RuntimeWarning) as caught:
        counters = EnergyCounters(powercap=powercap.root)
    (text,) = [str(warning.message) for warning in caught]
    assert "intel-rapl:0/energy_uj; sudo chmod -R a+r" in text
    assert "\n" not in text
    assert not any([counters.joules(), counters.labels()])


@pytest.mark.parametrize("how", ["vanishes", "is denied", "is garbage"])
def test_a_counter_lost_in_mid_run(
    how: str,
    powercap: Powercap,
    deny: Callable[[str], None],
    nvml: FakeNvml,
    recwarn: pytest.WarningsRecorder,
) -> None:
    counters = EnergyCounters([0], powercap=powercap.root)
    assert set(counters.joules()) == {"rapl", "nvml"}
    if how == "vanishes":
        (powercap.root / "intel-rapl:0:2" / "energy_uj").unlink()
    elif how == "is denied":
        deny("intel-rapl:0")
    else:
        (powercap.root / "intel-rapl:0" / "energy_uj").write_text("")
    nvml.millijoules["GPU-a"] = 1_500
    assert counters.joules() == {"nvml": 0.5}
    assert counters.joules() == {"nvml": 0.0}
    assert "rapl energy is lost" in only_warning(recwarn)
    assert counters.labels() == {"energy_source": "nvml", "energy_scope": "gpu:1"}


@pytest.mark.usefixtures("silence")
def test_gpus_count_once_each(powercap: Powercap, nvml: FakeNvml) -> None:
    counters = EnergyCounters([1, "GPU-b", 1], powercap=powercap.root)
    assert counters.labels() == {
        "energy_source": "rapl+nvml",
        "energy_scope": "host:package+dram, gpu:1",
    }
    nvml.millijoules |= {"GPU-a": 500_000, "GPU-b": 9_500}
    assert counters.joules() == {"rapl": 0.0, "nvml": 2.5}
    both = EnergyCounters(["GPU-a", 1], powercap=powercap.root)
    nvml.millijoules |= {"GPU-a": 501_000, "GPU-b": 9_750}
    assert both.joules()["nvml"] == pytest.approx(1.25)
    assert nvml_indices(["GPU-b", 0, 1]) == [0, 1]


@pytest.mark.parametrize("now", [FakeNvml.NVMLError("GPU is lost"), 3])
def test_a_gpu_lost_in_mid_run(
    powercap: Powercap, nvml: FakeNvml, now: int | Exception, recwarn: pytest.WarningsRecorder
) -> None:
    counters = EnergyCounters([0, 1], powercap=powercap.root)
    nvml.millijoules["GPU-b"] = now  # 3: the driver was loaded again
    assert counters.joules() == {"rapl": 0.0}
    assert counters.joules() == {"rapl": 0.0}
    assert "nvml energy is lost" in only_warning(recwarn)
    assert counters.labels()["energy_source"] == "rapl"


@pytest.mark.parametrize("how", ["no driver", "no package", "no counter", "no such GPU"])
def test_no_gpu_counter(
    how: str, powercap: Powercap, nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_driver() -> None:
        raise nvml.NVMLError("Driver Not Loaded")

    if how == "no driver":
        monkeypatch.setattr(nvml, "nvmlInit", no_driver)
    elif how == "no package":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    elif how == "no counter":
        nvml.millijoules["GPU-a"] = nvml.NVMLError("Not Supported")
    gpus = [0, 5] if how == "no such GPU" else [0]
    with pytest.warns(RuntimeWarning, match="no nvml energy") as caught:
        counters = EnergyCounters(gpus, powercap=powercap.root)
    assert len(caught) == 1
    assert counters.joules() == {"rapl": 0.0}


@pytest.mark.usefixtures("silence")
def test_idle_and_net(powercap: Powercap, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        powercap.set("intel-rapl:0", 7_000_000)

    fake_time = SimpleNamespace(sleep=sleep, perf_counter=lambda: now[0])
    counters = EnergyCounters(powercap=powercap.root)
    powercap.set("intel-rapl:0", 6_000_000)  # before the window
    monkeypatch.setattr("bench.metering.counters.time", fake_time)
    watts = counters.idle_watts(4.0)
    assert watts == pytest.approx({"rapl": 0.25})


def test_null_energy_answers_nothing() -> None:
    null = NullEnergy()
    null.start()
    assert not any([null.joules(), null.labels(), null.idle_watts(0), null.stop()])


@pytest.mark.parametrize(
    ("identities", "expected"),
    [
        (["a"], [0]),
        (["a"] * 2, [0]),
        (["a"] * 4, [0]),
        (["a", "a", "b", "b"], [0, 2]),
        (["b", "a", "b", "a"], [0, 1]),
    ],
)
def test_one_sampler_per_host(identities: list[str], expected: list[int]) -> None:
    assert samplers(identities) == expected


def test_emulated_nodes_are_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    identities = []
    for node in ("n1", "n1", "n2", "n2"):
        monkeypatch.setenv("SLURMD_NODENAME", node)
        identities.append(host_identity())
    assert samplers(identities) == [0]


def test_codecarbon_models_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODECARBON_PUE", "3")  # would scale every number
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run = RunEnergy("DEU")
    run.start()
    start = time.perf_counter()
    while time.perf_counter() - start < 1.0:
        pass
    found = run.stop()
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert set(found["energy_joules"]) == {"cpu", "ram"}
    assert all(value > 0 for value in found["energy_joules"].values())
    assert found["energy_scope"] == "host:cpu+ram"
    grams_per_kwh = found["co2_grams"] / (sum(found["energy_joules"].values()) / 3.6e6)
    assert 50 < grams_per_kwh < 700  # Germany; codecarbon's unit is kg
    assert run.stop() == {}
    if found["energy_part_sources"]["cpu"] == "load-model":  # where no counter can be read
        assert found["energy_source"] == MODELLED


def test_codecarbon_without_an_electricity_mix() -> None:
    run = RunEnergy("XXX")
    run.start()
    time.sleep(0.1)
    with pytest.warns(RuntimeWarning, match="no electricity mix of 'XXX'"):
        found = run.stop()
    assert set(found["energy_joules"]) == {"cpu", "ram"}
    assert min(found["energy_joules"].values()) > 0
    assert "co2_grams" not in found


def test_codecarbon_fails_to_start(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def broken(tracker: Any) -> None:
        raise OSError("no hardware")

    monkeypatch.setattr("codecarbon.OfflineEmissionsTracker.get_detected_hardware", broken)
    run = RunEnergy("DEU")
    run.start()
    assert run.stop() == {}
    assert only_warning(recwarn) == "no codecarbon energy: OSError: no hardware"


def test_codecarbon_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    run = RunEnergy("DEU")
    with pytest.warns(RuntimeWarning, match="no codecarbon energy"):
        run.start()
    assert run.stop() == {}


class FakeTracker:
    """codecarbon with an answer of our own."""

    def __init__(self, hardware: list[Any], **data: Any) -> None:
        self._hardware = hardware
        if data:
            self.final_emissions_data = SimpleNamespace(**data)

    def get_detected_hardware(self) -> None:
        pass

    start = stop = get_detected_hardware


def piece(kind: str, **facts: Any) -> Any:
    """A piece of codecarbon's hardware by the name of its class."""
    made = type(kind, (), {})()
    made.__dict__ |= facts
    return made


def run_with(
    tracker: FakeTracker, monkeypatch: pytest.MonkeyPatch, gpus: tuple[int, ...] = ()
) -> dict[str, Any]:
    monkeypatch.setattr("bench.metering.codecarbon._offline_tracker", lambda *args: tracker)
    run = RunEnergy("DEU", gpus)
    run.start()
    return run.stop()


KWH = {
    **{"cpu_energy": 2e-6, "ram_energy": 1e-6, "gpu_energy": 5e-6, "energy_consumed": 8e-6},
    **{"emissions": 4e-6, "country_name": "Germany"},
}


@pytest.mark.usefixtures("silence", "nvml")
def test_codecarbon_says_what_it_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = piece("GPU", devices=piece("All", devices=[piece("One", _use_power_fallback=False)]))
    hardware = [piece("RAM"), piece("CPU", _mode="intel_rapl"), gpu]
    found = run_with(FakeTracker(hardware, **KWH), monkeypatch, gpus=(1,))
    assert found["energy_joules"] == pytest.approx({"cpu": 7.2, "ram": 3.6, "gpu": 18.0})
    assert found["energy_part_sources"] == {"cpu": "rapl", "ram": "ram-model", "gpu": "nvml"}
    assert found["energy_source"] == "codecarbon-rapl+ram-model+nvml"
    assert found["energy_scope"] == "host:cpu+ram, gpu:1"
    assert found["co2_grams"] == pytest.approx(4e-3)
    # The same host, a run that uses no GPU, or one that NVML can not find.
    for gpus in ((), (7,)):
        found = run_with(FakeTracker(hardware, **KWH), monkeypatch, gpus)
        assert set(found["energy_joules"]) == {"cpu", "ram"}
        assert found["energy_scope"] == "host:cpu+ram"
        assert found["co2_grams"] == pytest.approx(4e-3 * 3 / 8)


@pytest.mark.parametrize("data", [{}, KWH | {"cpu_energy": 0.0}])
def test_codecarbon_without_data(data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = FakeTracker([piece("RAM"), piece("CPU", _mode="intel_rapl")], **data)
    with pytest.warns(RuntimeWarning, match="no codecarbon energy: RuntimeError: it gave no"):
        assert run_with(tracker, monkeypatch) == {}


def test_codecarbon_in_a_job_without_scontrol(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "SLURM_JOB_ID": "77", "PATH": str(tmp_path), "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", RUN_BRIEFLY],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["result"] == {}
    (text,) = found["warnings"]
    assert "scontrol" in text
    assert done.stderr == ""


def test_check_sources(powercap: Powercap, nvml: FakeNvml, deny: Callable[[str], None]) -> None:
    rapl, gpus, codecarbon = check_sources(powercap.root)
    assert (rapl.works, rapl.text) == (True, "counts host:package+dram")
    assert (gpus.works, gpus.text) == (True, "counts gpu:2")
    assert codecarbon.works
    assert "ram by ram-model" in codecarbon.text
    deny("intel-rapl:0")
    nvml.uuids = []
    rapl, gpus, _ = check_sources(powercap.root)
    assert not rapl.works
    assert rapl.advice.startswith("sudo chmod")
    assert (gpus.works, gpus.text) == (False, "NVML: no GPU")
