"""Shared fixtures: one thread, no network, tiny jobs, and federated rounds in memory."""

import os
import re

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.config.load import load_runs
from bench.metering.meter import Meter
from bench.run import rounds
from bench.run.rounds import Job, one_round, prepare
from fedara_core.comm.comm import Communicator
from fedara_core.method import ServerState
from fedara_core.wire import Upload

torch.set_num_threads(1)

TINY = Path(__file__).with_name("tiny.toml")


@pytest.hookimpl(optionalhook=True)  # xdist's
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Which tests one worker runs one after another (-n 2).

    Those of one file, that they make its fixtures once; and of all files that launch jobs, for
    which two jobs at a time are too many processes.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = config.rootpath / nodeid.partition("::")[0]
            return "jobs" if _launches_jobs(file) else file.stem

    return ByFile(config, log)


@cache
def _launches_jobs(file: Path) -> bool:
    return bool(re.search(r"import .*\b(launch|Launched|checked|environment)\b", file.read_text()))


@dataclass(frozen=True, kw_only=True)
class Round:
    """One played round: the states around it and its record."""

    before: ServerState
    after: ServerState
    row: dict[str, Any]


def make_tiny_job(*overrides: str) -> Job:
    """A fresh job of tests/tiny.toml with `section.key=value` overrides."""
    (config,) = load_runs(TINY, list(overrides))
    return prepare(config, Communicator())


def play_rounds(
    job: Job,
    state: ServerState | None = None,
    num_rounds: int | None = None,
    communicator: Communicator | None = None,
) -> list[Round]:
    """Rounds from `state` (by default the first), all that are left or `num_rounds`; no files."""
    state = job.state if state is None else state
    last = state.num_rounds if num_rounds is None else state.round_index + num_rounds
    meter = Meter(job.device)
    played = []
    while state.round_index < last:
        after, row = one_round(job, state, communicator or Communicator(), meter)
        played.append(Round(before=state, after=after, row=row))
        state = after
    return played


def train_one_client(job: Job, state: ServerState, client_id: int) -> Upload:
    """What one client uploads in the state's round, before it is packed."""
    sent: list[Upload] = []
    rounds.train_client(job, state, client_id, Meter(job.device), sent.append)
    return sent[0]


@pytest.fixture(scope="session")
def tiny_job() -> Callable[..., Job]:
    """tiny_job(*overrides) -> Job"""
    return make_tiny_job


@pytest.fixture(scope="session")
def play() -> Callable[..., list[Round]]:
    """play(job, state=None, num_rounds=None, communicator=None) -> list[Round]"""
    return play_rounds


@pytest.fixture(scope="session")
def train_client() -> Callable[..., Upload]:
    """train_client(job, state, client_id) -> Upload"""
    return train_one_client
