"""Ravan: heads against dense weights, bases, exact means, Fed-SB's form with one head, bytes."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.run.clients import draw_cohort
from bench.run.job import Job
from fedara_core.errors import InputError
from fedara_core.method import Client, load_method
from fedara_core.methods.fed_sb import Core
from fedara_core.state import ServerState, with_parts
from fedara_core.train import start_client
from support.rounds import logits_at_start, make_tiny_job, play_rounds, received, train_one_client

RAVAN = ("method.name=ravan", "adapter.lora_alpha=8.0", "train.lr=2e-2")  # scale 2, r = 4, h = 4
SHAPES = [(32, 32)] * 8 + [(64, 32), (32, 64)] * 2  # tiny.toml's model
NUM_HEAD = 4 * 32 + 4
Lora: Any = load_method("lora")


def change(state: ServerState, name: str, cores: Tensor) -> Tensor:
    """sum_i B_i C_i A_i (d_out, d_in) for cores (h, r, r), head by head, in float64."""
    a, b = state.fixed["A"][name].double(), state.fixed["B"][name].double()
    heads = enumerate(cores.double())
    return torch.stack([b[:, 4 * i : 4 * i + 4] @ c @ a[4 * i : 4 * i + 4] for i, c in heads]).sum(
        0
    )


def with_heads(job: Job, seed: int) -> ServerState:
    """The job's state with random H_i and s_i."""
    draw = torch.Generator().manual_seed(seed)
    parts = {
        part: {name: torch.randn(rows.shape, generator=draw) for name, rows in own.items()}
        for part, own in job.state.parts.items()
    }
    return with_parts(job.state, job.method.form(job.state), parts, job.state.whole)


# ---- the form ----


def test_a_head_by_hand() -> None:
    """Two heads of rank 1 on a 2 x 2 layer: A = I, B = I, H = 3 and 5, s = 2 and -1."""
    heads = load_method("ravan")(num_heads=2)
    job = make_tiny_job(*RAVAN)
    adapter = next(iter(job.model.adapters.values()))
    form = heads.form(job.state)
    adapter.base = torch.nn.Linear(2, 2)
    with torch.no_grad():
        adapter.base.weight.zero_()
        adapter.base.bias.zero_()
    adapter.fixed = {"A": torch.eye(2), "B": torch.eye(2)}
    adapter.parts.clear()
    adapter.parts["H"] = torch.nn.Parameter(torch.tensor([[3.0], [5.0]]))
    adapter.parts["s"] = torch.nn.Parameter(torch.tensor([[2.0], [-1.0]]))
    adapter.form, adapter.num_live = replace(form, lora_rank=1), 2
    found = adapter(torch.tensor([[1.0, 1.0]]))
    torch.testing.assert_close(found, 2 * torch.tensor([[6.0, -5.0]]))  # scale 2


@pytest.mark.parametrize("bases", ["orthogonal", "normal"])
def test_a_layer_is_its_dense_weight(bases: str) -> None:
    """With H_i that are not symmetric."""
    job = make_tiny_job(*RAVAN, f"method.bases={bases}")
    state = with_heads(job, seed=2)
    job.method.download(job.model, state, None)
    for name, adapter in job.model.adapters.items():
        x = torch.randn(3, 5, adapter.shape[1])
        cores = state.parts["s"][name] * state.parts["H"][name]
        dense = 2 * change(state, name, cores.view(4, 4, 4)).float()
        expected = x @ (adapter.base.weight + dense).T + adapter.base.bias
        torch.testing.assert_close(adapter(x), expected, rtol=1e-4, atol=1e-4)
        a, b = adapter.form.pair(adapter)
        torch.testing.assert_close(2 * b @ a, dense, rtol=1e-4, atol=1e-4)


def test_the_start_leaves_the_function_as_it_was() -> None:
    job = make_tiny_job(*RAVAN)
    before, after = logits_at_start(job)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_orthogonal_bases() -> None:
    """Over all heads, so that they reach rank h r together."""
    job = make_tiny_job(*RAVAN)
    state = with_heads(job, seed=2)
    for name in job.model.adapters:
        a, b = state.fixed["A"][name], state.fixed["B"][name]
        torch.testing.assert_close(a @ a.T, torch.eye(16), rtol=0, atol=1e-6)
        torch.testing.assert_close(b.T @ b, torch.eye(16), rtol=0, atol=1e-6)
        cores = state.parts["H"][name].view(4, 4, 4)
        assert torch.linalg.matrix_rank(change(state, name, cores)) == 16


def test_normal_bases_have_about_unit_length() -> None:
    state = make_tiny_job(*RAVAN, "method.bases=normal", "method.num_heads=64").state
    for name in state.fixed["A"]:
        assert abs(state.fixed["A"][name].square().sum(1).mean() - 1) < 0.1
        assert abs(state.fixed["B"][name].square().sum(0).mean() - 1) < 0.1


def test_more_orthogonal_directions_than_a_layer_has() -> None:
    with pytest.raises(InputError, match="36 orthogonal directions"):
        make_tiny_job(*RAVAN, "method.num_heads=9")


# ---- training and means ----


def test_h_s_and_the_classifier_train() -> None:
    """s from the second step on: with H = 0 it has no gradient."""
    job = make_tiny_job(*RAVAN)
    client = Client(client_id=0, num_examples=8, model=job.model)
    job.method.download(job.model, job.state, client)
    start_client(client, job.method, job.training, job.state)
    fixed = {name: dict(adapter.fixed) for name, adapter in job.model.adapters.items()}
    for step in range(2):
        job.method.local_step(client, job.train.batch(torch.arange(8), job.device))
        for adapter in job.model.adapters.values():
            assert adapter.parts["H"].abs().max() > 1e-3
            assert ((adapter.parts["s"] - 1).abs().max() > 1e-3) == (step > 0)
    for name, adapter in job.model.adapters.items():
        assert all(torch.equal(adapter.fixed[part], fixed[name][part]) for part in "AB")


def test_uploads_are_s_times_h_and_their_mean_is_the_mean_update() -> None:
    job = make_tiny_job(*RAVAN)
    state = play_rounds(job, num_rounds=1)[-1].after
    uploads, updates = [], []
    for client_id in draw_cohort(job, 1):
        uploads.append(train_one_client(job, state, client_id))
        parts = job.model.index.parts(job.model.vector.clone())
        cores = {name: (parts["s"][name] * h).view(4, 4, 4) for name, h in parts["H"].items()}
        updates.append({name: change(state, name, own) for name, own in cores.items()})
    after = job.method.aggregate(state, received(job.method, state, uploads))
    num_examples = sum(upload.num_examples for upload in uploads)
    for name, h in after.parts["H"].items():
        mean = sum(
            upload.num_examples / num_examples * update[name]
            for upload, update in zip(uploads, updates, strict=True)
        )
        assert (updates[0][name] - updates[1][name]).abs().max() > 1e-3
        server = change(after, name, h.view(4, 4, 4))
        torch.testing.assert_close(server, mean, rtol=0, atol=1e-6)
        assert (after.parts["s"][name] == 1).all()
    assert after.fixed is state.fixed


# ---- reduction and bytes ----


@dataclass(frozen=True, kw_only=True)
class OneCore(Lora):
    """Fed-SB's form under FedAvg."""

    def form(self, state: ServerState) -> Core:
        return Core(scale=state.adapter.scale, lora_rank=state.adapter.lora_rank)


@pytest.mark.parametrize("train_scales", [True, False])
def test_one_head_is_fed_sbs_form(train_scales: bool) -> None:
    """With the same bases: for a first step in any case, and for good where s does not train."""
    same = ("train.optimizer=sgd", "train.lr=1.0", "adapter.lora_alpha=8.0")
    same += ("train.local_steps=1",) if train_scales else ()
    words = ("method.num_heads=1", f"method.train_scales={str(train_scales).lower()}")
    ravan = make_tiny_job("method.name=ravan", *words, *same)
    plain = make_tiny_job("method.name=lora", *same)
    zeros = {name: torch.zeros(4, 4) for name in plain.model.adapters}
    method = OneCore()
    start = with_parts(plain.state, method.form(plain.state), {"R": zeros}, plain.state.whole)
    start = replace(start, fixed=ravan.state.fixed)
    theirs = play_rounds(replace(plain, method=method, state=start))
    num_rounds = 1 if train_scales else len(theirs)
    for one, other in zip(play_rounds(ravan, None, num_rounds), theirs, strict=False):
        for name, core in other.after.parts["R"].items():
            h = one.after.parts["H"][name].view(4, 4)
            assert core.norm() > 1e-5
            assert (h - core).norm() < 1e-4 * core.norm()


@pytest.mark.parametrize("num_heads", [1, 3])
def test_only_the_heads_and_the_classifier_travel(num_heads: int) -> None:
    words = (f"method.num_heads={num_heads}", "train.local_steps=1")
    for played in play_rounds(make_tiny_job(*RAVAN, *words), num_rounds=3):
        size = 24 + 4 * (len(SHAPES) * num_heads * 4 * 4 + NUM_HEAD)
        assert played.row["uplink_bytes"] == 5 * size
        if played.before.round_index:
            assert played.row["downlink_bytes"] == 5 * size
        assert set(played.row["live_triplets_by_adapter"].values()) == {num_heads}
