"""Edge devices as a model: seconds and joules of a round from counted FLOPs and bytes.

A client downloads, trains and uploads, one after the other: bits / bandwidth, FLOPs / sustained
rate. Joules are active_watts x compute seconds + idle_watts x transfer seconds; the wait for slower
clients and the server are left out. A round lasts as long as its slowest client.

The profiles are in devices.toml, each number with its source; a user's own file has the same keys.
Nothing here is measured: every key starts with modelled_.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bench.config.load import read_toml
from bench.data.partition import deal_shares
from fedara_core.errors import InputError

BUILT_IN = Path(__file__).with_name("devices.toml")
DEVICES_TAG = 0xDE71CE  # keeps this use of the seed apart from others

Precision = Literal["fp32", "bf16"]
Modelled = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of device. FLOPs per second are sustained ones; fp16 stands for bf16, too."""

    fp32_flops_per_second: float
    fp16_flops_per_second: float
    active_watts: float
    idle_watts: float
    memory_bytes: float
    uplink_mbits_per_second: float
    downlink_mbits_per_second: float

    def client(
        self,
        *,
        flops: int,
        uplink_bytes: int,
        downlink_bytes: int,
        precision: Precision = "fp32",
        speed: float = 1.0,
        peak_memory_bytes: int | None = None,
    ) -> Modelled:
        """One client's round: seconds of its parts and in all, joules, and the share of memory used
        if the peak is known (above 1: it does not fit). speed: factor on this client's FLOPs per
        second."""
        rate = self.fp32_flops_per_second if precision == "fp32" else self.fp16_flops_per_second
        compute = flops / (rate * speed)
        download = 8 * downlink_bytes / (1e6 * self.downlink_mbits_per_second)
        upload = 8 * uplink_bytes / (1e6 * self.uplink_mbits_per_second)
        modelled = {
            "modelled_download_seconds": download,
            "modelled_compute_seconds": compute,
            "modelled_upload_seconds": upload,
            "modelled_seconds": download + compute + upload,
            "modelled_joules": self.active_watts * compute + self.idle_watts * (download + upload),
        }
        if peak_memory_bytes is not None:
            modelled["modelled_memory_share"] = peak_memory_bytes / self.memory_bytes
        return modelled


_NUMBERS = tuple(item.name for item in fields(Device))


def model_round(clients: Mapping[int, Modelled]) -> Modelled:
    """A round, from what `Device.client` gives by client_id: joules are the clients' sum, all else
    is of the slowest client, the modelled_straggler (of equals, the lowest client_id)."""
    straggler = min(clients, key=lambda client: (-clients[client]["modelled_seconds"], client))
    joules = sum(clients[client_id]["modelled_joules"] for client_id in sorted(clients))
    return {**clients[straggler], "modelled_joules": joules, "modelled_straggler": straggler}


def load_devices(own: Path | None = None) -> dict[str, Device]:
    """All devices by name: the built-in ones, and those of a user's own file, which win. Raises
    InputError for an unreadable file, an unknown or missing key, and a number not above 0."""
    tables = read_toml(BUILT_IN, "devices") | (read_toml(own, "devices") if own else {})
    return {name: _device(name, table) for name, table in tables.items()}


def deal(
    devices: Mapping[str, Device], shares: Mapping[str, float], *, num_clients: int, seed: int
) -> list[str]:
    """The name of each client's device, by client_id, drawn from the seed; shares: by device.
    Raises InputError for an unknown device and for shares that do not add up to 1."""
    check_names(shares, devices)
    for name, share in shares.items():
        _check_positive(f"the share of device {name}", share)
    total = sum(shares.values())
    if abs(total - 1) > 1e-6:
        raise InputError(f"the shares of devices add up to {total:g}; allowed: 1")
    generator, names = np.random.default_rng([DEVICES_TAG, seed]), list(shares)
    return [names[i] for i in deal_shares(list(shares.values()), num_clients, generator)]


def check_names(names: Iterable[str], devices: Mapping[str, Device]) -> None:
    """Raise InputError for a device that is unknown."""
    for name in names:
        if name not in devices:
            raise InputError(f"device {name!r} is unknown; allowed: {', '.join(sorted(devices))}")


def _device(name: str, table: Any) -> Device:
    if not isinstance(table, dict):
        raise InputError(f"device {name} = {table!r}; allowed: a table [{name}] of numbers")
    numbers = {key: value for key, value in table.items() if key != "source"}
    for key, value in numbers.items():
        if key not in _NUMBERS:
            allowed = ", ".join((*_NUMBERS, "source"))
            raise InputError(f"device {name}: unknown key {key}; allowed: {allowed}")
        _check_positive(f"device {name}: {key}", value)
    for key in _NUMBERS:
        if key not in numbers:
            raise InputError(f"device {name}: {key} is missing; it has no default")
    return Device(**numbers)


def _check_positive(what: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise InputError(f"{what} = {value!r} is not allowed; allowed: a number above 0")
