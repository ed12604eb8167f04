"""Seconds of calls and of rounds, the same on every process: each iteration's slowest one."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from bench.metering.meter import Measured, Meter
from bench.run.job import Job
from bench.run.rounds import advance
from fedara_core.comm.base import Communicator
from fedara_core.schema import PHASES

T = TypeVar("T")


def timed(call: Callable[[], T], communicator: Communicator) -> tuple[float, T]:
    """Seconds of this process, from when all are there; and what the call returned."""
    communicator.barrier()
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def time_rounds(
    job: Job,
    communicator: Communicator,
    number: int,
    warm_up: int,
    between: Callable[[], object] = lambda: None,
) -> tuple[list[float], list[Measured], dict[str, Any]]:
    """Rounds without evaluation: seconds of this process and the meter's measurements, without
    those of the first warm_up rounds; and the last one's record. between: follows each round."""
    meter, state = Meter(job.device), job.state
    seconds, measured, row = [], [], dict[str, Any]()
    for _ in range(warm_up + number):
        communicator.barrier()
        meter.take()
        start = time.perf_counter()
        state, row = advance(job, state, communicator, meter)
        seconds.append(time.perf_counter() - start)
        measured.append(meter.take())
        between()
    return seconds[warm_up:], measured[warm_up:], row


def phase_seconds(measured: Sequence[Measured], communicator: Communicator) -> dict[str, float]:
    """Median over rounds by phase, maximum over processes."""
    medians = [statistics.median(m.seconds.get(phase, 0.0) for m in measured) for phase in PHASES]
    longest = zip(PHASES, slowest(medians, communicator).tolist(), strict=True)
    return {phase: round(seconds, 6) for phase, seconds in longest if seconds}


def slowest(seconds: list[float], communicator: Communicator) -> np.ndarray:
    """Each iteration's maximum over processes: (iterations,) float64."""
    everyone = communicator.gather_bytes(np.array(seconds).tobytes())
    longest: np.ndarray = np.stack([np.frombuffer(part) for part in everyone]).max(axis=0)
    return longest


def against_bare_loop(seconds: Sequence[float], bare_seconds: Sequence[float]) -> dict[str, Any]:
    """The keys of a row that say how long both sides of a comparison took, which took turns."""
    ratios = [own / bare for own, bare in zip(seconds, bare_seconds, strict=True)]
    return {
        **quantiles(np.array(seconds)),
        "bare_loop_median_seconds": statistics.median(bare_seconds),
        "ratio_to_bare_loop": statistics.median(ratios),
        "pair_ratios": [float(f"{ratio:.6g}") for ratio in ratios],
    }


def quantiles(seconds: np.ndarray) -> dict[str, Any]:
    """The keys of a row that say how long its iterations took."""
    return {
        "median_seconds": float(np.median(seconds)),
        "min_seconds": float(seconds.min()),
        "p95_seconds": float(np.quantile(seconds, 0.95)),
        "iteration_seconds": [float(f"{value:.6g}") for value in seconds],
    }
