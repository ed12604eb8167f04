"""Jobs of tests/tiny.toml and their federated rounds, in memory and without files."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.config.load import load_runs
from bench.metering.meter import Meter
from bench.models.encoders import build_model
from bench.run import clients
from bench.run.job import Job, prepare
from bench.run.rounds import one_round
from fedara_core.comm.base import Communicator
from fedara_core.merge.masked import MaskedAveraging
from fedara_core.merge.mean import Averaging
from fedara_core.merge.received import Received
from fedara_core.method import Method
from fedara_core.state import ServerState
from fedara_core.wire import Upload
from support.launch import TINY

# Of tiny.toml's model: floats of one row of every adapter, and of the head.
ROW_FLOATS, NUM_HEAD = 8 * (32 + 32) + 4 * (64 + 32), 4 * 32 + 4


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
    clients.train_client(job, state, client_id, Meter(job.device), sent.append)
    return sent[0]


def logits_at_start(job: Job) -> tuple[Tensor, Tensor]:
    """Logits of eight texts: of the plain model, and of the one with the state before round 0."""
    batch = job.train.batch(torch.arange(8), job.device)
    plain = build_model(job.config.model, num_classes=4, seed=job.config.seed).model.eval()
    job.method.download(job.model, job.state, None)
    job.model.module.eval()
    with torch.no_grad():
        before = plain(batch["input_ids"], batch["attention_mask"])
        after = job.model.module(batch["input_ids"], batch["attention_mask"])
    return before, after


def check_bytes_of_own_ranks(job: Job, rounds: Sequence[Round]) -> None:
    """Up and down r_k rows of each client and the head; in round 0 nothing down."""
    ranks = job.state.adapter.client_lora_ranks
    for played in rounds:
        num_rows = sum(ranks[client_id] for client_id in played.row["cohort"])
        expected = 5 * (24 + 4 * NUM_HEAD) + 4 * num_rows * ROW_FLOATS
        assert played.row["uplink_bytes"] == expected
        assert played.row["downlink_bytes"] == (expected if played.row["round_index"] else 5 * 24)


def received(
    method: Method, state: ServerState, uploads: Sequence[Upload], path: str | None = None
) -> Received:
    """What the server gets of these uploads: all of them where the method allows, else their sum.

    path: sum them by this merge path, one upload a chunk where chunks are allowed.
    """
    if path is None and method.combine != "masked":
        return Received.of(uploads)
    communicator = Communicator()
    if method.combine == "masked":
        sent_bits = partial(method.sent_bits, state)
        row_weight = partial(method.row_weight, state)
        masked = MaskedAveraging(
            communicator, path or "allgather", state.index, sent_bits, row_weight
        )
        for upload in uploads:
            masked.add(upload)
        masked.exchange()
        result = masked.result()
    else:
        running = Averaging(communicator, path or "allgather")
        for upload in uploads:
            running.add(upload)
            running.exchange()
        result = running.result()
    assert result is not None
    return result
