"""Fed-SB: B R A against dense weights, exact means, the reduction to LoRA with A frozen, bytes."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.models.encoders import build_model
from bench.run.clients import draw_cohort
from fedara_core.adapters import LowRank
from fedara_core.method import Client, load_method
from fedara_core.state import ServerState, with_parts
from fedara_core.train import start_client
from support.rounds import make_tiny_job, play_rounds, received, train_one_client

FED_SB = ("method.name=fed_sb", "adapter.lora_alpha=8.0", "train.lr=2e-2")  # scale 2
SHAPES = [(32, 32)] * 8 + [(64, 32), (32, 64)] * 2  # tiny.toml's model
NUM_HEAD = 4 * 32 + 4
Lora: Any = load_method("lora")


def product(state: ServerState, name: str, core: Tensor) -> Tensor:
    """B R A (d_out, d_in), in float64."""
    return state.fixed["B"][name].double() @ core.double() @ state.fixed["A"][name].double()


def test_a_and_b_are_the_leading_singular_vectors() -> None:
    state = (job := make_tiny_job(*FED_SB)).state
    for name, adapter in job.model.adapters.items():
        a, b = state.fixed["A"][name], state.fixed["B"][name]
        torch.testing.assert_close(a @ a.T, torch.eye(4), rtol=0, atol=1e-6)
        torch.testing.assert_close(b.T @ b, torch.eye(4), rtol=0, atol=1e-6)
        u, s, vt = np.linalg.svd(adapter.base.weight.detach().double().numpy())
        best = u[:, :4] @ np.diag(s[:4]) @ vt[:4]
        found = product(state, name, torch.from_numpy(np.diag(s[:4])))
        np.testing.assert_allclose(found.numpy(), best, atol=1e-6)
        assert state.parts["R"][name].shape == (4, 4)
        assert not state.parts["R"][name].any()


def test_the_start_leaves_the_function_as_it_was() -> None:
    job = make_tiny_job(*FED_SB)
    batch = job.train.batch(torch.arange(8), job.device)
    plain = build_model(job.config.model, num_classes=4, seed=job.config.seed).model.eval()
    job.method.download(job.model, job.state, None)
    job.model.module.eval()
    with torch.no_grad():
        before = plain(batch["input_ids"], batch["attention_mask"])
        after = job.model.module(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_a_layer_is_its_dense_weight() -> None:
    """With an R that is not symmetric: R[i] is row i, not column i."""
    job = make_tiny_job(*FED_SB)
    torch.manual_seed(2)
    cores = {name: torch.randn(4, 4) for name in job.state.parts["R"]}
    form = job.method.form(job.state)
    state = with_parts(job.state, form, {"R": cores}, job.state.whole)
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
    client = Client(client_id=0, num_examples=8, model=job.model)
    job.method.download(job.model, job.state, client)
    start_client(client, job.method, job.training, job.state)
    job.method.local_step(client, job.train.batch(torch.arange(8), job.device))
    trained = {name for name, p in job.model.module.named_parameters() if p.requires_grad}
    layers = set(job.model.adapters)
    assert trained == {f"{name}.parts.R" for name in layers} | set(job.state.whole)
    for name, adapter in job.model.adapters.items():
        assert adapter.parts["R"].abs().max() > 1e-3  # from R = 0 it has a gradient
        assert torch.equal(adapter.fixed["A"], job.state.fixed["A"][name])
        assert torch.equal(adapter.fixed["B"], job.state.fixed["B"][name])


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
    factors = fed_sb.state.fixed
    zeros = {name: torch.zeros(32, 32) for name in factors["A"]}
    parts, method = {"A": factors["A"], "B": zeros}, FrozenA()
    start = with_parts(lora.state, method.form(lora.state), parts, lora.state.whole)
    lora = replace(lora, method=method, state=start)
    for ours, theirs in zip(play_rounds(fed_sb, None, 2), play_rounds(lora, None, 2), strict=True):
        for name, core in ours.after.parts["R"].items():
            b = theirs.after.parts["B"][name].T
            torch.testing.assert_close(factors["B"][name] @ core, b, rtol=0, atol=1e-5)
            assert b.abs().max() > 1e-3
        assert abs(ours.row["train_loss"] - theirs.row["train_loss"]) < 1e-5


def test_a_and_b_travel_once_to_each_client() -> None:
    usual = 24 + 4 * (12 * 4 * 4 + NUM_HEAD)
    factors = 4 * 4 * sum(d_out + d_in for d_out, d_in in SHAPES)
    seen: set[int] = set()
    num_new = []
    for played in play_rounds(make_tiny_job(*FED_SB, "train.local_steps=1")):
        cohort = set(played.row["cohort"])
        num_new.append(len(cohort - seen))
        assert played.row["uplink_bytes"] == 5 * usual
        assert played.row["downlink_bytes"] == 5 * usual + num_new[-1] * factors
        assert set(played.row["live_triplets_by_adapter"].values()) == {4}
        seen |= cohort
    assert num_new[0] == 5
    assert sum(num_new) == 8
