"""FSLoRA: sketches, their scale, means over unlike sketches by hand, full ones are LoRA, bytes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench.run.clients import draw_cohort
from fedara_core.adapters import LowRank
from fedara_core.comm.base import Communicator
from fedara_core.method import Client
from fedara_core.methods.fslora import sketch
from fedara_core.state import ServerState
from support.in_turn import in_turn
from support.pairs import model_parts, update
from support.rounds import (
    check_bytes_of_own_ranks,
    make_tiny_job,
    play_rounds,
    received,
    train_one_client,
)

ROW_FLOATS = 8 * (32 + 32) + 4 * (64 + 32)  # one row of every adapter of tiny.toml's model
NUM_HEAD = 4 * 32 + 4
FSLORA = ("method.name=fslora", "train.lr=2e-2")
HALF = "adapter.client_lora_ranks=[{lora_rank=2, share=1.0}]"
UNEQUAL = "adapter.client_lora_ranks=[{lora_rank=1, share=0.5}, {lora_rank=4, share=0.5}]"


def mean_sketched_update(state: ServerState, name: str, num_draws: int) -> Tensor:
    """Mean of B S A over rounds and clients that all have two of four triplets."""
    a, b = state.parts["A"][name].double(), state.parts["B"][name].double()
    total = torch.zeros(b.shape[1], a.shape[1], dtype=torch.float64)
    for client_id in range(num_draws):
        kept = sketch(state, client_id % 8)[name]
        total += 2 * b[kept].T @ a[kept]  # r / r_k = 2
        state = replace(state, round_index=state.round_index + 1)
    return total / num_draws


# ---- sketches ----


def test_a_sketch_has_the_clients_number_of_triplets() -> None:
    """Another one for each client, round, adapter and seed; the same one when asked again."""
    state = play_rounds(make_tiny_job(*FSLORA, HALF), num_rounds=1)[-1].after
    one, again, other = sketch(state, 0), sketch(state, 0), sketch(state, 1)
    assert all(int(mask.sum()) == 2 for mask in one.values())
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert len({tuple(mask.tolist()) for mask in one.values()}) > 1
    after = play_rounds(make_tiny_job(*FSLORA, HALF), state, 1)[-1].after
    assert any(not torch.equal(one[name], sketch(after, 0)[name]) for name in one)


def test_every_triplet_is_drawn_equally_often() -> None:
    """The mean of S is I: so the mean of the clients' models is the server's."""
    job = make_tiny_job(*FSLORA, HALF)
    state = play_rounds(job, num_rounds=2)[-1].after
    name = next(iter(state.rank_masks))
    whole = update(state.parts, name, 1.0)
    mean = mean_sketched_update(state, name, 2000)
    assert (mean - whole).norm() < 0.1 * whole.norm()


@pytest.mark.parametrize("client_id", [0, 7])
def test_a_clients_model_is_its_sketch(client_id: int) -> None:
    """W0 + scale r / r_k B[:, kept] A[kept], against the dense weight."""
    job = make_tiny_job(*FSLORA, UNEQUAL, "adapter.lora_alpha=6.0")  # scale 1.5
    state = play_rounds(job, num_rounds=1)[-1].after
    lora_rank = state.adapter.client_lora_ranks[client_id]
    client = Client(client_id=client_id, num_examples=1, model=job.model)
    size = job.method.download(job.model, state, client)
    assert size.num_bytes("fp32") == 24 + 4 * (lora_rank * ROW_FLOATS + NUM_HEAD)
    kept, own = sketch(state, client_id), model_parts(job.model)
    scale = 1.5 * 4 / lora_rank
    for name, adapter in job.model.adapters.items():
        for part in "AB":
            assert torch.equal(own[part][name], state.parts[part][name][kept[name]])
        x = torch.randn(3, adapter.shape[1])
        weight = adapter.base.weight + update(own, name, scale).float()
        torch.testing.assert_close(adapter(x), x @ weight.T + adapter.base.bias)
        assert adapter.form == LowRank(scale=scale)
    job.method.download(job.model, state, None)
    assert {adapter.form for adapter in job.model.adapters.values()} == {LowRank(scale=1.5)}


# ---- the mean ----


def test_what_is_not_in_a_sketch_counts_as_unchanged() -> None:
    """row + sum p_k m_k (row_k - row) for every row, read by hand from the clients' models."""
    job = make_tiny_job(*FSLORA, UNEQUAL)
    state = play_rounds(job, num_rounds=1)[-1].after
    cohort = draw_cohort(job, 1)
    assert len({state.adapter.client_lora_ranks[k] for k in cohort}) == 2
    uploads, expected = [], {p: {n: t.double() for n, t in state.parts[p].items()} for p in "AB"}
    num_examples = sum(len(job.shards[k]) for k in cohort)
    for client_id in cohort:
        uploads.append(train_one_client(job, state, client_id))
        own, kept = model_parts(job.model), sketch(state, client_id)
        for part in "AB":
            for name, rows in own[part].items():
                change = torch.zeros_like(expected[part][name])
                change[kept[name]] = (rows - state.parts[part][name][kept[name]]).double()
                share = len(job.shards[client_id]) / num_examples
                expected[part][name] = expected[part][name] + share * change
    after = job.method.aggregate(state, received(job.method, state, uploads))
    for part in "AB":
        for name, rows in expected[part].items():
            ours = after.parts[part][name].double()
            torch.testing.assert_close(ours, rows, rtol=0, atol=1e-6)
    assert after.adapter == state.adapter


def test_the_number_of_processes_changes_nothing() -> None:
    """With unequal sketches, which the contract tests do not have."""
    words = (*FSLORA, UNEQUAL, "evaluate.every=100", "train.local_steps=1")
    expected = play_rounds(make_tiny_job(*words), num_rounds=2)[-1].after.digest()
    jobs = [make_tiny_job(*words) for _ in range(3)]

    def run(communicator: Communicator) -> str:
        job = jobs[communicator.world_rank]
        return play_rounds(job, None, 2, communicator)[-1].after.digest()

    assert in_turn(3, run) == [expected] * 3


# ---- reduction and bytes ----


def test_full_sketches_are_lora() -> None:
    ours = play_rounds(make_tiny_job(*FSLORA))
    theirs = play_rounds(make_tiny_job("method.name=lora", "train.lr=2e-2"))
    for one, other in zip(ours, theirs, strict=True):
        assert one.row["state_digest"] == other.row["state_digest"]
        assert one.row["uplink_bytes"] == other.row["uplink_bytes"]


def test_bytes_of_a_run() -> None:
    """Up and down r_k rows, and no sketch."""
    job = make_tiny_job(*FSLORA, UNEQUAL, "train.local_steps=1")
    check_bytes_of_own_ranks(job, play_rounds(job))
