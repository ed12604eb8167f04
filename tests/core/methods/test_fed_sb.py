"""Fed-SB: the start from the mean gradient, B R A against dense weights, exact means, the reduction
to LoRA with A frozen, bytes."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.models.encoders import build_model
from bench.run.checkpoint import find_checkpoint, restore, save_checkpoint
from bench.run.clients import client_batches, draw_cohort
from bench.run.job import Job
from fedara_core.adapters import LowRank
from fedara_core.method import Client, load_method
from fedara_core.state import ServerState, with_parts
from fedara_core.train import start_client
from fedara_core.values import Tensors
from support.rounds import logits_at_start, make_tiny_job, play_rounds, received, train_one_client

FED_SB = ("method.name=fed_sb", "adapter.lora_alpha=8.0", "train.lr=2e-2")  # scale 2
SHAPES = [(32, 32)] * 8 + [(64, 32), (32, 64)] * 2  # tiny.toml's model
NUM_HEAD = 4 * 32 + 4
Lora: Any = load_method("lora")


def product(state: ServerState, name: str, core: Tensor) -> Tensor:
    """B R A (d_out, d_in), in float64."""
    return state.fixed["B"][name].double() @ core.double() @ state.fixed["A"][name].double()


def opened(job: Job) -> ServerState:
    """The state after the opening round."""
    return play_rounds(job, num_rounds=1)[-1].after


def gradients_by_hand(job: Job, client_id: int) -> Tensors:
    """A client's mean gradients of W0 in the opening round, with plain PyTorch: only the head
    moves."""
    built = build_model(job.config.model, num_classes=4, seed=job.config.seed).model.train()
    head = [p for name, p in built.named_parameters() if name.startswith("classifier")]
    optimizer = torch.optim.AdamW(head, lr=job.config.train.lr, weight_decay=0.0)
    total = {name: torch.zeros(shape) for name, shape in job.state.adapter.shapes.items()}
    for batch in client_batches(job, 0, client_id):
        built.zero_grad()
        logits = built(batch["input_ids"], batch["attention_mask"])
        functional.cross_entropy(logits, batch["labels"]).backward()
        nn.utils.clip_grad_norm_(head, 1.0)
        optimizer.step()
        for name, gradients in total.items():
            gradients += built.get_submodule(name).weight.grad / job.config.train.local_steps
    return total


@pytest.mark.parametrize("mean", ["weighted", "plain"])
def test_the_start_is_the_svd_of_the_first_step(mean: str) -> None:
    """scale B R A is the best rank-4 part of -start_lr sign(mean gradient)."""
    words = (*FED_SB, "model.dropout=0.0", "method.start_lr=1e-3", f"method.mean={mean}")
    job = make_tiny_job(*words)
    cohort = draw_cohort(job, 0)
    weights = [len(job.shards[k]) if mean == "weighted" else 1 for k in cohort]
    assert len({len(job.shards[k]) for k in cohort}) > 1
    own = [gradients_by_hand(job, client_id) for client_id in cohort]
    state = opened(job)
    for name in job.state.adapter.shapes:
        gradient = sum(n * g[name] for n, g in zip(weights, own, strict=True)) / sum(weights)
        u, s, vt = np.linalg.svd(-1e-3 * gradient.sign().double().numpy())
        best = u[:, :4] @ np.diag(s[:4]) @ vt[:4]
        found = 2 * product(state, name, state.parts["R"][name])
        assert np.abs(best).max() > 1e-4
        # A gradient near zero may have another sign here and there.
        assert np.linalg.norm(found.numpy() - best) < 0.05 * np.linalg.norm(best)
        a, b, core = state.fixed["A"][name], state.fixed["B"][name], state.parts["R"][name]
        torch.testing.assert_close(a @ a.T, torch.eye(4), rtol=0, atol=1e-6)
        torch.testing.assert_close(b.T @ b, torch.eye(4), rtol=0, atol=1e-6)
        assert torch.equal(core, core.diag().diag())


def test_the_opening_round_moves_the_head_alone() -> None:
    job = make_tiny_job(*FED_SB, "train.weight_decay=0.1")
    client = Client(client_id=0, num_examples=8, model=job.model)
    job.method.download(job.model, job.state, client)
    start_client(client, job.method, job.training, job.state)
    for _ in range(2):
        job.method.local_step(client, job.train.batch(torch.arange(8), job.device))
    runs = job.state.index.runs
    assert not job.model.vector[runs["G"]].any()
    assert not torch.equal(job.model.vector[runs[""]], job.state.vector[runs[""]])


def test_the_bases_hold_the_gradient() -> None:
    """Mean share of the mean gradient's energy, on other batches than those of the start, that
    steps in span(B) x span(A) can have: 0.74; of the singular bases of W0, as before, 0.04."""
    words = (*FED_SB, "adapter.lora_rank=8", "federation.cohort=8", "train.local_steps=8")
    job = make_tiny_job(*words, "train.lr=5e-3", "model.dropout=0.0")
    state, later = opened(job), replace(job.state, round_index=3)
    uploads = [train_one_client(job, later, client_id) for client_id in range(8)]
    gradients = later.index.parts(received(job.method, later, uploads).mean)["G"]
    shares: dict[str, list[float]] = {"gradient": [], "weight": []}
    for name, adapter in job.model.adapters.items():
        gradient = gradients[name].reshape(adapter.shape).double()
        u, _, vt = torch.linalg.svd(adapter.base.weight.detach().double())
        own = (state.fixed["B"][name].double(), state.fixed["A"][name].double())
        for kind, (b, a) in {"gradient": own, "weight": (u[:, :8], vt[:8])}.items():
            shares[kind].append(float((b.T @ gradient @ a.T).norm() ** 2 / gradient.norm() ** 2))
    assert np.mean(shares["gradient"]) > 0.7
    assert np.mean(shares["weight"]) < 0.05


def test_a_run_resumes_in_between(tmp_path: Path) -> None:
    """A, B and when they came are part of the checkpoint."""
    job = make_tiny_job(*FED_SB)
    rounds = play_rounds(job, num_rounds=3)
    save_checkpoint(tmp_path, rounds[0].after, {}, {})
    found = find_checkpoint(tmp_path)
    assert found is not None
    state, _ = restore(make_tiny_job(*FED_SB).state, found.data, {})
    again = play_rounds(job, state, 2)
    for key in ("state_digest", "downlink_bytes"):
        assert [p.row[key] for p in again] == [p.row[key] for p in rounds[1:]]


def test_the_start_leaves_the_function_as_it_was() -> None:
    job = make_tiny_job(*FED_SB)
    before, after = logits_at_start(job)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_a_layer_is_its_dense_weight() -> None:
    """With an R that is not symmetric: R[i] is row i, not column i."""
    job = make_tiny_job(*FED_SB)
    start = opened(job)
    torch.manual_seed(2)
    cores = {name: torch.randn(4, 4) for name in start.parts["R"]}
    state = with_parts(start, job.method.form(start), {"R": cores}, start.whole)
    job.method.download(job.model, state, None)
    for name, adapter in job.model.adapters.items():
        x = torch.randn(3, 5, adapter.shape[1])
        weight = adapter.base.weight + 2 * product(state, name, cores[name]).float()
        expected = x @ weight.T + adapter.base.bias
        torch.testing.assert_close(adapter(x), expected, rtol=0, atol=1e-5)
        a, b = adapter.form.pair(adapter)
        torch.testing.assert_close(2 * b @ a, weight - adapter.base.weight, rtol=0, atol=1e-5)


def test_only_r_and_the_head_train() -> None:
    job = make_tiny_job(*FED_SB)
    state = opened(job)
    client = Client(client_id=0, num_examples=8, model=job.model)
    job.method.download(job.model, state, client)
    start_client(client, job.method, job.training, state)
    job.method.local_step(client, job.train.batch(torch.arange(8), job.device))
    trained = {name for name, p in job.model.module.named_parameters() if p.requires_grad}
    layers = set(job.model.adapters)
    assert trained == {f"{name}.parts.R" for name in layers} | set(state.whole)
    for name, adapter in job.model.adapters.items():
        assert (adapter.parts["R"] - state.parts["R"][name]).abs().max() > 1e-3
        assert torch.equal(adapter.fixed["A"], state.fixed["A"][name])
        assert torch.equal(adapter.fixed["B"], state.fixed["B"][name])


def test_the_mean_of_r_is_the_mean_update() -> None:
    job = make_tiny_job(*FED_SB)
    state = play_rounds(job, num_rounds=1)[-1].after
    uploads = [train_one_client(job, state, client_id) for client_id in draw_cohort(job, 1)]
    after = job.method.aggregate(state, received(job.method, state, uploads))
    num_examples = sum(upload.num_examples for upload in uploads)
    assert len({upload.num_examples for upload in uploads}) > 1
    for i, name in enumerate(sorted(state.parts["R"])):
        cores = [upload.values[16 * i : 16 * i + 16].reshape(4, 4) for upload in uploads]
        mean = sum(
            upload.num_examples / num_examples * product(state, name, core)
            for upload, core in zip(uploads, cores, strict=True)
        )
        server = product(after, name, after.parts["R"][name])
        assert (cores[0] - cores[1]).abs().max() > 1e-3
        torch.testing.assert_close(server, mean, rtol=0, atol=1e-5)
    assert after.fixed is state.fixed


@dataclass(frozen=True, kw_only=True)
class FrozenA(Lora):
    def form(self, state: ServerState) -> LowRank:
        return LowRank(scale=state.adapter.scale, frozen=("A",))


def test_with_a_square_b_it_is_lora_with_a_frozen() -> None:
    """B B^T = I: an SGD step on R moves B R as it would move LoRA's B."""
    same = (
        *("adapter.targets=['value', 'attention.output.dense']", "model.dropout=0.0"),
        *("train.optimizer=sgd", "train.lr=1.0", "adapter.lora_rank=32", "adapter.lora_alpha=64.0"),
    )
    fed_sb, lora = (
        make_tiny_job("method.name=fed_sb", *same),
        make_tiny_job("method.name=lora", *same),
    )
    state, method = opened(fed_sb), FrozenA()
    factors = state.fixed
    b = {name: (factors["B"][name] @ core).T for name, core in state.parts["R"].items()}
    after = replace(lora.state, round_index=1, last_round=state.last_round)
    start = with_parts(after, method.form(after), {"A": factors["A"], "B": b}, state.whole)
    lora = replace(lora, method=method)
    pairs = zip(play_rounds(fed_sb, state, 2), play_rounds(lora, start, 2), strict=True)
    for ours, theirs in pairs:
        for name, core in ours.after.parts["R"].items():
            b = theirs.after.parts["B"][name].T
            torch.testing.assert_close(factors["B"][name] @ core, b, rtol=0, atol=1e-5)
            assert b.abs().max() > 1e-3
        assert abs(ours.row["train_loss"] - theirs.row["train_loss"]) < 1e-5


def test_gradients_go_up_once_and_a_and_b_down_once_to_each_client() -> None:
    """Round 0: gradients of 8 layers of 32 x 32 and 4 of 32 x 64 up, nothing down."""
    gradients = 24 + 4 * (8 * 32 * 32 + 4 * 32 * 64 + NUM_HEAD)
    usual = 24 + 4 * (12 * 4 * 4 + NUM_HEAD)
    factors = 4 * 4 * sum(d_out + d_in for d_out, d_in in SHAPES)
    seen: set[int] = set()
    num_new = []
    first, *rounds = play_rounds(make_tiny_job(*FED_SB, "train.local_steps=1"))
    assert first.row["uplink_bytes"] == 5 * gradients
    assert first.row["downlink_bytes"] == 5 * 24
    for played in rounds:
        cohort = set(played.row["cohort"])
        num_new.append(len(cohort - seen))
        assert played.row["uplink_bytes"] == 5 * usual
        assert played.row["downlink_bytes"] == 5 * usual + num_new[-1] * factors
        assert set(played.row["live_triplets_by_adapter"].values()) == {4}
        seen |= cohort
    assert num_new[0] == 5
    assert sum(num_new) == len(seen) > 5
