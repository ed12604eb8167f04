"""RoLoRA: which half trains and travels when, exact averaging, LoRA with one half held still."""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch

from bench.run.arrivals import Fleet
from bench.run.clients import draw_cohort
from fedara_core.method import Method, load_method
from fedara_core.state import relaid
from support.pairs import model_parts, update
from support.rounds import make_tiny_job, play_rounds, received, train_one_client

# Not square, so that A and B differ in size: d_out, d_in of the four adapters; lora_rank 4.
TARGETS = "adapter.targets=['query', 'intermediate.dense']"
NUM_A = 4 * (2 * 32 + 2 * 32)
NUM_B = 4 * (2 * 32 + 2 * 64)
NUM_HEAD = 4 * 32 + 4
ROLORA = ("method.name=rolora", TARGETS, "adapter.lora_alpha=8.0", "train.local_steps=2")


def test_b_trains_in_even_rounds_and_a_in_odd_ones() -> None:
    job = make_tiny_job(*ROLORA)
    state = job.state
    for round_index in range(4):
        (played,) = play_rounds(job, state, 1)
        job.method.download(job.model, state, None)
        before, after = state.parts, played.after.parts
        for name, adapter in job.model.adapters.items():
            moved = {part: not torch.equal(before[part][name], after[part][name]) for part in "AB"}
            assert moved == {"A": round_index % 2 == 1, "B": round_index % 2 == 0}
            assert {part: p.requires_grad for part, p in adapter.parts.items()} == moved
        state = played.after


@pytest.mark.parametrize("num_rounds", [2, 3])
def test_the_server_gets_the_mean_update(num_rounds: int) -> None:
    """sum_k p_k scale B_k A_k from the clients' own models, in a B round and in an A round."""
    job = make_tiny_job(*ROLORA, "train.lr=0.05")
    state = play_rounds(job, num_rounds=num_rounds)[-1].after
    uploads, models = [], []
    for client_id in draw_cohort(job, state.round_index):
        uploads.append(train_one_client(job, state, client_id))
        models.append(model_parts(job.model))
    num_examples = [upload.num_examples for upload in uploads]
    assert len(set(num_examples)) > 1
    after = job.method.aggregate(state, received(job.method, state, uploads))
    for adapter in job.state.adapter.shapes:
        mean = sum(
            n / sum(num_examples) * update(parts, adapter, 2.0)
            for n, parts in zip(num_examples, models, strict=True)
        )
        ours = update(after.parts, adapter, 2.0)
        assert (ours - update(state.parts, adapter, 2.0)).abs().max() > 1e-2
        torch.testing.assert_close(ours, mean, rtol=0, atol=1e-5)


def still(part: str) -> Method:
    """LoRA whose A or B has a learning rate of 0."""
    lora: Any = load_method("lora")

    @dataclass(frozen=True, kw_only=True)
    class Still(lora):  # type: ignore[misc]
        def lr_factor(self, moving: str) -> float:
            return 0.0 if moving == part else 1.0

    return Still()  # type: ignore[no-any-return]


def test_it_is_lora_whose_other_half_does_not_move() -> None:
    """Without clipping, where the other half's gradient would count, to the last bit."""
    common = (*ROLORA, "train.max_grad_norm=1e9", "train.weight_decay=0.1")
    lora = make_tiny_job(*common, "method.name=lora")
    job = make_tiny_job(*common)
    for played, part in zip(play_rounds(job, num_rounds=4), "ABAB", strict=True):
        before = relaid(played.before, lora.method.form(lora.state))  # both halves train
        (theirs,) = play_rounds(replace(lora, method=still(part)), before, 1)
        assert theirs.row["train_loss"] == played.row["train_loss"]
        after = relaid(theirs.after, job.method.form(theirs.after))
        assert after.digest() == played.row["state_digest"]


def test_bytes_where_all_take_part() -> None:
    """Up: B, A, B, A. Down: nothing at first, then what the round before trained."""
    job = make_tiny_job(*ROLORA, "federation.cohort=8")
    rounds = play_rounds(job, num_rounds=4)
    up, down = (NUM_B, NUM_A, NUM_B, NUM_A), (0, NUM_B, NUM_A, NUM_B)
    for played, num_up, num_down in zip(rounds, up, down, strict=True):
        assert played.row["uplink_bytes"] == 8 * (24 + 4 * (num_up + NUM_HEAD))
        num_head = NUM_HEAD if num_down else 0
        assert played.row["downlink_bytes"] == 8 * (24 + 4 * (num_down + num_head))


def test_who_missed_a_round_downloads_both_halves() -> None:
    rounds = play_rounds(make_tiny_job(*ROLORA))
    cohorts: list[set[int]] = [set()]
    kinds = set()
    for played in rounds:
        last, changed = cohorts[-1], NUM_A if len(cohorts) % 2 else NUM_B
        cohorts.append(set(played.row["cohort"]))
        back = cohorts[-1] & last
        new = cohorts[-1] - set().union(*cohorts[:-1])
        kinds |= {"back"} if back else set()
        kinds |= {"new"} if new and len(cohorts) > 2 else set()
        kinds |= {"late"} if cohorts[-1] - back - new else set()
        # In round 0 the seed gives everything, in round 1 it still gives A.
        both = NUM_A + NUM_B if played.row["round_index"] > 1 else NUM_B
        values = len(back) * (changed + NUM_HEAD) + (5 - len(back)) * (both + NUM_HEAD)
        down = 4 * values if played.row["round_index"] else 0
        assert played.row["downlink_bytes"] == down + 5 * 24
        sent = NUM_B if len(cohorts) % 2 == 0 else NUM_A
        assert played.row["uplink_bytes"] == 5 * (24 + 4 * (sent + NUM_HEAD))
    assert kinds == {"back", "new", "late"}


def test_a_round_without_uploads_leaves_the_halves_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A's round 1 is lost; round 2 is B's all the same, and everybody needs both halves."""
    monkeypatch.setattr(Fleet, "vanishes", lambda self, round_index, client_id: round_index == 1)
    rounds = play_rounds(make_tiny_job(*ROLORA, "clients.dropout=0.1"), num_rounds=4)
    for played, moving in zip(rounds, ("B", "", "B", "A"), strict=True):
        before, after = played.before.parts, played.after.parts
        for part, name in product("AB", played.before.adapter.shapes):
            moved = not torch.equal(before[part][name], after[part][name])
            assert moved == (part == moving)
    assert rounds[2].row["uplink_bytes"] == 5 * (24 + 4 * (NUM_B + NUM_HEAD))
    assert rounds[2].row["downlink_bytes"] == 5 * (24 + 4 * (NUM_A + NUM_B + NUM_HEAD))
