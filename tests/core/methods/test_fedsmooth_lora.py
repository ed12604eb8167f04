"""FedSmoothLoRA: starts, uploads and merges against dense matrices; a full-rank step is a step of
full fine-tuning; what stays at clients, and what travels."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bench.models.encoders import build_model
from bench.run.clients import draw_cohort, make_client
from bench.run.job import Job
from fedara_core.method import Client
from fedara_core.methods.fedsmooth_lora import FedSmoothLora, balanced, gradient_pair
from fedara_core.state import ServerState
from fedara_core.train import start_client
from support.pairs import update
from support.rounds import Round, make_tiny_job, play_rounds, received, train_one_client

ROW_FLOATS = 8 * (32 + 32) + 4 * (64 + 32)  # one row of every adapter of tiny.toml's model
NUM_HEAD = 4 * 32 + 4
SMOOTH = ("method.name=fedsmooth_lora", "train.lr=2e-2", "adapter.lora_alpha=8.0")  # scale 2
EXACT = (*SMOOTH, "model.dropout=0.0")


def best(dense: Tensor, lora_rank: int) -> Tensor:
    """The best approximation of that rank (Eckart-Young)."""
    u, s, vt = torch.linalg.svd(dense.double())
    return (u[:, :lora_rank] * s[:lora_rank]) @ vt[:lora_rank]


def weight_of(job: Job, state: ServerState, name: str) -> Tensor:
    """The server's W (d_out, d_in) in float64."""
    base = job.model.adapters[name].base.weight.detach().double()
    return base + state.fixed["delta"][name].double() + update(state.parts, name, 2.0)


def kept_change(job: Job, state: ServerState, client_id: int, name: str) -> Tensor:
    """B_c A_c of a client's last round."""
    parts = state.index.parts(job.client_state[client_id]["pair"])
    return update(parts, name, 1.0)


def started(job: Job, state: ServerState, client_id: int) -> Client:
    """A client right before its first step: A, B and weights are in the model. Its lr is 0."""
    job = replace(job, training=replace(job.training, lr=0.0))
    client = make_client(job, client_id)
    job.method.download(job.model, state, client)
    start_client(client, job.method, job.training, state)
    job.method.local_step(client, job.train.batch(torch.arange(8), job.device))
    return client


def gradients(job: Job, weights: dict[str, Tensor], state: ServerState) -> dict[str, Tensor]:
    """Of the loss on the first 8 examples, by the plain model's weights at these values."""
    plain = build_model(job.config.model, num_classes=4, seed=job.config.seed).model.train()
    with torch.no_grad():
        for name, weight in weights.items():
            plain.get_submodule(name).weight.copy_(weight)
        for name, tensor in state.whole.items():
            plain.get_parameter(name).copy_(tensor)
    batch = job.train.batch(torch.arange(8), job.device)
    logits = plain(batch["input_ids"], batch["attention_mask"])
    functional.cross_entropy(logits, batch["labels"]).backward()
    return {name: plain.get_submodule(name).weight.grad for name in weights}


# ---- its parts ----


def test_gradient_pair_by_hand() -> None:
    """diag(4, 3, 2, 1), r = 2: A_g from the first two singular vectors, B_g from the others, all of
    length 4^(1/4) / sqrt(8) = 1/2."""
    a, b = gradient_pair(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])), 2, 8.0)
    torch.testing.assert_close(a, 0.5 * torch.eye(4)[:2])
    torch.testing.assert_close(b, 0.5 * torch.eye(4)[2:])


def test_gradient_pair_of_a_small_layer_takes_the_last_vectors() -> None:
    a, b = gradient_pair(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2, 3**0.5)
    torch.testing.assert_close(a, torch.eye(3)[:2])
    torch.testing.assert_close(b, torch.eye(3)[1:])


def test_balanced_by_hand() -> None:
    """3 e1 e1^T + 1 e1 e1^T + 1 e2 e2^T: S = 4, 1, of rank 1 its root on both sides is 2."""
    one, two = torch.eye(2)[:1], torch.eye(2)[1:]
    a, b = balanced([(one, 3 * one), (torch.cat([one, two]), torch.eye(2))], 1)
    torch.testing.assert_close(a, torch.tensor([[2.0, 0.0]]))
    torch.testing.assert_close(b, torch.tensor([[2.0, 0.0]]))


def test_zeta_falls_as_half_a_cosine() -> None:
    state = make_tiny_job(*SMOOTH).state  # 6 rounds
    method = FedSmoothLora(zeta=1.0, min_zeta=0.5)
    found = [method.zeta_at(replace(state, round_index=t)) for t in (0, 2, 3, 6)]
    expected = [1.0, 0.75 + 0.25 * math.cos(math.pi / 3), 0.75, 0.5]
    assert found == pytest.approx(expected)
    constant = FedSmoothLora(zeta=1.0, min_zeta=1.0)
    assert {constant.zeta_at(replace(state, round_index=t)) for t in range(7)} == {1.0}


# ---- a client's round ----


def test_the_first_start_leaves_the_function_as_it_was() -> None:
    """W - scale B_g A_g + scale B A with B A = B_g A_g; the gradient is that of W0."""
    job = make_tiny_job(*EXACT)
    weights = {name: weight_of(job, job.state, name).float() for name in job.model.adapters}
    expected = gradients(job, weights, job.state)
    client = started(job, job.state, 0)
    assert len(client.losses) == 1  # the calibration's is none of the round's
    for name, adapter in job.model.adapters.items():
        a, b = gradient_pair(expected[name], 4, 64.0)
        ours_a, ours_b = adapter.parts["A"].detach(), adapter.parts["B"].detach()
        torch.testing.assert_close(ours_b.T @ ours_a, b.T @ a, rtol=0, atol=1e-4)
        assert not adapter.weight.requires_grad
        torch.testing.assert_close(
            adapter.weight + 2 * ours_b.T @ ours_a, weights[name], rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("zeta", [0.5, 0.0])
def test_a_later_start_matches_the_clients_last_round(zeta: float) -> None:
    """All of steps 1 to 3, densely, for a client that was in the last round's cohort."""
    words = (f"method.zeta={zeta}", f"method.min_zeta={zeta}", "method.gamma=4096.0")
    job = make_tiny_job(*EXACT, *words)
    state = play_rounds(job, num_rounds=2)[-1].after
    client_id = draw_cohort(job, 1)[0]
    matching = {
        name: zeta * (kept_change(job, state, client_id, name) - update(state.parts, name, 1.0))
        for name in job.model.adapters
    }
    weights = {name: weight_of(job, state, name) for name in matching}
    at = {name: (weights[name] + 2 * m).float() for name, m in matching.items()}
    expected = gradients(job, at, state)
    started(job, state, client_id)
    for name, adapter in job.model.adapters.items():
        a, b = gradient_pair(expected[name], 4, 4096.0)
        given = (b.T @ a).double()
        product = update(
            {"A": {name: adapter.parts["A"]}, "B": {name: adapter.parts["B"]}}, name, 1
        )
        torch.testing.assert_close(product, best(given + matching[name], 4), rtol=0, atol=2e-4)
        shifted = weights[name] - 2 * given
        torch.testing.assert_close(adapter.weight.double(), shifted, rtol=0, atol=2e-4)
        assert (matching[name].norm() > 0.01) == (zeta > 0)


def test_a_new_client_has_nothing_to_match() -> None:
    job = make_tiny_job(*SMOOTH)
    state = play_rounds(job, num_rounds=1)[-1].after
    new = next(k for k in range(8) if k not in job.client_state)
    client = make_client(job, new)
    job.method.download(job.model, state, client)
    assert client.notes["matching"] == {}
    old = make_client(job, min(job.client_state))
    job.method.download(job.model, state, old)
    assert old.notes["matching"].keys() == job.model.adapters.keys()


def test_it_uploads_and_keeps_what_it_learned() -> None:
    """SVD_r(B A - B_g A_g): what lies between its weight and the server's, cut to rank r."""
    job = make_tiny_job(*SMOOTH)
    state = play_rounds(job, num_rounds=1)[-1].after
    client_id = draw_cohort(job, 1)[0]
    upload = train_one_client(job, state, client_id)
    sent = state.index.parts(upload.values)
    for name, adapter in job.model.adapters.items():
        rows = {part: {name: adapter.parts[part].detach()} for part in "AB"}
        own = adapter.weight.double() + update(rows, name, 2.0)
        learned = (own - weight_of(job, state, name)) / 2
        torch.testing.assert_close(update(sent, name, 1.0), best(learned, 4), rtol=0, atol=1e-5)
        assert learned.norm() > 0.01
    kept = job.client_state[client_id]["pair"]
    assert torch.equal(kept, upload.values[:-NUM_HEAD])


def test_no_client_sees_anothers_weights() -> None:
    """Shifted weights are gone when the next client, or the evaluation, loads the state."""
    job = make_tiny_job(*SMOOTH)
    state = play_rounds(job, num_rounds=1)[-1].after
    cohort = draw_cohort(job, 1)
    kept = dict(job.client_state)
    alone = train_one_client(job, state, cohort[1])
    job.client_state.clear()
    job.client_state.update(kept)
    train_one_client(job, state, cohort[0])
    after = train_one_client(job, state, cohort[1])
    assert torch.equal(alone.values, after.values)
    job.method.download(job.model, state, None)
    for name, adapter in job.model.adapters.items():
        found = adapter.weight.double() + update(state.parts, name, 2.0)
        torch.testing.assert_close(found, weight_of(job, state, name), rtol=0, atol=1e-6)


# ---- the server ----


def test_the_server_merges_the_mean_change() -> None:
    """W <- W + scale SVD_r(mean), in every round, against dense sums."""
    job = make_tiny_job(*SMOOTH)
    state = job.state
    for round_index in range(3):
        uploads = [train_one_client(job, state, k) for k in draw_cohort(job, round_index)]
        both = received(job.method, state, uploads)
        after = job.method.aggregate(state, both)
        for name in job.model.adapters:
            mean = torch.zeros(job.model.shapes[name], dtype=torch.float64)
            for upload, share in zip(uploads, both.shares, strict=True):
                mean += share * update(state.index.parts(upload.values), name, 1.0)
            expected = weight_of(job, state, name) + 2 * best(mean, 4)
            torch.testing.assert_close(weight_of(job, after, name), expected, rtol=0, atol=1e-5)
        state = after
    changes = [weight_of(job, state, n) - weight_of(job, job.state, n) for n in job.model.adapters]
    # Rounds add up to more than one round's rank.
    assert max(int(torch.linalg.matrix_rank(c, rtol=1e-4)) for c in changes) > 4


def test_all_clients_are_evaluated_with_one_model() -> None:
    """They keep where they start from, and have no model of their own."""
    job = make_tiny_job(*SMOOTH)
    (played,) = play_rounds(job, num_rounds=1)
    batch = job.evaluated.batch(torch.arange(20), job.device)
    plain = build_model(job.config.model, num_classes=4, seed=job.config.seed).model.eval()
    with torch.no_grad():
        for name in job.model.adapters:
            plain.get_submodule(name).weight.copy_(weight_of(job, played.after, name))
        for name, tensor in played.after.whole.items():
            plain.get_parameter(name).copy_(tensor)
        job.method.download(job.model, played.after, None)
        module = job.model.module.eval()
        ours, theirs = (m(batch["input_ids"], batch["attention_mask"]) for m in (module, plain))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert len(job.client_state) == 5


# ---- reduction and bytes ----


def test_a_step_at_full_rank_is_a_step_of_full_fine_tuning() -> None:
    """A_g and B_g are then l times orthogonal matrices, and an SGD step of rate lr on both moves W
    by 2 lr scale^2 l^2 times the gradient, but for lr^2."""
    lr, gamma, scale = 1e-2, 64.0, 2.0
    same = ("train.optimizer=sgd", "train.local_steps=1", "train.max_grad_norm=none")
    same += ("federation.num_clients=1", "federation.cohort=1", "model.dropout=0.0")
    words = ("adapter.targets=['value', 'attention.output.dense']", "adapter.lora_rank=32")
    words += ("adapter.lora_alpha=64.0", f"method.gamma={gamma}", f"train.lr={lr}")
    ours = make_tiny_job("method.name=fedsmooth_lora", *words, *same)
    full_lr = 2 * lr * scale**2 * 32**0.5 / gamma
    theirs = make_tiny_job("method.name=full", f"train.lr={full_lr}", *same)
    one: Round = play_rounds(ours, num_rounds=1)[0]
    other: Round = play_rounds(theirs, num_rounds=1)[0]
    for name in ours.model.adapters:
        step = update(one.after.parts, name, scale)
        (key,) = [k for k in other.after.whole if k.startswith(f"{name}.") and "weight" in k]
        expected = (other.after.whole[key] - other.before.whole[key]).double()
        assert expected.norm() > 1e-6
        assert (step - expected).norm() < 0.02 * expected.norm()


def test_bytes_of_a_run() -> None:
    """Up r rows; down r rows of each round since the client last took part, or the dense change."""
    last_round = dict.fromkeys(range(8), -1)
    for played in play_rounds(make_tiny_job(*SMOOTH, "train.local_steps=1")):
        now, head = played.before.round_index, 5 * (24 + 4 * NUM_HEAD)
        assert played.row["uplink_bytes"] == head + 4 * 5 * 4 * ROW_FLOATS
        num_floats = 0
        for client_id in played.row["cohort"]:
            num_rounds = now - max(0, last_round[client_id])
            num_floats += sum(
                n * min(4 * num_rounds * (d_in + d_out), d_in * d_out)
                for n, d_out, d_in in ((8, 32, 32), (4, 64, 32))
            )
            last_round[client_id] = now
        sent = head + 4 * num_floats if now else 5 * 24  # the start is free
        assert played.row["downlink_bytes"] == sent
