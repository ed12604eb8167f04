"""What a run will send, before it runs: the messages of its first rounds, without training."""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from bench.config.load import parse_run
from bench.config.schema import RunConfig
from bench.data.texts import BUILT_IN_SETS, dataset_facts
from bench.metering.meter import Meter
from bench.models.source import BUILT_IN
from bench.run.arrivals import make_fleet
from bench.run.clients import draw_cohort, train_client
from bench.run.exchange import open_exchange
from bench.run.job import Job, build
from fedara_core.comm.base import Communicator
from fedara_core.train import Encoded, LocalTraining


def null_job(config: RunConfig, *, num_classes: int) -> Job:
    """The run's model, method and first state, and clients with examples by number only, that take
    no step."""
    device = torch.device("cpu")
    model, method, state = build(config, num_classes=num_classes, device=device)
    nothing = torch.zeros(0, dtype=torch.int64)
    empty = Encoded(input_ids=nothing[:, None], lengths=nothing, labels=nothing)
    num_clients = config.federation.num_clients
    return Job(
        config=config,
        model=model,
        method=method,
        state=state,
        fleet=make_fleet(config, {}, []),
        training=LocalTraining(**{**config.train.model_dump(), "local_steps": 0}),
        train=empty,
        evaluated=empty,
        shards=[np.arange(10 + client_id % 7) for client_id in range(num_clients)],
        label_counts=np.zeros((num_clients, num_classes), np.int64),
        partition_summary=[],
        digests={},
        labels=[],
        device=device,
    )


def run_bytes(config: RunConfig) -> tuple[int, int] | None:
    """Bytes up and down of all rounds, if those after the first are like round 1. None as for
    `round_bytes`. Raises InputError."""
    first, num_later = round_bytes(config), config.federation.num_rounds - 1
    if first is None or not num_later:
        return first
    later = round_bytes(config, round_index=1)
    assert later is not None
    return first[0] + num_later * later[0], first[1] + num_later * later[1]


def round_bytes(config: RunConfig, round_index: int = 0) -> tuple[int, int] | None:
    """Bytes up and down of round 0 or 1, all clients of its cohort. None where that needs a model
    or data that is not on this machine. Raises InputError."""
    name = config.model.name
    if name not in BUILT_IN and not Path(name).expanduser().is_dir():
        return None
    if config.dataset.name not in BUILT_IN_SETS and not config.dataset.name.startswith("file:"):
        return None
    settings = config.model_dump(mode="json")
    decides = ["method", "adapter", "model", "dataset", "federation", "codec"]
    decides += ["clients", "devices"]  # how many are drawn
    if config.adapter.client_lora_ranks:
        decides.append("seed")  # who has which
    kept = {key: settings[key] for key in decides}
    kept["train"] = {"local_steps": 1}
    return _first_rounds(json.dumps(kept, sort_keys=True))[round_index]


@lru_cache(maxsize=64)
def _first_rounds(settings: str) -> list[tuple[int, int]]:
    """Of rounds 0 and 1. The points of a sweep mostly share what decides this."""
    config = parse_run(json.loads(settings))
    job = null_job(config, num_classes=len(dataset_facts(config.dataset).labels))
    state, sums = job.state, []
    for round_index in range(2):
        sent, _ = job.compression.send_down(state)
        exchange = open_exchange(job, sent, Communicator())
        costs = [
            train_client(job, sent, client_id, Meter(job.device), exchange.add)
            for client_id in draw_cohort(job, round_index)
        ]
        sums.append((sum(c.uplink_bytes for c in costs), sum(c.downlink_bytes for c in costs)))
        exchange.exchange()
        received = exchange.result()
        assert received is not None
        state = job.method.aggregate(sent, received)
    return sums
