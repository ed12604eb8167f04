"""FedSVD: the refactored product, orthonormal A, exact averaging, and what SGD can not tell."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.run.clients import draw_cohort
from fedara_core.methods.fedsvd import refactor
from support.pairs import model_parts, update
from support.rounds import make_tiny_job, play_rounds, received, train_one_client

# Not square, so that A and B differ in size: d_out, d_in of the four adapters; lora_rank 4.
TARGETS = "adapter.targets=['query', 'intermediate.dense']"
NUM_A = 4 * (2 * 32 + 2 * 32)
NUM_B = 4 * (2 * 32 + 2 * 64)
NUM_HEAD = 4 * 32 + 4
FEDSVD = ("method.name=fedsvd", TARGETS, "adapter.lora_alpha=8.0", "train.local_steps=2")


def assert_orthonormal(a: Tensor) -> None:
    torch.testing.assert_close(a @ a.T, torch.eye(len(a)), rtol=0, atol=1e-6)


def test_refactored_rows_by_hand() -> None:
    """B A = 6 u v^T + 2 w z^T, in any factors: B gets all of S (a square root on each side would
    leave sqrt(6) and sqrt(2) there), larger triplets come first; a triplet's sign is free."""
    u, w = torch.tensor([0.6, 0.8, 0.0]), torch.tensor([-0.8, 0.6, 0.0])
    v, z = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    mix, unmix = torch.tensor([[2.0, 1.0], [1.0, 1.0]]), torch.tensor([[1.0, -1.0], [-1.0, 2.0]])
    a = mix @ torch.stack([v, z])
    b = torch.stack([6 * u, 2 * w], dim=1) @ unmix
    bt = b.T.contiguous()
    refactor(a, bt)
    signs = torch.stack([a[0, 1].sign(), a[1, 0].sign()])[:, None]
    torch.testing.assert_close(signs * a, torch.stack([v, z]), rtol=0, atol=1e-6)
    torch.testing.assert_close(signs * bt, torch.stack([6 * u, 2 * w]), rtol=0, atol=1e-6)


def test_a_is_orthonormal_from_the_start_and_spans_the_same_rows() -> None:
    job = make_tiny_job(*FEDSVD)
    lora = make_tiny_job(*FEDSVD, "method.name=lora")
    rounds = play_rounds(job, num_rounds=3)
    for name in job.state.adapter.shapes:
        start = job.state.parts["A"][name]
        assert not job.state.parts["B"][name].any()
        states = [rounds[0].before, *(played.after for played in rounds)]
        for state in states:
            assert_orthonormal(state.parts["A"][name])
        for before, after in pairwise(states):
            turned = before.parts["A"][name] @ after.parts["A"][name].T
            assert_orthonormal(turned)  # (r, r): a rotation within the same row space
            assert (turned.abs() - torch.eye(4)).abs().max() > 1e-2
        drawn = lora.state.parts["A"][name]
        inside = drawn @ start.T @ start
        torch.testing.assert_close(inside, drawn, rtol=0, atol=1e-6)


def test_the_server_gets_the_mean_update() -> None:
    """sum_k p_k scale B_k A_k from the clients' own models, and its SVD in the two factors."""
    job = make_tiny_job(*FEDSVD, "train.lr=0.05")
    state = play_rounds(job, num_rounds=2)[-1].after
    uploads, models = [], []
    for client_id in draw_cohort(job, state.round_index):
        uploads.append(train_one_client(job, state, client_id))
        models.append(model_parts(job.model))
    num_examples = [upload.num_examples for upload in uploads]
    assert len(set(num_examples)) > 1
    after = job.method.aggregate(state, received(job.method, state, uploads))
    for name in job.state.adapter.shapes:
        mean = sum(
            n / sum(num_examples) * update(parts, name, 2.0)
            for n, parts in zip(num_examples, models, strict=True)
        )
        ours = update(after.parts, name, 2.0)
        assert (ours - update(state.parts, name, 2.0)).abs().max() > 1e-2
        torch.testing.assert_close(ours, mean, rtol=0, atol=1e-5)
        # The scale stays outside: S is that of B A, and all of it is in B.
        s = np.linalg.svd(mean.numpy() / 2.0, compute_uv=False)
        b = after.parts["B"][name].double().numpy()  # (r, d_out)
        np.testing.assert_allclose(b @ b.T, np.diag(s[:4] ** 2), atol=1e-5)


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 5.0), ("adamw", 0.01)])
def test_sgd_can_not_tell_it_from_a_fixed_a(optimizer: str, lr: float) -> None:
    """From the same orthonormal A the updates stay those of FFA-LoRA; AdamW's do not."""
    common = (*FEDSVD, f"train.optimizer={optimizer}", f"train.lr={lr}", "evaluate.every=9")
    ours, theirs = make_tiny_job(*common), make_tiny_job(*common, "method.name=ffa_lora")
    turned = play_rounds(ours)[-1].after
    assert ours.state.index == theirs.state.index
    fixed = play_rounds(theirs, replace(theirs.state, vector=ours.state.vector))[-1].after
    for name in ours.state.adapter.shapes:
        expected = update(fixed.parts, name, 2.0)
        gap = (update(turned.parts, name, 2.0) - expected).norm() / expected.norm()
        assert gap < 1e-4 if optimizer == "sgd" else gap > 1e-2
        assert (turned.parts["A"][name] - fixed.parts["A"][name]).abs().max() > 0.1


def test_without_an_update_a_stays_orthonormal() -> None:
    """A mean B of zero, or of rank one, leaves no direction undefined."""
    for b in (torch.zeros(4, 2), torch.ones(4, 2)):
        a, bt = torch.eye(3)[:2], b.T.contiguous()
        expected = b @ a
        refactor(a, bt)
        assert_orthonormal(a)
        torch.testing.assert_close(bt.T @ a, expected, rtol=0, atol=1e-6)


def test_b_goes_up_and_both_come_down() -> None:
    """To new clients as to those that come back; in round 0 nothing."""
    for played in play_rounds(make_tiny_job(*FEDSVD), num_rounds=3):
        assert played.row["uplink_bytes"] == 5 * (24 + 4 * (NUM_B + NUM_HEAD))
        num_values = NUM_A + NUM_B + NUM_HEAD if played.row["round_index"] else 0
        assert played.row["downlink_bytes"] == 5 * (24 + 4 * num_values)


def test_the_authors_head_stays() -> None:
    job = make_tiny_job(*FEDSVD, "method.freeze_head=true")
    head = {name: p for name, p in job.model.module.named_parameters() if "classifier" in name}
    before = {name: parameter.detach().clone() for name, parameter in head.items()}
    rounds = play_rounds(job, num_rounds=2)
    assert [played.row["uplink_bytes"] for played in rounds] == [5 * (24 + 4 * NUM_B)] * 2
    assert rounds[1].row["downlink_bytes"] == 5 * (24 + 4 * (NUM_A + NUM_B))
    assert rounds[1].after.whole == {}
    assert len(before) == 2
    assert all(torch.equal(parameter, before[name]) for name, parameter in head.items())
