"""Sums and maxima over processes and hosts, by hand."""

from typing import Any

from bench.metering.codecarbon import add_hosts
from bench.metering.meter import Measured
from bench.metering.reduce import reduce_energy, reduce_memory, reduce_seconds

MODELLED = {
    "energy_joules": {"cpu": 3.0, "ram": 1.0},
    "energy_part_sources": {"cpu": "load-model", "ram": "ram-model"},
    "energy_source": "codecarbon-load-model+ram-model",
    "energy_scope": "host:cpu+ram",
}


def test_seconds_of_processes_become_maximum_mean_and_sum() -> None:
    parts = [{"wait": 1.0, "total": 3.0}, {"pack": 0.5, "total": 2.0}]
    assert reduce_seconds(parts) == {
        "seconds": {"pack": 0.5, "wait": 1.0, "total": 3.0},
        "seconds_mean": {"pack": 0.25, "wait": 0.5, "total": 2.5},
        "seconds_sum": {"pack": 0.5, "wait": 1.0, "total": 5.0},
        "seconds_by_process": {"pack": [0.0, 0.5], "wait": [1.0, 0.0], "total": [3.0, 2.0]},
    }


def test_memory_of_processes() -> None:
    peaks = {"peak_memory_bytes": 5, "peak_memory_bytes_by_phase": {"pack": 3, "download": 5}}
    other = {"peak_memory_bytes": 7, "peak_memory_bytes_by_phase": {"pack": 7}}
    assert reduce_memory([peaks, other]) == {
        "peak_memory_bytes": 7,
        "peak_memory_bytes_by_process": [5, 7],
        "peak_memory_bytes_by_phase": {"download": 5, "pack": 7},
    }
    assert reduce_memory([peaks, {}]).keys() == {"peak_memory_bytes_by_phase"}


def host(source: str = "rapl", **changes: Any) -> Measured:
    labels = {"energy_source": source, "energy_scope": "host:package"}
    settings: dict[str, Any] = {
        "seconds": {"local_train": 2.0, "total": 3.0},
        "joules": {"local_train": {"rapl": 8.0}, "meter": {"rapl": 1.0}},
        "idle_watts": {"rapl": 2.0},
        "labels": labels,
    }
    return Measured(**settings | changes)


def test_hosts_are_summed() -> None:
    other = Measured(seconds={"total": 9.0})  # a process that does not sample
    found = reduce_energy([host(), other, host()])
    assert found["energy_joules"] == {"local_train": 16.0, "meter": 2.0, "total": 18.0}
    assert found["energy_net_joules"] == {"local_train": 8.0, "meter": 2.0, "total": 6.0}
    assert found["energy_joules_by_source"] == {"rapl": 18.0}
    assert (found["energy_source"], found["energy_scope"]) == ("rapl", "host:package")
    assert "energy_net_joules" not in reduce_energy([host(), host(idle_watts={})])


def test_hosts_that_differ_have_no_sum() -> None:
    assert reduce_energy([host(), host("nvml")]) == {}
    assert reduce_energy([host(), host(joules={}, labels={})]) == {}
    assert reduce_energy([Measured(seconds={"total": 1.0})]) == {}
    assert add_hosts([MODELLED, {}]) == {}
    assert add_hosts([MODELLED, MODELLED | {"energy_source": "codecarbon-rapl"}]) == {}
    assert add_hosts([MODELLED, MODELLED])["energy_scope"] == "2 x (host:cpu+ram)"


def test_a_source_lost_in_mid_round_is_left_out() -> None:
    joules = {"local_train": {"rapl": 8.0, "nvml": 3.0}, "meter": {"nvml": 1.0}}
    found = reduce_energy([host("nvml", joules=joules, idle_watts={"nvml": 0.5})])
    assert found["energy_joules"] == {"local_train": 3.0, "meter": 1.0, "total": 4.0}
    assert found["energy_net_joules"]["total"] == 4.0 - 0.5 * 3.0
