"""LoRA-FAIR: the correction by hand and as a minimum, the reduction to LoRA, and what travels."""

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.run.clients import draw_cohort
from fedara_core.errors import InputError
from fedara_core.methods.lora_fair import LoraFair, correction
from support.pairs import pair, sent_pairs
from support.rounds import make_tiny_job, play_rounds, received, train_one_client

FAIR = ("method.name=lora_fair", "train.lr=2e-2")
LORA = ("method.name=lora", "train.lr=2e-2")
ROW_FLOATS = 8 * (32 + 32) + 4 * (64 + 32)  # one row of every adapter of tiny.toml's model
NUM_HEAD = 4 * 32 + 4


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float((one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other))


# ---- the correction ----


def test_correction_by_hand() -> None:
    """Two clients of weights 1/4 and 3/4 with A_k = 1, 5 and B_k = 2, -2, all 1 x 1:
    mean A = 4, mean B = -1, sum p B A = 1/4 2 - 3/4 10 = -7, G = -7 + 4 = -3.
    dB = -3 4 / (16 + lambda): -0.75 for lambda -> 0, -0.6 for lambda = 4."""
    a, b = torch.tensor([[4.0]]), torch.tensor([[-1.0]])
    pairs = [(torch.tensor([[1.0]]), torch.tensor([[2.0]]))]
    pairs += [(torch.tensor([[5.0]]), torch.tensor([[-2.0]]))]
    for penalty, expected in ((1e-12, -0.75), (4.0, -0.6)):
        found = correction(a, b, pairs, [0.25, 0.75], penalty)
        torch.testing.assert_close(found, torch.tensor([[expected]]).double(), rtol=0, atol=1e-7)


def test_clients_that_agree_on_a_need_no_correction() -> None:
    a, b1, b2 = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    found = correction(a, (b1 + b2) / 2, [(a, b1), (a, b2)], [0.5, 0.5], 0.01)
    torch.testing.assert_close(found, torch.zeros(2, 5).double(), rtol=0, atol=1e-6)


def test_it_is_the_minimum() -> None:
    """The gradient of the objective at dB is zero, on a layer that is not square."""
    draw = torch.Generator().manual_seed(1)
    pairs = [(torch.randn(2, 6, generator=draw), torch.randn(2, 3, generator=draw)) for _ in "abc"]
    shares = [0.2, 0.3, 0.5]
    a, b = (sum(p * pair[i] for p, pair in zip(shares, pairs, strict=True)) for i in (0, 1))
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    wanted = sum(p * own_b.T @ own_a for p, (own_a, own_b) in zip(shares, pairs, strict=True))
    change = correction(a, b, pairs, shares, 0.3).requires_grad_()
    loss = (wanted - (b + change).T @ a.double()).square().sum() + 0.3 * change.square().sum()
    (gradient,) = torch.autograd.grad(loss, change)
    assert change.abs().max() > 0.1
    torch.testing.assert_close(gradient, torch.zeros(2, 3).double(), rtol=0, atol=1e-5)


def test_the_server_comes_nearer_to_the_mean_of_the_products() -> None:
    """Against numpy on dense matrices; A is LoRA's, and B stays near LoRA's."""
    job = make_tiny_job(*FAIR)
    state = play_rounds(job, num_rounds=1)[-1].after
    uploads = [train_one_client(job, state, client_id) for client_id in draw_cohort(job, 1)]
    shapes = job.model.shapes
    both = received(job.method, state, uploads)
    means, after = make_tiny_job(*LORA).method.aggregate(state, both), {}
    for penalty in (1e-9, 0.01, 1.0):
        after[penalty] = LoraFair(penalty=penalty).aggregate(state, both)
        assert torch.equal(after[penalty].vector[-NUM_HEAD:], means.vector[-NUM_HEAD:])
    clients = [sent_pairs(upload.values, 4, shapes) for upload in uploads]
    for name in shapes:
        wanted = sum(
            share * own[name][1] @ own[name][0]
            for share, own in zip(both.shares, clients, strict=True)
        )
        mean_a, mean_b = pair(means.parts, name)
        row_space = np.linalg.pinv(mean_a) @ mean_a
        # No B does better for this A than the projection of the wanted change.
        a, b = pair(after[1e-9].parts, name)
        np.testing.assert_array_equal(a, mean_a)
        np.testing.assert_allclose(b @ a, wanted @ row_space, atol=1e-6)
        gaps = [np.linalg.norm(wanted - mean_b @ mean_a)]
        moved = [0.0]
        for penalty in (1.0, 0.01, 1e-9):
            _, b = pair(after[penalty].parts, name)
            gaps.append(np.linalg.norm(wanted - b @ a))
            moved.append(np.linalg.norm(b - mean_b))
        assert gaps == sorted(gaps, reverse=True)
        assert moved == sorted(moved)
        assert cosine(b @ a, wanted) > cosine(mean_b @ mean_a, wanted)


def test_a_penalty_is_needed() -> None:
    with pytest.raises(InputError, match="penalty"):
        LoraFair(penalty=0.0)


# ---- reduction and bytes ----


def test_without_correction_it_is_lora() -> None:
    """A penalty that lets B not move."""
    ours = play_rounds(make_tiny_job(*FAIR, "method.penalty=1e300"))
    theirs = play_rounds(make_tiny_job(*LORA))
    corrected = play_rounds(make_tiny_job(*FAIR))
    for one, other in zip(ours, theirs, strict=True):
        assert one.row["state_digest"] == other.row["state_digest"]
    # In round 0 all start from one A, which one round moves apart.
    assert corrected[0].row["state_digest"] != theirs[0].row["state_digest"]


def test_it_sends_what_lora_sends() -> None:
    for played in play_rounds(make_tiny_job(*FAIR, "train.local_steps=1"), num_rounds=3):
        size = 24 + 4 * (4 * ROW_FLOATS + NUM_HEAD)
        assert played.row["uplink_bytes"] == 5 * size
        if played.before.round_index:
            assert played.row["downlink_bytes"] == 5 * size
