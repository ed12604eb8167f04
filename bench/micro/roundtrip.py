"""`fedara micro roundtrip`: rounds without training, real payloads.

A round is the suite's own; its clients train no step. The same run times the bare loop `average`
in one process, with messages and without, and the library's bare allgather of as many bytes.
"""

import gc
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.config.load import parse_run
from bench.metering.meter import Measured
from bench.micro.bare import average, bare_allgather
from bench.micro.record import record_rows
from bench.micro.timing import phase_seconds, quantiles, slowest, time_rounds, timed
from bench.run.clients import place
from bench.run.job import Job
from bench.run.runner import keep_freed_memory, set_threads
from bench.tools.estimate import null_job
from fedara_core.comm.base import Communicator
from fedara_core.errors import InputError
from fedara_core.method import load_method

BENCHMARK = "micro-roundtrip"
NUM_CLASSES = 20  # with lora_rank 12 on MiniLM LoRA trains 505,364 floats
_WARM_UP = 3
_BESIDE = "beside_messages_"  # the suite's rounds that take turns with the bare loop with messages
_LONG_SCHEDULE = 1000  # rounds; no schedule prunes within the first twentieth
_MOST_ROUNDS = _LONG_SCHEDULE // 20


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The axes, and how many rounds of each combination are timed."""

    clients: tuple[int, ...]
    methods: tuple[str, ...]
    paths: tuple[str, ...]
    codecs: tuple[str, ...]
    model: str
    lora_rank: int
    rounds: int


def run_roundtrip(settings: Settings, results: Path, communicator: Communicator) -> None:
    """Measure every combination and record them."""
    if not 1 <= settings.rounds <= _MOST_ROUNDS:
        raise InputError(f"--rounds {settings.rounds}: allowed: 1 to {_MOST_ROUNDS}")
    set_threads(1, communicator)
    keep_freed_memory()
    rows = _rows(settings, communicator)
    record_rows(BENCHMARK, settings, results, communicator, rows, _describe)


def _rows(settings: Settings, communicator: Communicator) -> Iterator[dict[str, Any]]:
    """One object per combination, the same on every process."""
    axes = (settings.methods, settings.clients, settings.paths, settings.codecs)
    for method, num_clients, path, codec in itertools.product(*axes):
        if load_method(method).combine == "gather" and path != "allgather":
            continue  # no sum will do
        gc.collect()  # or the last combination would count in this one's peak
        job = _make_job(method, num_clients, path, codec, settings)
        measured = _measure(job, settings.rounds, communicator)
        del job
        found = {"method": method, "num_clients": num_clients, "path": path, "codec": codec}
        yield {**found, **measured}


def _make_job(method: str, num_clients: int, path: str, codec: str, settings: Settings) -> Job:
    """A job whose clients have examples by number only, and take no step."""
    everyone = {"num_clients": num_clients, "cohort": num_clients}
    config = parse_run(
        {
            "method": {"name": method},
            "model": {"name": settings.model},
            "adapter": {"lora_rank": settings.lora_rank, "lora_alpha": float(settings.lora_rank)},
            "federation": {**everyone, "num_rounds": _LONG_SCHEDULE, "merge_path": path},
            "codec": {"up": codec},
            "train": {"local_steps": 1},
        }
    )
    return null_job(config, num_classes=NUM_CLASSES)


def _measure(job: Job, rounds: int, communicator: Communicator) -> dict[str, Any]:
    """The record's keys, the same on every process.

    Rounds turn about with the bare loop, then as many with the loop with messages; allgathers
    follow. Memory and phases are those of the first rounds, before there are buffers for an
    allgather.
    """
    num_clients = len(job.shards)
    job.method.download(job.model, job.state, None)
    trained = [p for p in job.model.module.parameters() if p.requires_grad]
    parameters = [parameter.detach().clone() for parameter in trained]
    own: dict[str, list[float]] = {}
    own[""], own["bare_loop_"], measured, row = _turn_about(parameters, job, rounds, communicator)
    own[_BESIDE], own["bare_messages_"], _, _ = _turn_about(
        parameters, job, rounds, communicator, messages=True
    )
    # As many bytes as the process with most clients sends, by a round's mean message.
    most_clients = max(map(len, place(job, range(num_clients), communicator.world_size)))
    num_bytes = int(row["uplink_bytes"] / num_clients * most_clients)
    bare_call = bare_allgather(torch.zeros(num_bytes, dtype=torch.uint8), communicator)
    if bare_call is not None:
        calls = [timed(bare_call, communicator)[0] for _ in range(1 + rounds)]
        own["bare_allgather_"] = calls[1:]
    longest = {prefix: slowest(seconds, communicator) for prefix, seconds in own.items()}
    median = float(np.median(longest[""]))
    downlink_bytes = sum(communicator.gather_json(row["downlink_bytes"]))
    peaks = communicator.gather_json(measured[-1].memory.get("peak_memory_bytes"))
    known_peaks = [peak for peak in peaks if peak is not None]  # not every platform has a counter
    return {
        **quantiles(longest[""]),
        **{
            f"{prefix}median_seconds": float(np.median(seconds))
            for prefix, seconds in longest.items()
            if prefix.startswith("bare_")
        },
        "ratio_to_bare_loop": float(np.median(longest[""] / longest["bare_loop_"])),
        "ratio_to_bare_messages": float(np.median(longest[_BESIDE] / longest["bare_messages_"])),
        "rounds_per_second": 1 / median,
        "messages_per_second": num_clients / median,
        "seconds_per_client": median / num_clients,
        "uplink_bytes_per_client": row["uplink_bytes"] / num_clients,
        "downlink_bytes_per_client": downlink_bytes / num_clients,
        "wire_bytes_sent": sum(communicator.gather_json(row["wire_bytes_sent"])),
        **({"peak_memory_bytes": max(known_peaks)} if known_peaks else {}),
        "phase_seconds": phase_seconds(measured, communicator),
    }


def _turn_about(
    parameters: list[Tensor],
    job: Job,
    rounds: int,
    communicator: Communicator,
    *,
    messages: bool = False,
) -> tuple[list[float], list[float], list[Measured], dict[str, Any]]:
    """`time_rounds`, with the seconds of the bare loop after each round: those of world_rank 0,
    while the others wait, and next to nothing elsewhere."""
    bare_seconds = []
    weights = [len(shard) for shard in job.shards]

    def run_loop() -> None:
        communicator.barrier()
        mean = [parameter.clone() for parameter in parameters]
        start = time.perf_counter()
        if communicator.world_rank == 0:
            average(parameters, mean, weights, messages=messages)
        bare_seconds.append(time.perf_counter() - start)

    # First rounds fault their pages in.
    seconds, measured, row = time_rounds(job, communicator, rounds, _WARM_UP, run_loop)
    return seconds, bare_seconds[_WARM_UP:], measured, row


def _describe(row: dict[str, Any]) -> str:
    return (
        f"{row['method']}, {row['num_clients']} clients, {row['path']}, {row['codec']}: "
        f"{1e3 * row['median_seconds']:.2f} ms a round, "
        f"{row['messages_per_second']:.0f} messages/s, bare loop "
        f"{1e3 * row['bare_loop_median_seconds']:.2f} ms, with messages "
        f"{1e3 * row['bare_messages_median_seconds']:.2f} ms"
    )
