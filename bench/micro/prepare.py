"""`fedara micro prepare`: seconds and memory of preparing a run, with an empty and a filled cache.

The libraries and the model are loaded once before: what is timed is data, model and first state.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from bench.config.load import parse_run
from bench.config.schema import RunConfig
from bench.data import cache
from bench.metering.memory import proportional_bytes
from bench.micro.record import record_rows
from bench.micro.timing import timed
from bench.models.encoders import build_model
from bench.run.clients import client_batches, load_client, make_client
from bench.run.encoded import load_encoded
from bench.run.job import Job, prepare
from bench.run.runner import keep_freed_memory, set_threads
from fedara_core.comm.base import Communicator
from fedara_core.comm.launch import together
from fedara_core.train import start_client

BENCHMARK = "micro-prepare"
METHOD, BATCH_SIZE = "lora", 16


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is prepared."""

    dataset: str
    model: str
    max_length: int


def run_prepare(settings: Settings, results: Path, communicator: Communicator) -> None:
    """Measure both and record a row of each."""
    keep_freed_memory()
    set_threads(1, communicator)
    config = _config(settings, communicator.world_size)

    def load() -> None:
        build_model(config.model, num_classes=2, seed=config.seed)

    seconds, _ = timed(lambda: together(communicator, load), communicator)
    rows = _rows(config, communicator, max(communicator.gather_json(seconds)))
    first = next(rows)  # so that wrong input leaves no record
    recorded = replace(settings, dataset=config.dataset.recorded_name)
    record_rows(BENCHMARK, recorded, results, communicator, chain([first], rows), _describe)


def _rows(
    config: RunConfig, communicator: Communicator, load_seconds: float
) -> Iterator[dict[str, Any]]:
    """One object for each state of the cache, the same on every process."""
    with _own_cache():
        for state in ("empty", "filled"):
            load_encoded.cache_clear()  # as in a job that starts
            cpu_start = time.process_time()
            seconds, job = timed(lambda: prepare(config, communicator), communicator)
            everyone = communicator.gather_json([seconds, time.process_time() - cpu_start])
            row = {
                "cache": state,
                "dataset": config.dataset.recorded_name,
                "max_length": config.model.max_length,
                "load_seconds": load_seconds,
                "prepare_seconds": max(wall for wall, _ in everyone),
                "cpu_seconds": sum(cpu for _, cpu in everyone),
                **_pss("prepared_pss_bytes", communicator),
            }
            _train_step(job, communicator)
            yield row | _pss("trained_pss_bytes", communicator)


@contextmanager
def _own_cache() -> Iterator[None]:
    """An empty cache in this process's own temporary folder, which goes in the end."""
    before = os.environ.get(cache.FOLDER_KEY)
    with tempfile.TemporaryDirectory() as place:
        os.environ[cache.FOLDER_KEY] = place
        try:
            yield
        finally:
            if before is None:
                del os.environ[cache.FOLDER_KEY]
            else:
                os.environ[cache.FOLDER_KEY] = before


def _pss(key: str, communicator: Communicator) -> dict[str, int]:
    """The sum over processes, all of them there; nothing where the platform does not tell."""
    communicator.barrier()
    everyone = communicator.gather_json(proportional_bytes())
    return {} if None in everyone else {key: sum(everyone)}


def _train_step(job: Job, communicator: Communicator) -> None:
    """One local step of this process's first client."""
    client_id = communicator.world_rank
    load_client(job, job.state, client_id)
    client = make_client(job, client_id)
    start_client(client, job.method, job.training, job.state)
    for batch in client_batches(job, 0, client_id):
        job.method.local_step(client, batch)


def _describe(row: dict[str, Any]) -> str:
    text = f"{row['cache']} cache: {row['prepare_seconds']:.2f} s ({row['cpu_seconds']:.2f} CPU s)"
    if "trained_pss_bytes" in row:
        text += f", {row['trained_pss_bytes'] / 1e6:.0f} MB of all processes after a step"
    return text


def _config(settings: Settings, num_clients: int) -> RunConfig:
    return parse_run(
        {
            "method": {"name": METHOD},
            "model": {"name": settings.model, "max_length": settings.max_length},
            "dataset": {"name": settings.dataset},
            "partition": {"scheme": "iid"},
            "federation": {"num_clients": num_clients, "cohort": num_clients, "num_rounds": 1},
            "train": {"local_steps": 1, "batch_size": BATCH_SIZE, "lr": 1e-3},
            "system": {"device": "cpu", "threads": 1},
        }
    )
