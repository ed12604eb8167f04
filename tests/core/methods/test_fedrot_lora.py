"""FedRot-LoRA: rotations by hand, products that stay, the reduction to LoRA, and what travels."""

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.run.clients import draw_cohort
from fedara_core.methods.fedrot_lora import rotation
from support.pairs import pair, sent_pairs
from support.rounds import make_tiny_job, play_rounds, received, train_one_client

FEDROT = ("method.name=fedrot_lora", "train.lr=2e-2")
ROW_FLOATS = 8 * (32 + 32) + 4 * (64 + 32)  # one row of every adapter of tiny.toml's model
NUM_HEAD = 4 * 32 + 4
QUARTER = torch.tensor([[0.0, -1.0], [1.0, 0.0]])  # 90 degrees, counterclockwise


def orthogonal(seed: int, size: int) -> Tensor:
    drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double()
    return torch.linalg.qr(drawn).Q


# ---- the rotation ----


def test_a_quarter_turn_is_undone() -> None:
    """Reference [[1, 0, 0], [0, 2, 0]]; the client has it turned by 90 degrees."""
    reference = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    turned = QUARTER @ reference  # [[0, -2, 0], [1, 0, 0]]
    found = rotation(turned, reference)
    torch.testing.assert_close(found, QUARTER.double())
    torch.testing.assert_close(found.T @ turned.double(), reference.double())


def test_half_the_strength_is_half_the_angle() -> None:
    reference = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    half = 0.5**0.5 * torch.tensor([[1.0, -1.0], [1.0, 1.0]]).double()  # 45 degrees
    torch.testing.assert_close(rotation(QUARTER @ reference, reference, 0.5), half)


def test_a_mirror_image_is_undone_at_full_strength_only() -> None:
    mirror = torch.diag(torch.tensor([1.0, -1.0]))
    reference = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(rotation(mirror @ reference, reference), mirror.double())
    softened = rotation(mirror @ reference, reference, 0.999)
    torch.testing.assert_close(softened, torch.eye(2).double())


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_it_is_orthogonal_and_no_strength_is_no_turn(strength: float) -> None:
    rows, reference = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(3))
    found = rotation(rows, reference, strength)
    torch.testing.assert_close(found @ found.T, torch.eye(4).double())
    assert torch.equal(rotation(rows, reference, 0.0), torch.eye(4).double())


def test_no_other_orthogonal_matrix_comes_nearer() -> None:
    rows, reference = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(3)).double()
    best = (rotation(rows, reference).T @ rows - reference).norm()
    for seed in range(200):
        assert (orthogonal(seed, 4).T @ rows - reference).norm() > best


# ---- uploads ----


@pytest.mark.parametrize("round_index", [0, 1, 2])
def test_uploads_are_turned_and_keep_their_product(round_index: int) -> None:
    """By A in odd rounds, by B in even ones, not at all in round 0; against LoRA's uploads."""
    job = make_tiny_job(*FEDROT)
    lora = make_tiny_job("method.name=lora", "train.lr=2e-2")
    state = play_rounds(job, num_rounds=round_index)[-1].after if round_index else job.state
    shapes = job.model.shapes
    for client_id in draw_cohort(job, round_index)[:2]:
        upload = train_one_client(job, state, client_id)
        plain = train_one_client(lora, state, client_id)
        if round_index == 0:
            assert torch.equal(upload.values, plain.values)
            continue
        turned, kept = sent_pairs(upload.values, 4, shapes), sent_pairs(plain.values, 4, shapes)
        for name in shapes:
            (a, b), (plain_a, plain_b) = turned[name], kept[name]
            np.testing.assert_allclose(b @ a, plain_b @ plain_a, atol=1e-6)
            ref_a, ref_b = pair(state.parts, name)
            ours, theirs = (a, plain_a) if round_index == 1 else (b, plain_b)
            reference = ref_a if round_index == 1 else ref_b
            assert np.linalg.norm(ours - reference) < np.linalg.norm(theirs - reference)
            # At the best R the rest of the rotation is I: ours @ reference^T is symmetric, >= 0.
            cross = a @ ref_a.T if round_index == 1 else b.T @ ref_b
            np.testing.assert_allclose(cross, cross.T, atol=1e-6)
            assert np.linalg.eigvalsh(cross).min() > -1e-6
        assert torch.equal(upload.values[-NUM_HEAD:], plain.values[-NUM_HEAD:])


def test_turned_clients_average_to_what_they_agree_on() -> None:
    """Two clients with one change in two bases: plain means lose it, aligned ones do not."""
    a, b = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1)).double()
    own = [(turn.T @ a, turn.T @ b) for turn in (orthogonal(5, 3), orthogonal(6, 3))]
    plain = [sum(rows[part] for rows in own) / 2 for part in (0, 1)]
    assert (plain[1].T @ plain[0] - b.T @ a).norm() > 0.1 * (b.T @ a).norm()
    aligned = [[rotation(rows[0], a).T @ rows[part] for part in (0, 1)] for rows in own]
    means = [sum(rows[part] for rows in aligned) / 2 for part in (0, 1)]
    torch.testing.assert_close(means[1].T @ means[0], b.T @ a)


def test_the_server_averages() -> None:
    job = make_tiny_job(*FEDROT)
    state = play_rounds(job, num_rounds=1)[-1].after
    uploads = [train_one_client(job, state, client_id) for client_id in draw_cohort(job, 1)]
    after = job.method.aggregate(state, received(job.method, state, uploads))
    num_examples = sum(upload.num_examples for upload in uploads)
    mean = sum(u.num_examples / num_examples * u.values.double() for u in uploads)
    torch.testing.assert_close(after.vector.double(), mean, rtol=0, atol=1e-6)


# ---- reduction and bytes ----


def test_without_rotation_it_is_lora() -> None:
    ours = play_rounds(make_tiny_job(*FEDROT, "method.strength=0.0"))
    theirs = play_rounds(make_tiny_job("method.name=lora", "train.lr=2e-2"))
    for one, other in zip(ours, theirs, strict=True):
        assert one.row["state_digest"] == other.row["state_digest"]
    turned = play_rounds(make_tiny_job(*FEDROT))
    assert turned[0].row["state_digest"] == theirs[0].row["state_digest"]
    assert turned[1].row["state_digest"] != theirs[1].row["state_digest"]


def test_it_sends_what_lora_sends() -> None:
    for played in play_rounds(make_tiny_job(*FEDROT, "train.local_steps=1"), num_rounds=3):
        size = 24 + 4 * (4 * ROW_FLOATS + NUM_HEAD)
        assert played.row["uplink_bytes"] == 5 * size
        if played.before.round_index:
            assert played.row["downlink_bytes"] == 5 * size
