"""SLoRA: both stages against plain loops, the weights that stage 1 trains, bytes, and LoRA."""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.models.encoders import build_model
from bench.run.clients import client_batches
from bench.run.job import Job
from fedara_core.errors import InputError
from fedara_core.seeds import generator
from fedara_core.state import ServerState
from support.rounds import make_tiny_job, play_rounds

DENSITY, SCALE = 0.05, 8.0 / 4  # lora_alpha / lora_rank
SLORA = (
    *("method.name=slora", f"method.density={DENSITY}", "method.stage1_fraction=0.5"),
    *("adapter.lora_alpha=8.0", "model.dropout=0.0", "train.local_steps=2"),
)
SHAPES = [(32, 32)] * 8 + [(64, 32), (32, 64)] * 2  # tiny.toml's model
HEAD = ("classifier.weight", "classifier.bias")
NUM_HEAD = 4 * 32 + 4
SPARSE_BYTES = 24 + 4 * (8 * 51 + 4 * 102 + NUM_HEAD)  # round(0.05 * 1024), round(0.05 * 2048)
PAIR_BYTES = 24 + 4 * (4 * sum(d_out + d_in for d_out, d_in in SHAPES) + NUM_HEAD)


def model_of(job: Job, state: ServerState) -> dict[str, Tensor]:
    """The state's model: the weight (d_out, d_in) with which each layer acts, and the head."""
    job.method.download(job.model, state, None)
    with torch.no_grad():  # the rows of the identity give the columns of the weight
        weights = {
            name: (adapter(torch.eye(adapter.shape[1])) - adapter.base.bias).T
            for name, adapter in job.model.adapters.items()
        }
    return weights | {name: job.model.module.get_parameter(name).detach().clone() for name in HEAD}


def base_weights(job: Job) -> dict[str, Tensor]:
    return {name: adapter.base.weight.detach() for name, adapter in job.model.adapters.items()}


def places(name: str, weight: Tensor, seed: int = 0) -> Tensor:
    """Flat indices of the weights that stage 1 trains."""
    drawn = torch.randperm(weight.numel(), generator=generator(seed, f"weight_mask:{name}"))
    return drawn[: round(DENSITY * weight.numel())]


# ---- both stages by hand ----

Tensors = tuple[Tensor, ...]  # of one layer: (values,) in stage 1, (A, B) in stage 2


class Changed(nn.Module):
    """(W0 + change(*tensors)) x + bias, of which the tensors train."""

    def __init__(self, base: nn.Linear, tensors: Tensors, change: Callable[..., Tensor]) -> None:
        super().__init__()
        self.base, self.change = base, change
        self.tensors = nn.ParameterList(tensor.clone() for tensor in tensors)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight + self.change(*self.tensors)
        return functional.linear(x, weight, self.base.bias)


def sparse_change(index: Tensor, shape: tuple[int, int], values: Tensor) -> Tensor:
    return torch.zeros(shape[0] * shape[1]).index_put((index,), values).reshape(shape)


def pair_change(a: Tensor, b: Tensor) -> Tensor:
    return SCALE * b @ a


def best_pair(change: Tensor) -> Tensors:
    """A (4, d_in) and B (d_out, 4), S shared evenly between them: the best approximation."""
    u, s, vt = np.linalg.svd(change.double().numpy())
    assert s[3] > 1e-4
    root = np.sqrt(s[:4] / SCALE)
    return torch.tensor(root[:, None] * vt[:4]).float(), torch.tensor(u[:, :4] * root).float()


def plain_client(
    job: Job,
    changes: Mapping[str, Callable[..., Tensor]],
    tensors: Mapping[str, Tensors],
    head: Mapping[str, Tensor],
    lr_factor: float,
    round_index: int,
    client_id: int,
) -> tuple[dict[str, Tensors], dict[str, Tensor]]:
    """One client's local training without a line of fedara_core but its batches."""
    num_classes = job.label_counts.shape[1]
    built = build_model(job.config.model, num_classes=num_classes, seed=job.config.seed)
    model = built.model.requires_grad_(False)
    layers = {}
    for name, change in changes.items():
        parent, _, child = name.rpartition(".")
        layers[name] = Changed(model.get_submodule(name), tensors[name], change)
        setattr(model.get_submodule(parent), child, layers[name])
    for name in HEAD:
        model.get_parameter(name).copy_(head[name])
        model.get_parameter(name).requires_grad_(True)
    lr = job.config.train.lr
    optimizer = torch.optim.AdamW(
        [
            {"params": [model.get_parameter(name) for name in HEAD], "lr": lr},
            {"params": [p for layer in layers.values() for p in layer.tensors]},
        ],
        lr=lr * lr_factor,
        weight_decay=0.0,
    )
    for batch in client_batches(job, round_index, client_id):
        optimizer.zero_grad()
        logits = model(batch["input_ids"], batch["attention_mask"])
        functional.cross_entropy(logits, batch["labels"]).backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
    trained = {name: tuple(p.detach() for p in layer.tensors) for name, layer in layers.items()}
    return trained, {name: model.get_parameter(name).detach() for name in HEAD}


@pytest.mark.parametrize("lr_factor", [1.0, 3.0])
def test_both_stages_by_hand(lr_factor: float) -> None:
    """Two rounds on the weights of the mask, the SVD of what they became, two rounds of LoRA."""
    job = make_tiny_job(
        *(*SLORA, f"method.stage1_lr_factor={lr_factor}", "federation.num_rounds=4"),
        *("federation.cohort=3", "train.lr=1e-2"),
    )
    base = base_weights(job)
    head = {name: job.model.module.get_parameter(name).detach().clone() for name in HEAD}
    changes: dict[str, Callable[..., Tensor]] = {
        name: partial(sparse_change, places(name, weight), tuple(weight.shape))
        for name, weight in base.items()
    }
    tensors: dict[str, Tensors] = {
        name: (torch.zeros(len(places(name, weight))),) for name, weight in base.items()
    }
    for played in play_rounds(job):
        cohort, round_index = played.row["cohort"], played.before.round_index
        factor = lr_factor if round_index < 2 else 1.0
        clients = [
            plain_client(job, changes, tensors, head, factor, round_index, k) for k in cohort
        ]
        num_examples = [len(job.shards[k]) for k in cohort]
        shares = [count / sum(num_examples) for count in num_examples]

        def mean(values: list[Tensor], shares: list[float] = shares) -> Tensor:
            return torch.stack([p * v for p, v in zip(shares, values, strict=True)]).sum(0)

        head = {name: mean([client[1][name] for client in clients]) for name in HEAD}
        tensors = {
            name: tuple(mean(list(of)) for of in zip(*(c[0][name] for c in clients), strict=True))
            for name in base
        }
        if round_index == 1:
            tensors = {name: best_pair(changes[name](*tensors[name])) for name in base}
            changes = dict.fromkeys(base, pair_change)
        found = model_of(job, played.after)
        for name, weight in base.items():
            change = changes[name](*tensors[name])
            assert change.abs().max() > 1e-2
            # AdamW carries the rounding of the SVD, and of small gradients, into whole steps.
            torch.testing.assert_close(found[name] - weight, change, rtol=0, atol=1e-5)
        for name in HEAD:
            torch.testing.assert_close(found[name], head[name], rtol=0, atol=1e-5)


# ---- the mask of stage 1 ----


@pytest.mark.parametrize("seed", [0, 1])
def test_stage_1_changes_the_weights_that_the_seed_draws(seed: int) -> None:
    torch.manual_seed(99 + seed)  # the global generator has no say
    job = make_tiny_job(*SLORA, f"seed={seed}", "train.lr=2e-2")
    base = base_weights(job)
    (played,) = play_rounds(job, num_rounds=1)
    found = model_of(job, played.after)
    for name, weight in base.items():
        # Beyond the rounding of the bias that the identity's columns carry.
        changed = ((found[name] - weight).abs() > 1e-5).reshape(-1).nonzero().flatten().tolist()
        drawn = places(name, weight, seed).tolist()
        assert set(changed) <= set(drawn)
        assert len(changed) > 0.9 * len(drawn)
        assert set(changed) - set(places(name, weight, 1 - seed).tolist())


def test_stage_1_trains_a_weight_of_each_layer_at_least() -> None:
    (played,) = play_rounds(make_tiny_job(*SLORA, "method.density=1e-6"), num_rounds=1)
    assert played.row["uplink_bytes"] == 5 * (24 + 4 * (len(SHAPES) + NUM_HEAD))


# ---- bytes, and when the stage ends ----


@pytest.mark.parametrize(
    ("fraction", "num_rounds", "sparse_rounds"),
    [(0.5, 6, 3), (0.01, 4, 1), (0.9, 2, 1), (0.9, 1, 0), (0.0, 2, 0)],
)
def test_bytes_of_both_stages_by_hand(fraction: float, num_rounds: int, sparse_rounds: int) -> None:
    """Stage 1 takes one round at least and leaves one; a run of one round is stage 2."""
    job = make_tiny_job(
        *(*SLORA, f"method.stage1_fraction={fraction}", f"federation.num_rounds={num_rounds}"),
        "train.local_steps=1",
    )
    played = play_rounds(job)
    expected = [5 * SPARSE_BYTES] * sparse_rounds + [5 * PAIR_BYTES] * (num_rounds - sparse_rounds)
    assert [one.row["uplink_bytes"] for one in played] == expected
    assert [one.row["downlink_bytes"] for one in played] == [5 * 24, *expected[1:]]
    assert played[-1].row["live_triplets"] == 4 * len(SHAPES)


# ---- reductions and refusals ----


@pytest.mark.parametrize("off", ["method.density=0.0", "method.stage1_fraction=0.0"])
def test_without_stage_1_it_is_lora(off: str) -> None:
    common = ("federation.num_rounds=2", "train.local_steps=2")
    ours = play_rounds(make_tiny_job("method.name=slora", off, *common))
    theirs = play_rounds(make_tiny_job("method.name=lora", *common))
    assert ours[0].before.digest() == theirs[0].before.digest()
    assert [one.row for one in ours] == [one.row for one in theirs]


@pytest.mark.parametrize(
    "setting",
    ["density=1.0", "density=-0.1", "stage1_fraction=1.0", "stage1_lr_factor=0.0"],
)
def test_settings_out_of_range_are_refused(setting: str) -> None:
    with pytest.raises(InputError, match=f"method.{setting.partition('=')[0]}"):
        make_tiny_job("method.name=slora", f"method.{setting}")
