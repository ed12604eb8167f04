"""`fedara micro scaling`: seconds of whole rounds against the number of processes.

Strong scaling: the same cohort on any number of processes; ideally P processes take a P-th of the
time. Weak scaling: the same number of clients on each process; ideally the time stays. A launch
measures its own number of processes; launches of several numbers make the figure.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.config.load import parse_run
from bench.config.schema import RunConfig
from bench.micro.record import record_rows
from bench.micro.timing import phase_seconds, quantiles, slowest, time_rounds
from bench.run.job import prepare
from bench.run.runner import set_threads
from fedara_core.comm.base import Communicator
from fedara_core.errors import InputError

BENCHMARK = "micro-scaling"
_WARM_UP = 1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """cohort: clients of a round of strong scaling; clients_per_process: of weak scaling; 0: not
    measured. rounds: timed ones of each."""

    cohort: int
    clients_per_process: int
    methods: tuple[str, ...]
    model: str
    max_length: int
    local_steps: int
    rounds: int


def run_scaling(settings: Settings, results: Path, communicator: Communicator) -> None:
    """Measure both kinds and record them."""
    if not settings.cohort and not settings.clients_per_process:
        raise InputError("--cohort 0 --clients-per-process 0: allowed: one of them above 0")
    set_threads(1, communicator)
    rows = _rows(settings, communicator)
    record_rows(BENCHMARK, settings, results, communicator, rows, _describe)


def _describe(row: dict[str, Any]) -> str:
    what = f"{row['method']}, {row['scaling']} scaling, {row['cohort']} clients"
    return f"{what}: {row['median_seconds']:.3f} s a round"


def _rows(settings: Settings, communicator: Communicator) -> Iterator[dict[str, Any]]:
    """One object per kind of scaling, the same on every process."""
    weak = settings.clients_per_process * communicator.world_size
    for method in settings.methods:
        for scaling, cohort in (("strong", settings.cohort), ("weak", weak)):
            if cohort:
                axes = {"scaling": scaling, "method": method, "cohort": cohort}
                yield axes | _measure(_config(settings, method, cohort), settings, communicator)


def _measure(config: RunConfig, settings: Settings, communicator: Communicator) -> dict[str, Any]:
    """Seconds of a round without evaluation, the maximum over processes; phases likewise."""
    job = prepare(config, communicator)
    seconds, measured, _ = time_rounds(job, communicator, settings.rounds, _WARM_UP)
    return {
        **quantiles(slowest(seconds, communicator)),
        "phase_seconds": phase_seconds(measured, communicator),
    }


def _config(settings: Settings, method: str, cohort: int) -> RunConfig:
    """All clients of a round have as much to do, so that the shares can be equal."""
    num_rounds = 20 * (_WARM_UP + settings.rounds)  # no schedule prunes that early
    return parse_run(
        {
            "method": {"name": method},
            "model": {"name": settings.model, "max_length": settings.max_length},
            "dataset": {"name": "toy" if settings.model == "tiny" else "docstrings"},
            "partition": {"scheme": "iid"},
            "federation": {"num_clients": cohort, "cohort": cohort, "num_rounds": num_rounds},
            "train": {"local_steps": settings.local_steps, "lr": 1e-3},
            "system": {"device": "cpu", "threads": 1},
        }
    )
