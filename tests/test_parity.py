"""Parity: with PEFT on the same weights, with plain PyTorch loops, and between methods."""

from collections.abc import Mapping
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
from fedara_core.adapters import AdaptedModel, LowRank, inject
from fedara_core.importance import ImportanceMeter
from fedara_core.method import Client
from fedara_core.methods.slora import Sparse, num_sparse, weight_mask
from fedara_core.state import ServerState, relaid
from fedara_core.train import start_client
from fedara_core.values import Index, Parts, Tensors, bits_of_masks, make_index
from support.pairs import model_parts, pair
from support.rounds import make_tiny_job, play_rounds, received, train_one_client

HEAD = ("classifier.bias", "classifier.weight")


def first_batch(job: Job) -> Mapping[str, Tensor]:
    return job.train.batch(torch.arange(8), job.device)


def fresh_model(job: Job) -> nn.Module:
    """The job's model before `inject`: same weights, own tensors."""
    num_classes = job.label_counts.shape[1]
    built = build_model(job.config.model, num_classes=num_classes, seed=job.config.seed)
    return built.model


# ---- PEFT ----


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_lora_step_equals_pefts(dropout: float) -> None:
    """Logits, gradients and the weights after one AdamW step, with weight decay; under dropout both
    draw the same masks from the same seed."""
    job = make_tiny_job(
        *("method.name=lora", "adapter.targets=['query', 'value']", "adapter.lora_alpha=6.0"),
        *(f"adapter.dropout={dropout}", "model.dropout_masks='torch'"),
        *("model.dropout=0.0", "train.weight_decay=0.1", "train.max_grad_norm=1e9"),
    )
    assert len(job.state.adapter.shapes) == 4
    torch.manual_seed(3)
    vector = job.state.vector.clone()
    vector[: job.state.index.num_row_values].normal_(0, 0.2)
    state = replace(job.state, vector=vector)
    client = Client(client_id=0, num_examples=8, model=job.model)
    job.method.download(job.model, state, client)
    start_client(client, job.method, job.training, state)

    config = peft.LoraConfig(
        r=4, lora_alpha=6, lora_dropout=dropout, target_modules=["query", "value"], bias="none"
    )
    theirs = LoraModel(fresh_model(job), config, "default")
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        for name in state.adapter.shapes:
            layer = theirs.model.get_submodule(name)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            a.copy_(state.parts["A"][name])
            b.copy_(state.parts["B"][name].T)
            pairs[name] = (a, b)
    theirs.model.classifier.requires_grad_(True)
    theirs.train()
    optimizer = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=job.training.lr, weight_decay=0.1
    )

    batch = first_batch(job)
    with torch.no_grad():
        torch.manual_seed(5)
        expected = theirs(batch["input_ids"], batch["attention_mask"])
        torch.manual_seed(5)
        logits = job.model.module(batch["input_ids"], batch["attention_mask"])
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        job.model.module.eval()  # nothing is dropped
        whole = job.model.module(batch["input_ids"], batch["attention_mask"])
        assert torch.equal(logits, whole) == (dropout == 0)
        job.model.module.train()
    torch.manual_seed(5)
    loss = functional.cross_entropy(
        theirs(batch["input_ids"], batch["attention_mask"]), batch["labels"]
    )
    loss.backward()
    torch.manual_seed(5)
    client.backward(batch)
    assert client.train_loss == pytest.approx(loss.item(), abs=1e-6)
    for name, adapter in job.model.adapters.items():
        a, b = pairs[name]
        assert a.grad is not None
        assert a.grad.abs().max() > 1e-4
        torch.testing.assert_close(adapter.parts["A"].grad, a.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(adapter.parts["B"].grad, b.grad.T, rtol=1e-4, atol=1e-6)
    optimizer.step()
    client.step()
    ours = model_parts(job.model)
    for name, (a, b) in pairs.items():
        for part, expected in (("A", a), ("B", b.T)):
            torch.testing.assert_close(ours[part][name], expected, rtol=0, atol=1e-5)
            assert (ours[part][name] - state.parts[part][name]).abs().max() > 1e-3
    for name, parameter in job.model.whole_parameters.items():
        expected = theirs.model.get_parameter(name)
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-5)


def adalora_pair(seed: int = 0) -> tuple[AdaptedModel, SVDLinear, Parts]:
    """A model of one layer without rows, and PEFT's layer with the six triplets returned."""
    torch.manual_seed(seed)
    base = nn.Linear(10, 7)
    rows = torch.randn(6, 18)
    config = peft.AdaLoraConfig(init_r=6, lora_alpha=9, lora_dropout=0.0, total_step=10)
    theirs = SVDLinear(base, "default", config=config, r=6, lora_alpha=9)
    with torch.no_grad():
        theirs.lora_A["default"].copy_(rows[:, :10])
        theirs.lora_E["default"].copy_(rows[:, 10:11])
        theirs.lora_B["default"].copy_(rows[:, 11:].T)
    parts = {
        part: {"layer": half}
        for part, half in zip("AEB", rows.split([10, 1, 7], dim=1), strict=True)
    }
    return inject(nn.ModuleDict({"layer": base}), ["layer"], []), theirs, parts


# PEFT divides by ranknum + 1e-5, which stays 6 whatever is pruned; so does our scale.
ADALORA_FORM = LowRank(scale=9 / (6 + 1e-5), singular=True)


def load_layer(model: AdaptedModel, parts: Parts, live: Tensor) -> None:
    """Put the live ones of the six triplets into the model."""
    index = make_index(ADALORA_FORM, model.shapes, {"layer": int(live.sum())}, {})
    vector = index.pack({part: {"layer": own["layer"][live]} for part, own in parts.items()}, {})
    model.load(vector, index, ADALORA_FORM)


def test_pruned_triplets_equal_adaloras_masked_e() -> None:
    model, theirs, parts = adalora_pair()
    live = torch.tensor([True, False, True, True, False, False])
    load_layer(model, parts, live)
    ours = model.adapters["layer"]
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
    model, theirs, parts = adalora_pair()
    load_layer(model, parts, torch.ones(6).bool())
    config = peft.AdaLoraConfig(init_r=6, target_r=2, total_step=10, beta1=0.85, beta2=0.85)
    their_model = nn.ModuleDict({"layer": theirs})
    allocator = RankAllocator(their_model, config, "default")
    meter = ImportanceMeter("smoothed")
    for _ in range(3):
        x = torch.randn(5, 10)
        model.gradient.zero_()
        their_model.zero_grad()
        for module in (model.module, their_model):
            module["layer"](x).square().mean().backward()
        meter.observe(model)
        allocator.update_ipt(their_model)
    a, e, b = (allocator._element_score(f"layer.lora_{part}.default") for part in "AEB")
    expected = e.view(-1) + a.mean(dim=1) + b.mean(dim=0)
    scores = meter.scores(model)
    assert len(set(scores.tolist())) == 6
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=0)


# ---- plain PyTorch ----


class PlainLowRank(nn.Module):
    """W0 x + scale B (E * A x), written with nn.Linear; E only for the SVD form."""

    def __init__(self, base: nn.Linear, rows: Tensors, scale: float) -> None:
        """rows: by part, as the adapter would have them."""
        super().__init__()
        (lora_rank, d_in), (_, d_out) = rows["A"].shape, rows["B"].shape
        self.base, self.scale = base, scale
        self.A = nn.Linear(d_in, lora_rank, bias=False)
        self.B = nn.Linear(lora_rank, d_out, bias=False)
        self.E = nn.Parameter(rows["E"][:, 0].clone()) if "E" in rows else None
        with torch.no_grad():
            self.A.weight.copy_(rows["A"])
            self.B.weight.copy_(rows["B"].T)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.A(x)
        if self.E is not None:
            hidden = hidden * self.E
        return self.base(x) + self.scale * self.B(hidden)

    def rows(self) -> Tensors:
        e = {} if self.E is None else {"E": self.E[:, None].detach()}
        return {"A": self.A.weight.detach(), **e, "B": self.B.weight.T.detach()}


def plain_client(
    job: Job, parts: Parts, head: Mapping[str, Tensor], round_index: int, client_id: int
) -> tuple[nn.Module, Parts, Tensors, float]:
    """One client's local training without a line of fedara_core but its batches."""
    model = fresh_model(job).requires_grad_(False)
    scale = job.config.adapter.lora_alpha / job.config.adapter.lora_rank
    wrapped = {}
    for name in parts["A"]:
        parent, _, child = name.rpartition(".")
        base = model.get_submodule(name)
        wrapped[name] = PlainLowRank(base, {part: parts[part][name] for part in parts}, scale)
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
    new_parts = {part: {name: rows[part] for name, rows in new_rows.items()} for part in parts}
    new_head = {name: model.get_parameter(name).detach().clone() for name in HEAD}
    return model, new_parts, new_head, sum(losses) / len(losses)


def assert_state(state: ServerState, parts: Parts, head: Mapping[str, Tensor]) -> None:
    assert state.parts.keys() == parts.keys()
    for part, tensors in parts.items():
        assert state.parts[part].keys() == tensors.keys()
        for name, rows in tensors.items():
            torch.testing.assert_close(state.parts[part][name], rows, rtol=0, atol=1e-5)
    for name in HEAD:
        torch.testing.assert_close(state.whole[name], head[name], rtol=0, atol=1e-5)


def test_one_client_is_plain_fine_tuning() -> None:
    job = make_tiny_job(
        *("method.name=lora", "model.dropout=0.0", "adapter.lora_alpha=8.0"),
        *("federation.num_clients=1", "federation.cohort=1", "federation.num_rounds=2"),
        *("train.local_steps=6", "train.lr=1e-2"),
    )
    plain = fresh_model(job)
    parts: Parts = job.state.parts
    head: Mapping[str, Tensor] = {name: plain.get_parameter(name).detach() for name in HEAD}
    for played in play_rounds(job):
        model, parts, head, loss = plain_client(job, parts, head, played.before.round_index, 0)
        assert_state(played.after, parts, head)
        assert played.row["train_loss"] == pytest.approx(loss, abs=1e-6)
    first = next(iter(job.state.adapter.shapes))
    moved = played.after.parts["B"][first] - job.state.parts["B"][first]
    assert moved.abs().max() > 1e-3
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
    parts: Parts = job.state.parts
    for name, (d_out, d_in) in job.model.shapes.items():
        a, e, b = (parts[part][name] for part in "AEB")
        assert (a.shape, e.shape, b.shape) == ((4, d_in), (4, 1), (4, d_out))
        assert not e.any()
        assert a.std() == pytest.approx(0.1, rel=0.3)
        assert b.std() == pytest.approx(0.1, rel=0.3)
    head: Mapping[str, Tensor] = job.state.whole
    for played in play_rounds(job):
        cohort = played.row["cohort"]
        assert len(cohort) == 3
        num_examples = [len(job.shards[client_id]) for client_id in cohort]
        shares = [n / sum(num_examples) for n in num_examples]
        round_index = played.before.round_index
        clients = [plain_client(job, parts, head, round_index, k)[1:3] for k in cohort]
        both = list(zip(shares, clients, strict=True))
        parts = {
            part: {name: sum(p * client[0][part][name] for p, client in both) for name in own}
            for part, own in parts.items()
        }
        head = {name: sum(p * client[1][name] for p, client in both) for name in HEAD}
        assert_state(played.after, parts, head)
        assert played.row["live_triplets"] == 48
    assert all((e != 0).all() for e in parts["E"].values())


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
    after = job.method.aggregate(state, received(job.method, state, uploads))
    kept = bits_of_masks(after.rank_masks, state.rank_masks)
    assert int((~kept).sum()) > 5

    all_live = replace(job.method, rank_allocation=False)
    whole = all_live.aggregate(state, received(all_live, state, uploads))
    assert whole.index == state.index
    zeroed = whole.vector.clone()
    zeroed[whole.index.runs["E"]][~kept] = 0
    form = LowRank(scale=1.0, singular=True)
    batch = first_batch(job)
    module = job.model.module.eval()

    def logits(vector: Tensor, index: Index) -> Tensor:
        job.model.load(vector, index, form)
        with torch.no_grad():
            return module(batch["input_ids"], batch["attention_mask"])

    expected = logits(zeroed, whole.index)
    job.method.download(job.model, after, None)
    with torch.no_grad():
        evaluated = module(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(evaluated, expected, rtol=0, atol=1e-6)
    pruned = relaid(whole, form, after.rank_masks)
    torch.testing.assert_close(logits(pruned.vector, pruned.index), expected, rtol=0, atol=1e-6)
    change = logits(whole.vector, whole.index) - expected
    assert change.abs().max() > 1e-5  # they did something


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
    assert [r.row["downlink_bytes"] for r in played] == [5 * 24, *expected[1:]]
    assert [r.row["live_triplets"] for r in played] == [12, 12, 48, 48, 48]


@pytest.mark.parametrize(("fraction", "num_rounds", "first_pairs"), [(0.01, 4, 1), (0.9, 2, 1)])
def test_stage_1_takes_a_round_and_leaves_one(
    fraction: float, num_rounds: int, first_pairs: int
) -> None:
    job = make_tiny_job(
        *SLORA, f"method.stage1_fraction={fraction}", f"federation.num_rounds={num_rounds}"
    )
    assert job.state.num_live == 12
    (played,) = play_rounds(job, num_rounds=1)
    assert played.after.round_index == first_pairs
    assert played.row["live_triplets"] == 48


def test_the_switch_starts_from_the_best_low_rank_approximation() -> None:
    job = make_tiny_job(*SLORA)
    state = play_rounds(job, num_rounds=2)[-1].after
    uploads = [train_one_client(job, state, k) for k in draw_cohort(job, 2)]
    after = job.method.aggregate(state, received(job.method, state, uploads))
    num_examples = np.array([upload.num_examples for upload in uploads], dtype=float)
    stacked = np.stack([upload.values.numpy().astype(float) for upload in uploads])
    mean = num_examples @ stacked / num_examples.sum()
    start = 0
    for name, (d_out, d_in) in job.model.shapes.items():
        index = weight_mask(0, 0.05, name, (d_out, d_in)).numpy()
        delta = np.zeros(d_out * d_in)
        delta[index] = mean[start : start + len(index)]
        start += len(index)
        u, s, vt = np.linalg.svd(delta.reshape(d_out, d_in))
        best = u[:, :4] @ np.diag(s[:4]) @ vt[:4]
        a, b = pair(after.parts, name)
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
    for name, adapter in job.model.adapters.items():
        d_out, d_in = adapter.shape
        with torch.no_grad():  # the rows of the identity give the columns of the weight
            weight = (adapter(torch.eye(d_in)) - adapter.base.bias).T
        changed = (weight != adapter.base.weight).reshape(-1).nonzero().squeeze(1)
        index = weight_mask(0, 0.05, name, (d_out, d_in))
        assert set(changed.tolist()) <= set(index.tolist())
        assert len(changed) > 0.9 * len(index)
        difference = (weight - adapter.base.weight).reshape(-1)[index]
        torch.testing.assert_close(difference, state.parts["delta"][name][0], rtol=0, atol=1e-6)


def test_a_single_round_has_no_stage_1() -> None:
    job = make_tiny_job(*SLORA, "method.stage1_fraction=0.9", "federation.num_rounds=1")
    assert job.state.num_live == 48
