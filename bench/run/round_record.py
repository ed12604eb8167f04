"""A round's record from every process's part of it."""

from dataclasses import asdict
from typing import Any

from bench.metering.client_cost import model_devices, reduce_clients
from bench.metering.meter import Measured
from bench.metering.reduce import reduce_energy, reduce_memory, reduce_seconds
from bench.run.job import Job
from fedara_core.comm.base import Communicator, Traffic
from fedara_core.merge.received import Received
from fedara_core.state import ServerState

Row = dict[str, Any]

_TRAFFIC = {  # record key -> field of the communicator's traffic
    "wire_bytes_sent": "sent",
    "wire_bytes_received": "received",
    "network_bytes_sent": "network_sent",
    "network_bytes_received": "network_received",
}
_SUMMED = ("downlink_bytes", "late_uplink_bytes", *_TRAFFIC)


def traffic_since(before: Traffic, now: Traffic) -> dict[str, int]:
    """The record's keys of what this process moved since."""
    return {key: getattr(now, name) - getattr(before, name) for key, name in _TRAFFIC.items()}


def upload_facts(received: Received | None) -> dict[str, Any]:
    """The record's keys of the uploads."""
    if received is None:
        return {"uplink_bytes": 0}
    losses = zip(received.shares, received.headers, strict=True)
    return {
        "train_loss": sum(share * header.train_loss for share, header in losses),
        "uplink_bytes": sum(header.num_bytes for header in received.headers),
    }


def live_facts(state: ServerState) -> dict[str, Any]:
    """The record's keys of what lives."""
    return {
        "live_triplets": state.num_live,
        "live_adapters": sum(count > 0 for count in state.live_triplets.values()),
        "live_triplets_by_adapter": state.live_triplets,
    }


def reduce_row(job: Job, row: Row, measured: Measured, communicator: Communicator) -> Row:
    """The round's record: bytes are sums over processes, seconds and memory maxima."""
    mine = {**row, "clients": [asdict(cost) for cost in row["clients"]]}
    mine["measured"] = asdict(measured)
    parts = communicator.gather_json(mine)
    digests = [part["state_digest"] for part in parts]
    if len(set(digests)) > 1:
        raise RuntimeError(f"processes disagree on the state after a round: {digests}")
    everyone = [Measured(**part["measured"]) for part in parts]
    reduced = {
        **{key: value for key, value in row.items() if key != "clients"},
        **{key: sum(part[key] for part in parts) for key in _SUMMED if key in row},
        **reduce_clients(part["clients"] for part in parts),
        **reduce_seconds([measured.seconds for measured in everyone]),
        **reduce_energy(everyone),
        **reduce_memory([measured.memory for measured in everyone]),
    }
    names, fleet = job.config.devices.names, job.fleet
    return reduced | model_devices(
        reduced, job.devices, names, fleet.device_of, fleet.speeds, fleet.precision
    )
