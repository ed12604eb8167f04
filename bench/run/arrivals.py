"""Clients that fail a round: dropout, unequal speeds, over-selection, a deadline on modelled time.

A round draws federation.cohort x clients.over_selection clients, rounded up, and sends them the
state. Each vanishes then with probability clients.dropout; the others train and upload. The server
takes the first federation.cohort uploads, and none after clients.deadline_seconds: what comes later
is late, that is sent, counted and thrown away. Without a deadline it waits for all that have not
vanished.

When an upload comes is modelled, never measured, so that the same clients are late on any machine
and any number of processes: seconds of download, local training and upload, from counted FLOPs and
bytes, on the client's device (devices.shares; bench/metering/devices.py). A client's local training
is exp(clients.speed_spread z) times as fast as its device says, z standard normal, the same in all
rounds. A client that vanished or was late is, to method, server and itself, one that was not drawn.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.config.schema import RunConfig
from bench.config.sections import ClientsConfig
from bench.metering.client_cost import ClientCost
from bench.metering.devices import Device, Precision
from fedara_core.comm.base import Communicator
from fedara_core.seeds import derive

SPEEDS_TAG = 0x59EED  # keeps this use of the seed apart from others
_TIME = struct.Struct("<Id")  # client_id, modelled seconds


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """A run's clients: how they fail, and what they train on.

    num_wanted: uploads that end a round. device_of: client_id -> the name of its device; may be
    empty where no time decides. speeds: client_id -> factor on its device's FLOPs a second.
    """

    settings: ClientsConfig
    seed: int
    num_wanted: int
    precision: Precision
    devices: Mapping[str, Device]
    device_of: Sequence[str]
    speeds: Sequence[float]

    def vanishes(self, round_index: int, client_id: int) -> bool:
        """Whether the client, if it is drawn, vanishes in this round."""
        drawn = derive(self.seed, "vanish", round_index, client_id) / 2**63  # uniform on [0, 1)
        return drawn < self.settings.dropout

    def seconds(self, cost: ClientCost) -> float | None:
        """When a client with this cost has sent its upload; None where no time decides."""
        if not self.settings.timed:
            return None
        if cost.flops is None:
            raise RuntimeError(f"client {cost.client_id}: no FLOPs were counted to model its time")
        modelled = self.devices[self.device_of[cost.client_id]].client(
            flops=cost.flops,
            uplink_bytes=cost.uplink_bytes,
            downlink_bytes=cost.downlink_bytes,
            precision=self.precision,
            speed=self.speeds[cost.client_id],
        )
        return modelled["modelled_seconds"]

    def facts(self, client_id: int) -> dict[str, Any]:
        """The client's keys in partition.json."""
        facts: dict[str, Any] = {}
        if self.settings.timed:
            facts["device"] = self.device_of[client_id]
        if self.settings.speed_spread:
            facts["speed"] = self.speeds[client_id]
        return facts


def make_fleet(config: RunConfig, devices: Mapping[str, Device], device_of: Sequence[str]) -> Fleet:
    """The clients of a run. device_of: as in Fleet; devices: by name, at least those."""
    num_clients = config.federation.num_clients
    return Fleet(
        settings=config.clients,
        seed=config.seed,
        num_wanted=config.federation.cohort,
        precision=config.train.precision,
        devices=devices,
        device_of=device_of,
        speeds=draw_speeds(config.clients.speed_spread, num_clients=num_clients, seed=config.seed),
    )


class Arrivals:
    """Who of one round's cohort vanishes, arrives and is late; the same on every process.

    dropped: those that vanish; sending: the others; arrived: of these the ones that come in time,
    as far as `agree` knows. All in client_id order.
    """

    def __init__(self, fleet: Fleet, cohort: Sequence[int], round_index: int) -> None:
        self._fleet = fleet
        self._seconds: dict[int, float] = {}
        self.dropped: list[int] = []
        if fleet.settings.dropout:
            self.dropped = [c for c in cohort if fleet.vanishes(round_index, c)]
        self.sending = sorted(set(cohort).difference(self.dropped))
        self.arrived = [] if fleet.settings.timed else self.sending

    def agree(self, costs: Sequence[ClientCost], communicator: Communicator) -> None:
        """Tell all processes when this one's clients (maybe none) have sent; all call it. Several
        times only where over_selection is 1, since one that comes later may be faster."""
        mine = b"".join(_TIME.pack(cost.client_id, cost.modelled_seconds) for cost in costs)
        for data in communicator.gather_bytes(mine):
            self._seconds |= dict(_TIME.iter_unpack(data))
        deadline = self._fleet.settings.deadline_seconds
        self.arrived = first(self._seconds, self._fleet.num_wanted, deadline)

    @property
    def late(self) -> list[int]:
        return sorted(set(self.sending).difference(self.arrived))

    def record(self, costs: Sequence[ClientCost]) -> dict[str, Any]:
        """The keys of the round's record, those of sums from this process's clients; none where
        clients do not fail."""
        settings, late = self._fleet.settings, set(self.late)
        if settings == ClientsConfig():
            return {}
        keys: dict[str, Any] = {}
        for name in ("arrived", "dropped", "late"):
            keys |= {name: getattr(self, name), f"num_{name}": len(getattr(self, name))}
        keys["late_uplink_bytes"] = sum(c.uplink_bytes for c in costs if c.client_id in late)
        seconds = [self._seconds[client_id] for client_id in self.arrived if settings.timed]
        if settings.deadline_seconds is not None and len(seconds) < self._fleet.num_wanted:
            seconds.append(settings.deadline_seconds)
        return keys | ({"modelled_round_seconds": max(seconds)} if seconds else {})


def first(seconds: Mapping[int, float], num_wanted: int, deadline: float | None) -> list[int]:
    """The num_wanted fastest clients, none beyond the deadline, in client_id order; of equally fast
    ones those with the lowest client_ids."""
    order = sorted(seconds, key=lambda client_id: (seconds[client_id], client_id))[:num_wanted]
    limit = math.inf if deadline is None else deadline
    return sorted(client_id for client_id in order if seconds[client_id] <= limit)


def draw_speeds(spread: float, *, num_clients: int, seed: int) -> list[float]:
    """Each client's speed, by client_id: log-normal with median 1, from the seed."""
    drawn = np.random.default_rng([SPEEDS_TAG, seed]).standard_normal(num_clients)
    return [math.exp(spread * z) for z in drawn.tolist()]
