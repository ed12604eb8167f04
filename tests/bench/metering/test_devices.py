"""Modelled devices: arithmetic by hand, stragglers, dealing, sources, and wrong files."""

import tomllib
from collections import Counter
from pathlib import Path

import pytest

from bench.metering.devices import BUILT_IN, Device, deal, load_devices, model_round
from fedara_core.errors import InputError

PHONE = Device(
    fp32_flops_per_second=2e9,
    fp16_flops_per_second=8e9,
    active_watts=5.0,
    idle_watts=1.0,
    memory_bytes=4e9,
    uplink_mbits_per_second=10.0,
    downlink_mbits_per_second=40.0,
)
OWN = """
[phone]
fp32_flops_per_second = 2e9
fp16_flops_per_second = 8_000_000_000
active_watts = 5
idle_watts = 1.0
memory_bytes = 4_000_000_000
uplink_mbits_per_second = 10
downlink_mbits_per_second = 40
"""


def test_a_client_by_hand() -> None:
    """6 GFLOP at 2 GFLOP/s; 5 MB up at 10 Mbit/s and 10 MB down at 40 Mbit/s."""
    modelled = PHONE.client(flops=6 * 10**9, uplink_bytes=5 * 10**6, downlink_bytes=10**7)
    assert modelled == {
        "modelled_download_seconds": pytest.approx(2.0),
        "modelled_compute_seconds": pytest.approx(3.0),
        "modelled_upload_seconds": pytest.approx(4.0),
        "modelled_seconds": pytest.approx(9.0),
        "modelled_joules": pytest.approx(5 * 3 + 1 * (2 + 4)),
    }
    big = PHONE.client(flops=0, uplink_bytes=0, downlink_bytes=0, peak_memory_bytes=6 * 10**9)
    assert big["modelled_memory_share"] == pytest.approx(1.5)
    half = PHONE.client(flops=6 * 10**9, uplink_bytes=0, downlink_bytes=0, precision="bf16")
    assert half["modelled_seconds"] == half["modelled_compute_seconds"] == pytest.approx(0.75)


def test_a_round_lasts_as_long_as_its_slowest_client() -> None:
    clients = {
        client_id: PHONE.client(flops=flops, uplink_bytes=1250, downlink_bytes=0)
        for client_id, flops in {9: 10**9, 4: 4 * 10**9, 7: 4 * 10**9, 1: 2 * 10**9}.items()
    }
    modelled = model_round(clients)
    assert modelled["modelled_straggler"] == 4
    assert modelled["modelled_seconds"] == max(c["modelled_seconds"] for c in clients.values())
    assert modelled["modelled_compute_seconds"] == pytest.approx(2.0)
    assert modelled["modelled_joules"] == pytest.approx(5 * 11 / 2 + 4 * 0.001)
    assert all(key.startswith("modelled_") for key in modelled)


def test_every_built_in_number_has_a_source_in_one_line() -> None:
    tables = tomllib.loads(BUILT_IN.read_text(encoding="utf-8"))
    assert set(tables) == {"agx_orin", "orin_nano", "raspberry_pi_5"} == set(load_devices())
    for table in tables.values():
        source = table.pop("source")
        assert source.keys() == table.keys()
        assert all(len(text) > 5 and "\n" not in text for text in source.values())


def test_built_in_devices_are_ordered_as_their_kinds_are() -> None:
    devices = load_devices()
    clients = [
        devices[name].client(flops=10**12, uplink_bytes=10**6, downlink_bytes=10**6)
        for name in ("agx_orin", "orin_nano", "raspberry_pi_5")
    ]
    seconds = [client["modelled_seconds"] for client in clients]
    assert seconds == sorted(seconds)
    for device in devices.values():
        assert device.idle_watts < device.active_watts
        assert device.fp32_flops_per_second <= device.fp16_flops_per_second


def test_a_file_of_ones_own_adds_devices_and_replaces_built_in_ones(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(OWN + OWN.replace("[phone]", "[orin_nano]"))
    devices = load_devices(path)
    assert devices["phone"] == devices["orin_nano"] == PHONE
    assert devices["agx_orin"] == load_devices()["agx_orin"]


def test_devices_are_dealt_by_the_seed_in_their_shares() -> None:
    shares = {"agx_orin": 0.25, "raspberry_pi_5": 0.5, "orin_nano": 0.25}
    dealt = deal(load_devices(), shares, num_clients=20, seed=3)
    assert Counter(dealt) == {"agx_orin": 5, "raspberry_pi_5": 10, "orin_nano": 5}
    assert dealt == deal(load_devices(), shares, num_clients=20, seed=3)
    assert dealt != deal(load_devices(), shares, num_clients=20, seed=4)
    assert deal(load_devices(), {"orin_nano": 1.0}, num_clients=2, seed=0) == ["orin_nano"] * 2
    assert len(deal(load_devices(), {name: 1 / 3 for name in shares}, num_clients=7, seed=0)) == 7


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"toaster": 1.0}, "device 'toaster' is unknown; allowed: agx_orin, orin_nano, raspb"),
        ({"agx_orin": 0.5}, "the shares of devices add up to 0.5; allowed: 1"),
        ({}, "the shares of devices add up to 0; allowed: 1"),
        (
            {"agx_orin": 0.0, "orin_nano": 1.0},
            "share of device agx_orin = 0.0 .*: a number above 0",
        ),
    ],
)
def test_wrong_shares_are_refused(shares: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        deal(load_devices(), shares, num_clients=4, seed=0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "active_watts = 5",
            "active_watts = 0",
            "phone: active_watts = 0 is not allowed; allowed: a",
        ),
        ("active_watts = 5", "active_watts = -1.5", "phone: active_watts = -1.5 is not allowed"),
        (
            "active_watts = 5",
            "active_watts = 'much'",
            "phone: active_watts = 'much' is not allowed",
        ),
        ("active_watts = 5", "active_watts = true", "phone: active_watts = True is not allowed"),
        ("active_watts = 5", "active_watts = inf", "phone: active_watts = inf is not allowed"),
        ("active_watts = 5", "", "phone: active_watts is missing; it has no default"),
        (
            "active_watts",
            "watts",
            "phone: unknown key watts; allowed: fp32_flops_per_second, .*sour",
        ),
        (
            "[phone]",
            "phone = 1\n[other]",
            r"device phone = 1; allowed: a table \[phone\] of numbers",
        ),
        ("[phone]", "[phone", "is not valid TOML .*; allowed: a readable TOML file"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "own.toml"
    path.write_text(OWN.replace(old, new))
    with pytest.raises(InputError, match=message) as raised:
        load_devices(path)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.toml cannot be read .*; allowed: a readable TOML"):
        load_devices(tmp_path / "none.toml")
