"""FFA-LoRA: exact averaging, bytes by hand, LoRA with A held still, and the frozen head."""

from dataclasses import dataclass, replace

import pytest
import torch

from bench.run.clients import draw_cohort
from fedara_core.errors import InputError
from fedara_core.factors import lora_parts
from fedara_core.method import load_method
from fedara_core.state import relaid
from support.pairs import model_parts, update
from support.rounds import make_tiny_job, play_rounds, received, train_one_client

# Not square, so that A and B differ in size: d_out, d_in of the four adapters; lora_rank 4.
TARGETS = "adapter.targets=['query', 'intermediate.dense']"
NUM_B = 4 * (2 * 32 + 2 * 64)
NUM_HEAD = 4 * 32 + 4
FFA = ("method.name=ffa_lora", TARGETS, "adapter.lora_alpha=8.0", "train.local_steps=2")


@pytest.mark.parametrize(("name", "exact"), [("ffa_lora", True), ("lora", False)])
def test_the_server_gets_the_mean_update(name: str, exact: bool) -> None:
    """sum_k p_k scale B_k A_k from the clients' own models; where A trains too it is missed."""
    job = make_tiny_job(*FFA, f"method.name={name}", "train.lr=0.05")
    state = play_rounds(job, num_rounds=2)[-1].after
    uploads, models = [], []
    for client_id in draw_cohort(job, state.round_index):
        uploads.append(train_one_client(job, state, client_id))
        models.append(model_parts(job.model))
    num_examples = [upload.num_examples for upload in uploads]
    assert len(set(num_examples)) > 1
    after = job.method.aggregate(state, received(job.method, state, uploads))
    errors = []
    for adapter in job.state.adapter.shapes:
        mean = sum(
            n / sum(num_examples) * update(parts, adapter, 2.0)
            for n, parts in zip(num_examples, models, strict=True)
        )
        ours = update(after.parts, adapter, 2.0)
        assert (ours - update(state.parts, adapter, 2.0)).abs().max() > 1e-2
        errors.append(float((ours - mean).abs().max()))
    assert (max(errors) < 1e-5) == exact, errors


def test_a_is_the_seeds_draw_for_good() -> None:
    job = make_tiny_job(*FFA)
    drawn = lora_parts(job.state.adapter, seed=0)["A"]
    rounds = play_rounds(job, num_rounds=3)
    for name in job.state.adapter.shapes:
        assert not rounds[0].before.parts["B"][name].any()
        for played in rounds:
            assert torch.equal(played.after.parts["A"][name], drawn[name])
            assert played.after.parts["B"][name].any()
    for adapter in job.model.adapters.values():
        assert not adapter.parts["A"].requires_grad
        assert adapter.parts["B"].requires_grad


def test_it_is_lora_whose_a_does_not_move() -> None:
    """Without clipping, where A's gradient would count, to the last bit."""

    @dataclass(frozen=True, kw_only=True)
    class StillA(load_method("lora")):  # type: ignore[misc]
        def lr_factor(self, part: str) -> float:
            return 0.0 if part == "A" else 1.0

    common = ("train.max_grad_norm=1e9", "train.weight_decay=0.1", "federation.num_rounds=3")
    job = make_tiny_job(*FFA, *common)
    ours = play_rounds(job)
    theirs = play_rounds(replace(make_tiny_job(*FFA, *common, "method.name=lora"), method=StillA()))
    for one, other in zip(ours, theirs, strict=True):
        assert one.row["train_loss"] == other.row["train_loss"]
        after = relaid(other.after, job.method.form(job.state))  # A rests, and so lies elsewhere
        assert after.digest() == one.row["state_digest"]


def test_only_b_and_the_head_travel() -> None:
    """To new clients as to those that come back; in round 0 nothing, A never."""
    for played in play_rounds(make_tiny_job(*FFA), num_rounds=3):
        size = 24 + 4 * (NUM_B + NUM_HEAD)
        assert played.row["uplink_bytes"] == 5 * size
        assert played.row["downlink_bytes"] == 5 * (size if played.row["round_index"] else 24)


# ---- the head ----


def test_a_frozen_head_neither_trains_nor_travels() -> None:
    job = make_tiny_job(*FFA, "method.freeze_head=true")
    module = job.model.module
    head = {n: p.clone() for n, p in module.named_parameters() if n.startswith("classifier")}
    assert len(head) == 2
    rounds = play_rounds(job, num_rounds=2)
    for played in rounds:
        assert played.after.whole == {}
        assert played.row["uplink_bytes"] == 5 * (24 + 4 * NUM_B)
        num_b = NUM_B if played.row["round_index"] else 0
        assert played.row["downlink_bytes"] == 5 * (24 + 4 * num_b)
    for name, before in head.items():
        assert torch.equal(before, module.get_parameter(name))
    for name, rows in rounds[-1].after.parts["B"].items():
        assert not torch.equal(rows, rounds[0].before.parts["B"][name])


def test_by_default_the_head_trains() -> None:
    (played,) = play_rounds(make_tiny_job(*FFA), num_rounds=1)
    assert sorted(played.after.whole) == ["classifier.bias", "classifier.weight"]
    for name, tensor in played.after.whole.items():
        assert not torch.equal(tensor, played.before.whole[name])


def test_freeze_head_is_true_or_false() -> None:
    with pytest.raises(InputError, match=r"method\.freeze_head = 1 is not allowed"):
        make_tiny_job(*FFA, "method.freeze_head=1")
