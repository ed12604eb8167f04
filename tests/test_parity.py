"""Parity: with PEFT on the same weights, with plain PyTorch loops, and between methods."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from peft.tuners.adalora import RankAllocator, SVDLinear
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from torch.nn import functional

from bench.models.encoders import build_model
from bench.run.clients import client_batches, draw_cohort
from bench.run.job import Job
from fedara_core.adapters import (
    Adapter,
    LowRank,
    Rows,
    adapter_shapes,
    named_adapters,
    read_rows,
    write_rows,
)
from fedara_core.importance import ImportanceMeter
from fedara_core.method import Client, ServerState, whole_parameters, write_whole
from fedara_core.methods.slora import Sparse, num_sparse, weight_mask
from fedara_core.train import start_client
from support.rounds import make_tiny_job, play_rounds, train_one_client

HEAD = ("classifier.bias", "classifier.weight")


def first_batch(job: Job) -> Mapping[str, Tensor]:
    return job.train.batch(torch.arange(8), job.device)


def fresh_model(job: Job) -> nn.Module:
    """The job's model before `inject`: same weights, own tensors."""
    num_classes = job.label_counts.shape[1]
    built = build_model(job.config.model, num_classes=num_classes, seed=job.config.seed)
    return built.model


# ---- PEFT ----


def test_a_lora_step_equals_pefts() -> None:
    """Logits, gradients and the weights after one AdamW step, with weight decay."""
    job = make_tiny_job(
        *("method.name=lora", "adapter.targets=['query', 'value']", "adapter.lora_alpha=6.0"),
        *("model.dropout=0.0", "train.weight_decay=0.1", "train.max_grad_norm=1e9"),
    )
    assert len(job.state.rows) == 4
    torch.manual_seed(3)
    rows = {name: 0.2 * torch.randn_like(values) for name, values in job.state.rows.items()}
    state = replace(job.state, rows=rows)
    client = Client(client_id=0, num_examples=8, model=job.model)
    job.method.download(job.model, state, client)
    start_client(client, job.method, job.training, state)

    config = peft.LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.0, target_modules=["query", "value"], bias="none"
    )
    theirs = LoraModel(fresh_model(job), config, "default")
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        for name, values in rows.items():
            layer = theirs.model.get_submodule(name)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            d_in = a.shape[1]
            a.copy_(values[:, :d_in])
            b.copy_(values[:, d_in:].T)
            pairs[name] = (a, b)
    theirs.model.classifier.requires_grad_(True)
    theirs.train()
    optimizer = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=job.training.lr, weight_decay=0.1
    )

    batch = first_batch(job)
    with torch.no_grad():
        expected = theirs(batch["input_ids"], batch["attention_mask"])
        logits = job.model(batch["input_ids"], batch["attention_mask"])
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    loss = functional.cross_entropy(
        theirs(batch["input_ids"], batch["attention_mask"]), batch["labels"]
    )
    loss.backward()
    client.backward(batch)
    assert client.train_loss == pytest.approx(loss.item(), abs=1e-6)
    for name, adapter in named_adapters(job.model):
        a, b = pairs[name]
        assert a.grad is not None
        assert a.grad.abs().max() > 1e-4
        torch.testing.assert_close(adapter.parts["A"].grad, a.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(adapter.parts["B"].grad, b.grad.T, rtol=1e-4, atol=1e-6)
    optimizer.step()
    client.step()
    for name, values in read_rows(job.model).items():
        a, b = pairs[name]
        torch.testing.assert_close(values, torch.cat([a, b.T], dim=1), rtol=0, atol=1e-5)
        assert (values - rows[name]).abs().max() > 1e-3
    for name, parameter in whole_parameters(job.model).items():
        expected = theirs.model.get_parameter(name)
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-5)


def adalora_pair(seed: int = 0) -> tuple[Adapter, SVDLinear, Tensor]:
    """An Adapter without rows and PEFT's layer with the rows (6, 10 + 1 + 7) returned."""
    torch.manual_seed(seed)
    base = nn.Linear(10, 7)
    rows = torch.randn(6, 18)
    config = peft.AdaLoraConfig(init_r=6, lora_alpha=9, lora_dropout=0.0, total_step=10)
    theirs = SVDLinear(base, "default", config=config, r=6, lora_alpha=9)
    with torch.no_grad():
        theirs.lora_A["default"].copy_(rows[:, :10])
        theirs.lora_E["default"].copy_(rows[:, 10:11])
        theirs.lora_B["default"].copy_(rows[:, 11:].T)
    return Adapter("layer", base), theirs, rows


# PEFT divides by ranknum + 1e-5, which stays 6 whatever is pruned; so does our scale.
ADALORA_FORM = LowRank(scale=9 / (6 + 1e-5), singular=True)


def test_pruned_triplets_equal_adaloras_masked_e() -> None:
    ours, theirs, rows = adalora_pair()
    live = torch.tensor([True, False, True, True, False, False])
    ours.write(rows[live], ADALORA_FORM)
    with torch.no_grad():
        theirs.lora_E["default"].masked_fill_(~live[:, None], 0.0)
    x = torch.randn(5, 10)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    grads = {
        "A": theirs.lora_A["default"].grad,
        "E": theirs.lora_E["default"].grad,
        "B": theirs.lora_B["default"].grad.T,
    }
    for part, grad in grads.items():
        torch.testing.assert_close(ours.parts[part].grad, grad[live], rtol=1e-5, atol=1e-4)
    assert not torch.allclose(ours(x), ours.base(x), atol=0.1)


def test_smoothed_scores_equal_adaloras_allocator() -> None:
    ours, theirs, rows = adalora_pair()
    ours.write(rows, ADALORA_FORM)
    our_model = nn.ModuleDict({"layer": ours})
    config = peft.AdaLoraConfig(init_r=6, target_r=2, total_step=10, beta1=0.85, beta2=0.85)
    their_model = nn.ModuleDict({"layer": theirs})
    allocator = RankAllocator(their_model, config, "default")
    meter = ImportanceMeter("smoothed")
    for _ in range(3):
        x = torch.randn(5, 10)
        for model in (our_model, their_model):
            model.zero_grad()
            model["layer"](x).square().mean().backward()
        meter.observe(our_model)
        allocator.update_ipt(their_model)
    a, e, b = (allocator._element_score(f"layer.lora_{part}.default") for part in "AEB")
    expected = e.view(-1) + a.mean(dim=1) + b.mean(dim=0)
    scores = meter.scores(our_model)["layer"]
    assert len(set(scores.tolist())) == 6
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=0)


# ---- plain PyTorch ----


class PlainLowRank(nn.Module):
    """W0 x + scale B (E * A x), written with nn.Linear; E only for the SVD form."""

    def __init__(self, base: nn.Linear, rows: Tensor, scale: float, *, singular: bool) -> None:
        super().__init__()
        d_in, d_out = base.in_features, base.out_features
        self.base, self.scale = base, scale
        self.A = nn.Linear(d_in, len(rows), bias=False)
        self.B = nn.Linear(len(rows), d_out, bias=False)
        self.E = nn.Parameter(rows[:, d_in].clone()) if singular else None
        with torch.no_grad():
            self.A.weight.copy_(rows[:, :d_in])
            self.B.weight.copy_(rows[:, -d_out:].T)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.A(x)
        if self.E is not None:
            hidden = hidden * self.E
        return self.base(x) + self.scale * self.B(hidden)

    def rows(self) -> Tensor:
        e = [] if self.E is None else [self.E[:, None]]
        return torch.cat([self.A.weight, *e, self.B.weight.T], dim=1).detach()


def plain_client(
    job: Job, rows: Rows, head: Mapping[str, Tensor], round_index: int, client_id: int
) -> tuple[nn.Module, Rows, dict[str, Tensor], float]:
    """One client's local training without a line of fedara_core but its batches."""
    model = fresh_model(job).requires_grad_(False)
    singular = job.config.method.name == "fedara"
    scale = job.config.adapter.lora_alpha / job.config.adapter.lora_rank
    wrapped = {}
    for name, values in rows.items():
        parent, _, child = name.rpartition(".")
        base = model.get_submodule(name)
        wrapped[name] = PlainLowRank(base, values, scale, singular=singular)
        setattr(model.get_submodule(parent), child, wrapped[name])
    for name in HEAD:
        with torch.no_grad():
            model.get_parameter(name).copy_(head[name])
        model.get_parameter(name).requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.config.train.lr, weight_decay=0.0)
    losses = []
    model.train()
    for batch in client_batches(job, round_index, client_id):
        optimizer.zero_grad()
        loss = functional.cross_entropy(
            model(batch["input_ids"], batch["attention_mask"]), batch["labels"]
        )
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    new_rows = {name: module.rows() for name, module in wrapped.items()}
    new_head = {name: model.get_parameter(name).detach().clone() for name in HEAD}
    return model, new_rows, new_head, sum(losses) / len(losses)


def assert_state(state: ServerState, rows: Rows, head: Mapping[str, Tensor]) -> None:
    assert state.rows.keys() == rows.keys()
    for name, values in rows.items():
        torch.testing.assert_close(state.rows[name], values, rtol=0, atol=1e-6)
    for name in HEAD:
        torch.testing.assert_close(state.whole[name], head[name], rtol=0, atol=1e-6)


def test_one_client_is_plain_fine_tuning() -> None:
    job = make_tiny_job(
        *("method.name=lora", "model.dropout=0.0", "adapter.lora_alpha=8.0"),
        *("federation.num_clients=1", "federation.cohort=1", "federation.num_rounds=2"),
        *("train.local_steps=6", "train.lr=1e-2"),
    )
    plain = fresh_model(job)
    rows: Rows = job.state.rows
    head: Mapping[str, Tensor] = {name: plain.get_parameter(name).detach() for name in HEAD}
    for played in play_rounds(job):
        model, rows, head, loss = plain_client(job, rows, head, played.before.round_index, 0)
        assert_state(played.after, rows, head)
        assert played.row["train_loss"] == pytest.approx(loss, abs=1e-6)
    assert not torch.allclose(rows[next(iter(rows))], job.state.rows[next(iter(rows))], atol=1e-3)
    model.eval()
    with torch.no_grad():
        batch = job.evaluated.batch(torch.arange(len(job.evaluated)), job.device)
        predicted = model(batch["input_ids"], batch["attention_mask"]).argmax(dim=1)
    right = (predicted == batch["labels"]).double().mean()
    assert played.row["accuracy"] == pytest.approx(float(right), abs=1e-9)


def test_fedara_without_pruning_is_svd_fedavg() -> None:
    job = make_tiny_job(
        *("method.rank_allocation=false", "method.module_pruning=false", "model.dropout=0.0"),
        *("federation.cohort=3", "federation.num_rounds=2", "train.lr=1e-2"),
    )
    rows: Rows = job.state.rows
    for name, (d_out, d_in) in adapter_shapes(job.model).items():
        assert rows[name].shape == (4, d_in + 1 + d_out)
        assert not rows[name][:, d_in].any()  # E = 0
        assert rows[name][:, :d_in].std() == pytest.approx(0.1, rel=0.3)
        assert rows[name][:, d_in + 1 :].std() == pytest.approx(0.1, rel=0.3)
    head: Mapping[str, Tensor] = job.state.whole
    for played in play_rounds(job):
        cohort = played.row["cohort"]
        assert len(cohort) == 3
        num_examples = [len(job.shards[client_id]) for client_id in cohort]
        shares = [n / sum(num_examples) for n in num_examples]
        round_index = played.before.round_index
        clients = [plain_client(job, rows, head, round_index, k)[1:3] for k in cohort]
        rows = {
            name: sum(p * client[0][name] for p, client in zip(shares, clients, strict=True))
            for name in rows
        }
        head = {
            name: sum(p * client[1][name] for p, client in zip(shares, clients, strict=True))
            for name in HEAD
        }
        assert_state(played.after, rows, head)
        assert played.row["live_triplets"] == 48
    assert all((values[:, d_in] != 0).all() for values, d_in in _with_d_in(job, rows))


def _with_d_in(job: Job, rows: Rows) -> Sequence[tuple[Tensor, int]]:
    return [(rows[name], d_in) for name, (_, d_in) in adapter_shapes(job.model).items()]


# ---- reductions and continuity ----


def test_slora_at_density_0_is_lora() -> None:
    common = ("federation.num_rounds=3", "train.local_steps=2")
    slora = play_rounds(make_tiny_job("method.name=slora", "method.density=0.0", *common))
    lora = play_rounds(make_tiny_job("method.name=lora", *common))
    assert slora[0].before.digest() == lora[0].before.digest()
    for ours, theirs in zip(slora, lora, strict=True):
        assert ours.row == theirs.row


def test_dropping_triplets_does_not_move_the_function() -> None:
    job = make_tiny_job("model.dropout=0.0", "train.lr=2e-2")
    state = play_rounds(job, num_rounds=3)[-1].after
    cohort = draw_cohort(job, state.round_index)
    uploads = [train_one_client(job, state, client_id) for client_id in cohort]
    after = job.method.aggregate(state, uploads)
    dropped = {name: state.rank_masks[name] & ~after.rank_masks[name] for name in state.rows}
    assert sum(int(mask.sum()) for mask in dropped.values()) > 5

    whole = replace(job.method, rank_allocation=False).aggregate(state, uploads)
    zeroed = {name: values.clone() for name, values in whole.rows.items()}
    for name, (_, d_in) in adapter_shapes(job.model).items():
        zeroed[name][~after.rank_masks[name], d_in] = 0
    full_size = {name: torch.ones_like(mask) for name, mask in state.rank_masks.items()}
    form = LowRank(scale=1.0, singular=True)
    batch = first_batch(job)
    job.model.eval()

    def logits(rows: Rows, rank_masks: Mapping[str, Tensor]) -> Tensor:
        write_rows(job.model, rows, dict(rank_masks), form)
        write_whole(job.model, after.whole)
        with torch.no_grad():
            return job.model(batch["input_ids"], batch["attention_mask"])

    expected = logits(zeroed, full_size)
    job.method.download(job.model, after, None)
    with torch.no_grad():
        evaluated = job.model(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(evaluated, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(whole.rows, after.rank_masks), expected, rtol=0, atol=1e-6)
    assert (logits(whole.rows, full_size) - expected).abs().max() > 1e-5  # they did something


# ---- SLoRA's two stages ----

SLORA = (
    *("method.name=slora", "method.density=0.05", "method.stage1_fraction=0.5"),
    *("adapter.lora_alpha=8.0", "train.local_steps=2", "train.lr=2e-2"),
)
SHAPES = [(32, 32)] * 8 + [(64, 32), (32, 64)] * 2  # tiny.toml's model
NUM_HEAD = 4 * 32 + 4


def test_the_stage_switch_fires_and_the_bytes_follow() -> None:
    sparse = 24 + 4 * (8 * 51 + 4 * 102 + NUM_HEAD)  # round(0.05 * 1024), round(0.05 * 2048)
    pairs = 24 + 4 * (4 * sum(d_out + d_in for d_out, d_in in SHAPES) + NUM_HEAD)
    assert sparse != pairs
    played = play_rounds(make_tiny_job(*SLORA), num_rounds=5)
    expected = [5 * sparse] * 3 + [5 * pairs] * 2
    assert [r.row["uplink_bytes"] for r in played] == expected
    assert [r.row["downlink_bytes"] for r in played] == expected
    assert [r.row["live_triplets"] for r in played] == [12, 12, 48, 48, 48]


@pytest.mark.parametrize(("fraction", "num_rounds", "first_pairs"), [(0.01, 4, 1), (0.9, 2, 1)])
def test_stage_1_takes_a_round_and_leaves_one(
    fraction: float, num_rounds: int, first_pairs: int
) -> None:
    job = make_tiny_job(
        *SLORA, f"method.stage1_fraction={fraction}", f"federation.num_rounds={num_rounds}"
    )
    assert sum(len(rows) for rows in job.state.rows.values()) == 12
    (played,) = play_rounds(job, num_rounds=1)
    assert played.after.round_index == first_pairs
    assert played.row["live_triplets"] == 48


def test_the_switch_starts_from_the_best_low_rank_approximation() -> None:
    job = make_tiny_job(*SLORA)
    state = play_rounds(job, num_rounds=2)[-1].after
    uploads = [train_one_client(job, state, k) for k in draw_cohort(job, 2)]
    after = job.method.aggregate(state, uploads)
    num_examples = np.array([upload.num_examples for upload in uploads], dtype=float)
    stacked = np.stack([upload.values.numpy().astype(float) for upload in uploads])
    mean = num_examples @ stacked / num_examples.sum()
    start = 0
    for name, (d_out, d_in) in adapter_shapes(job.model).items():
        index = weight_mask(0, 0.05, name, (d_out, d_in)).numpy()
        delta = np.zeros(d_out * d_in)
        delta[index] = mean[start : start + len(index)]
        start += len(index)
        u, s, vt = np.linalg.svd(delta.reshape(d_out, d_in))
        best = u[:, :4] @ np.diag(s[:4]) @ vt[:4]
        rows = after.rows[name].double().numpy()
        a, b = rows[:, :d_in], rows[:, d_in:].T
        assert s[3] > 1e-3
        np.testing.assert_allclose(2.0 * b @ a, best, atol=1e-6)
        # S is shared evenly: neither factor is left with all of it.
        np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0), rtol=1e-3)
    assert start + NUM_HEAD == len(mean)


def test_weight_masks_come_from_the_seed() -> None:
    drawn = weight_mask(0, 0.05, "query", (32, 48))
    assert len(drawn) == num_sparse((32, 48), 0.05) == round(0.05 * 32 * 48) == 77
    assert (drawn.diff() > 0).all()
    assert drawn[0] >= 0
    assert drawn[-1] < 32 * 48
    weight_mask.cache_clear()
    torch.manual_seed(99)  # the global generator has no say
    assert torch.equal(drawn, weight_mask(0, 0.05, "query", (32, 48)))
    for other in (
        weight_mask(1, 0.05, "query", (32, 48)),
        weight_mask(0, 0.05, "key", (32, 48)),
    ):
        assert not torch.equal(drawn, other)
    assert len(weight_mask(0, 1e-6, "query", (32, 48))) == 1


def test_stage_1_changes_masked_weights_only() -> None:
    job = make_tiny_job(*SLORA)
    state = play_rounds(job, num_rounds=1)[-1].after
    assert isinstance(job.method.form(state), Sparse)
    job.method.download(job.model, state, None)
    for name, adapter in named_adapters(job.model):
        d_out, d_in = adapter.shape
        with torch.no_grad():  # the rows of the identity give the columns of the weight
            weight = (adapter(torch.eye(d_in)) - adapter.base.bias).T
        changed = (weight != adapter.base.weight).reshape(-1).nonzero().squeeze(1)
        index = weight_mask(0, 0.05, name, (d_out, d_in))
        assert set(changed.tolist()) <= set(index.tolist())
        assert len(changed) > 0.9 * len(index)
        difference = (weight - adapter.base.weight).reshape(-1)[index]
        torch.testing.assert_close(difference, state.rows[name][0], rtol=0, atol=1e-6)


def test_a_single_round_has_no_stage_1() -> None:
    job = make_tiny_job(*SLORA, "method.stage1_fraction=0.9", "federation.num_rounds=1")
    assert sum(len(rows) for rows in job.state.rows.values()) == 48
