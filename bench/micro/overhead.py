"""`fedara micro overhead`: a round of the suite against a bare PyTorch loop of the same steps.

Both train LoRA in one process, on the same batches, turn about. The suite's round includes packing,
unpacking, the record and the checkpoint; evaluation is left out.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench.config.load import parse_run
from bench.config.schema import RunConfig
from bench.micro.bare import add_lora, train_round
from bench.micro.record import record_rows
from bench.micro.timing import against_bare_loop
from bench.models.encoders import build_model
from bench.run.clients import client_batches, draw_cohort
from bench.run.job import Job, prepare
from bench.run.record import Recorder
from bench.run.rounds import run
from bench.run.runner import set_threads
from fedara_core.comm.base import Communicator
from fedara_core.method import Batch

BENCHMARK = "micro-overhead"
METHOD = "lora"
NUM_CLIENTS, COHORT, LOCAL_STEPS = 20, 5, 5


@dataclass(frozen=True, kw_only=True)
class Settings:
    """repeats: pairs of rounds, one of the suite and one of the bare loop."""

    repeats: int
    model: str
    max_length: int


class Pair(NamedTuple):
    """Seconds of one round: the suite's, the bare loop's, and what measuring takes of the first."""

    suite: float
    bare: float
    meter: float


def run_overhead(settings: Settings, results: Path, communicator: Communicator) -> None:
    """Measure the pairs and record them as one row."""
    set_threads(1, communicator)
    job = prepare(_config(settings), communicator)  # first, so that wrong input leaves no record
    rows = _rows(job, settings, communicator)
    record_rows(BENCHMARK, settings, results, communicator, rows, describe)


def _rows(job: Job, settings: Settings, communicator: Communicator) -> Iterator[dict[str, Any]]:
    batches = [list(client_batches(job, 0, client_id)) for client_id in draw_cohort(job, 0)]
    _bare_round(job, batches[:1])  # warm up allocator and kernels
    pairs = []
    for repeat in range(settings.repeats):
        if repeat % 2:
            bare = _bare_round(job, batches)
        suite, meter = _suite_round(job, communicator)
        if not repeat % 2:
            bare = _bare_round(job, batches)
        pairs.append(Pair(suite, bare, meter))
    axes = {"method": METHOD, "num_clients": COHORT, "local_steps": LOCAL_STEPS}
    yield {**axes, "max_length": settings.max_length, **summarize(pairs)}


def summarize(pairs: Sequence[Pair]) -> dict[str, Any]:
    """The keys of the row that say how long both sides took."""
    return {
        **against_bare_loop([pair.suite for pair in pairs], [pair.bare for pair in pairs]),
        "meter_share": statistics.median(pair.meter / pair.suite for pair in pairs),
    }


def describe(row: dict[str, Any]) -> str:
    ratios = row["pair_ratios"]
    return (
        f"suite {row['median_seconds']:.3f} s (metering {100 * row['meter_share']:.2f} % of it), "
        f"bare loop {row['bare_loop_median_seconds']:.3f} s a round "
        f"({row['num_clients']} clients x {row['local_steps']} steps); "
        f"ratio: median {row['ratio_to_bare_loop']:.3f}, "
        f"{min(ratios):.3f} to {max(ratios):.3f} over {len(ratios)} pairs"
    )


def _config(settings: Settings) -> RunConfig:
    return parse_run(
        {
            "method": {"name": METHOD},
            "model": {"name": settings.model, "max_length": settings.max_length},
            "dataset": {"name": "docstrings", "validation_fraction": 0.01},
            "partition": {"scheme": "iid"},
            "federation": {"num_clients": NUM_CLIENTS, "cohort": COHORT, "num_rounds": 1},
            "train": {"local_steps": LOCAL_STEPS, "lr": 1e-3},
            "evaluate": {"split": "validation"},
            "system": {"device": "cpu", "threads": 1},
        }
    )


def _suite_round(job: Job, communicator: Communicator) -> tuple[float, float]:
    """Seconds of the round, and those of its phase "meter"."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run(job, communicator, Recorder(Path(folder), job.config), rows.append)
        seconds = time.perf_counter() - start
    return seconds - rows[0]["seconds"]["evaluate"], rows[0]["seconds"]["meter"]


def _bare_round(job: Job, cohort: list[list[Batch]]) -> float:
    """Seconds of the bare loop on a model of its own."""
    config = job.config
    model = build_model(config.model, num_classes=len(job.labels), seed=config.seed).model
    trained = add_lora(model, config.adapter.lora_rank)
    start_values = [parameter.detach().clone() for parameter in trained]
    model.train()
    start = time.perf_counter()
    train_round(model, trained, start_values, cohort, config.train.lr)
    return time.perf_counter() - start
