"""FLOPs counted from shapes: torch's counter, every method, cases by hand, what pruning saves."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.metering.client_cost import batch_shape
from bench.metering.flops import BatchShape, StepFlops, Uncountable
from bench.models.encoders import MeanPooled, OwnHead
from fedara_core.adapters import AdaptedModel, LowRank, inject
from fedara_core.method import Client, load_method, method_names
from fedara_core.train import start_client
from fedara_core.values import Masks, Tensors
from support.adapted import load_rows
from support.rounds import make_tiny_job, play_rounds

SHAPES = [(1, 1), (7, 12)]  # off the grid that the counts are interpolated from
NUM_LAYERS = 3
SHORT = (
    *("federation.num_rounds=3", "federation.cohort=2", "train.local_steps=1"),
    "evaluate.every=9",
)
_BERT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}
_DISTILBERT = {"vocab_size": 50, "dim": 16, "hidden_dim": 24, "n_layers": NUM_LAYERS, "n_heads": 2}
ENCODERS: dict[str, Any] = {
    "bert": transformers.BertConfig(**_BERT),
    "roberta": transformers.RobertaConfig(**_BERT, pad_token_id=1),
    "distilbert": transformers.DistilBertConfig(**_DISTILBERT, max_position_embeddings=40),
    "llama": transformers.LlamaConfig(**_BERT, num_key_value_heads=1, pad_token_id=0),
    "albert": transformers.AlbertConfig(**_BERT, embedding_size=8),  # its layers are one layer
}


def torch_counts(model: AdaptedModel, num_examples: int, length: int) -> tuple[int, int]:
    """FLOPs of a forward pass and of a local step, by torch's counter."""
    ids = torch.full((num_examples, length), 5)
    labels = torch.zeros(num_examples, dtype=torch.long)
    with sdpa_kernel([SDPBackend.MATH]), FlopCounterMode(display=False) as counter:
        logits = model.module.train()(ids, torch.ones_like(ids))
        forward = counter.get_total_flops()
        functional.cross_entropy(logits, labels).backward()
    return forward, counter.get_total_flops()


def assert_exact(flops: StepFlops, model: AdaptedModel) -> None:
    cost = flops.now()
    counted = [torch_counts(model, *shape) for shape in SHAPES]
    assert [(cost.forward_flops(*shape), cost.flops(*shape)) for shape in SHAPES] == counted
    shapes = [BatchShape(n, length, n * length) for n, length in SHAPES]
    assert cost.total(shapes) == sum(step for _, step in counted)


def pooled(architecture: str) -> AdaptedModel:
    """A small encoder with a linear head and an adapter on every linear layer."""
    torch.manual_seed(0)
    encoder = transformers.AutoModel.from_config(ENCODERS[architecture])
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    model = MeanPooled(encoder, encoder.config.hidden_size, 3)
    return inject(model, "all-linear", ("classifier.weight", "classifier.bias"))


def rows_of(model: AdaptedModel) -> tuple[Tensors, Masks]:
    """Four rows [A_i, B_i] of every adapter, all of them live."""
    rows = {name: torch.ones(4, d_in + d_out) for name, (d_out, d_in) in model.shapes.items()}
    return rows, {name: torch.ones(4, dtype=torch.bool) for name in rows}


def load_live(model: AdaptedModel, rows: Tensors, masks: Masks, *, keep_dead: bool = False) -> None:
    """Put the rows of the masks into the model, as LoRA pairs."""
    live = {name: own[masks[name]] for name, own in rows.items()}
    load_rows(model, live, LowRank(scale=1.0), keep_dead=keep_dead)


def layer_of(name: str) -> int:
    """The number in an adapter's name."""
    return next(int(part) for part in name.split(".") if part.isdigit())


@pytest.mark.parametrize("name", method_names())
def test_every_method_counts_as_torch_does(name: str) -> None:
    """In its first round and its last two: other forms, fewer triplets."""
    job = make_tiny_job(f"method.name={name}", "adapter.fused=false", *SHORT)
    flops = StepFlops(job.model)
    for state in (job.state, *(played.after for played in play_rounds(job, num_rounds=2))):
        job.method.download(job.model, state, None)
        assert_exact(flops, job.model)


@pytest.mark.parametrize("pooling", ["mean", "model"])
def test_texts_without_padding_count_as_torch_does(pooling: str) -> None:
    job = make_tiny_job(
        *("model.name=tiny", f"model.pooling={pooling}", "adapter.fused=false"), *SHORT
    )
    state = play_rounds(job, num_rounds=1)[0].after
    job.method.download(job.model, state, None)
    lengths = torch.tensor([3, 9, 1, 6])
    batch = {
        "input_ids": torch.full((4, 9), 5),
        "attention_mask": (torch.arange(9) < lengths[:, None]).long(),
    }
    shape = batch_shape(job.model.module, batch)
    assert shape == (4, 9, 19)
    with FlopCounterMode(display=False) as counter:
        job.model.module.train()(**batch).sum().backward()
    assert StepFlops(job.model).now().flops(*shape) == counter.get_total_flops()


@pytest.mark.parametrize("architecture", list(ENCODERS))
def test_every_architecture_and_mask_counts_as_torch_does(architecture: str) -> None:
    model = pooled(architecture)
    flops = StepFlops(model)
    assert_exact(flops, model)  # the head alone
    rows, masks = rows_of(model)
    draw = torch.Generator().manual_seed(1)
    for share in (1.0, 0.5, 0.1):
        drawn = {name: torch.rand(4, generator=draw) < share for name in masks}
        load_live(model, rows, drawn)
        assert_exact(flops, model)
    for lowest in range(1, NUM_LAYERS if architecture != "albert" else 1):
        upper = {name: mask & (layer_of(name) >= lowest) for name, mask in masks.items()}
        load_live(model, rows, upper)
        assert_exact(flops, model)
        assert layer_of(str(flops.now().lowest)) == lowest
    model.module.requires_grad_(True)
    assert_exact(flops, model)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_a_head_of_the_architecture_counts_as_torch_does(architecture: str) -> None:
    own = OwnHead(
        transformers.AutoModelForSequenceClassification.from_config(ENCODERS[architecture])
    )
    prefix = f"model.{own.model.base_model_prefix}."
    head = [name for name, _ in own.named_parameters() if not name.startswith(prefix)]
    model = inject(own, "all-linear", head)
    flops = StepFlops(model)
    assert_exact(flops, model)
    load_live(model, *rows_of(model))
    assert_exact(flops, model)


class TwoLayers(nn.Module):
    """Embedding (50, 8), linear 8 -> 6 and 6 -> 5, the mean over tokens, a head 5 -> 3."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.first, self.second, self.head = nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.embedding(ids))).mean(dim=1))  # type: ignore


def test_two_linear_layers_by_hand() -> None:
    """n = 4 examples of 10 tokens: m = 40 rows of x; every matmul is 2 m d_in d_out."""
    model = inject(TwoLayers(), "all-linear", ("head.weight", "head.bias"))
    flops = StepFlops(model)
    w1, w2, head = 2 * 40 * 8 * 6, 2 * 40 * 6 * 5, 2 * 4 * 5 * 3
    probe = flops.now()
    assert probe.forward_flops(4, 10) == w1 + w2 + head
    assert probe.flops(4, 10) == w1 + w2 + 2 * head  # the head's weight gradient
    assert (probe.lowest, probe.num_backward_layers, probe.num_layers) == ("head.weight", 0, 2)
    rows = {"first": torch.ones(2, 14), "second": torch.ones(3, 11)}
    masks = {"first": torch.zeros(2, dtype=torch.bool), "second": torch.ones(3, dtype=torch.bool)}
    load_live(model, rows, masks)
    a2, b2 = 2 * 40 * 6 * 3, 2 * 40 * 3 * 5
    upper = flops.now()
    assert upper.forward_flops(4, 10) == w1 + w2 + head + a2 + b2
    # The head: weight and input; B: itself and its input; A: itself. W0 and what is below: nothing.
    assert upper.flops(4, 10) - upper.forward_flops(4, 10) == 2 * head + 2 * b2 + a2
    assert (upper.lowest, upper.num_backward_layers) == ("second", 1)
    load_live(model, rows, {name: mask | True for name, mask in masks.items()})
    a1, b1 = 2 * 40 * 8 * 2, 2 * 40 * 2 * 6
    both = flops.now()
    backward = 2 * head + 2 * b2 + 2 * a2 + w2 + 2 * b1 + a1
    assert both.flops(4, 10) - both.forward_flops(4, 10) == backward
    assert (both.lowest, both.num_backward_layers) == ("first", 2)


def test_fewer_live_triplets_never_cost_more() -> None:
    model = pooled("bert")
    flops = StepFlops(model)
    rows, masks = rows_of(model)
    order = [(name, i) for name in masks for i in range(4)]
    seen = []
    for index in torch.randperm(len(order), generator=torch.Generator().manual_seed(2)).tolist():
        load_live(model, rows, masks)
        seen.append(flops.now().flops(8, 16))
        masks[order[index][0]][order[index][1]] = False
    assert all(after < before for before, after in pairwise(seen))


def test_pruning_the_lowest_layers_saves_their_backward_pass() -> None:
    """A layer below the lowest live adapter costs no more than its forward pass."""
    model = pooled("bert")
    flops, n, length = StepFlops(model), 8, 16
    rows, masks = rows_of(model)
    load_live(model, rows, masks)
    whole = flops.now()
    upper = {name: mask & (layer_of(name) > 0) for name, mask in masks.items()}
    load_live(model, rows, upper)
    pruned = flops.now()
    m, d, hidden, r = n * length, 16, 24, 4
    linear = 2 * m * (4 * d * d + 2 * d * hidden)
    attention = 2 * 2 * n * length * length * d
    adapters = 2 * m * r * (4 * (d + d) + 2 * (d + hidden))
    assert whole.forward_flops(n, length) - pruned.forward_flops(n, length) == adapters
    # What layer 0 lacked before, gradients of the input of query, key and value, layer 1 lacks now:
    # a whole layer is saved, one matmul for each W0, two for each of the rest.
    before = whole.flops(n, length) - whole.forward_flops(n, length)
    after = pruned.flops(n, length) - pruned.forward_flops(n, length)
    assert before - after == linear + 2 * attention + 2 * adapters
    assert pruned.lowest == "encoder.encoder.layer.1.attention.self.query"
    assert (whole.num_backward_layers, pruned.num_backward_layers) == (18, 12)


def test_an_adapter_that_stays_without_triplets_costs_one_row() -> None:
    """Module pruning switched off: masked, not removed."""
    model = pooled("bert")
    flops = StepFlops(model)
    rows, masks = rows_of(model)
    dead = {name: mask & False for name, mask in masks.items()}
    load_live(model, rows, dead, keep_dead=True)
    assert_exact(flops, model)
    kept = flops.now()
    load_live(model, rows, dead)
    assert flops.now().flops(8, 16) < 0.6 * kept.flops(8, 16)


@pytest.mark.parametrize("name", ["adalora", "fedara", "lora_a2", "slora"])
def test_a_local_step_counts_as_torch_does(name: str) -> None:
    """With its loss and optimiser; only a penalty on the factors is left out."""
    job = make_tiny_job(f"method.name={name}", "train.local_steps=2", "adapter.fused=false")
    client = Client(client_id=0, num_examples=8, model=job.model)
    job.method.download(job.model, job.state, client)
    cost = StepFlops(job.model).now()
    start_client(client, job.method, job.training, job.state)
    batch = job.train.batch(torch.arange(8), job.device)
    with sdpa_kernel([SDPBackend.MATH]), FlopCounterMode(display=False) as counter:
        job.method.local_step(client, batch)
    penalty = 0
    if getattr(load_method(name)(), "orthogonality", 0):
        sizes = sum(d_out + d_in for d_out, d_in in job.state.adapter.shapes.values())
        penalty = 3 * 2 * 4 * 4 * sizes  # A A^T and B^T B, and two gradients of each
    expected = cost.flops(*batch["input_ids"].shape) + penalty
    assert counter.get_total_flops() == expected


def test_the_model_and_the_generators_stay_as_they_are() -> None:
    job = make_tiny_job()
    job.method.download(job.model, job.state, None)
    before, rng = (
        {k: v.clone() for k, v in job.model.module.state_dict().items()},
        torch.get_rng_state(),
    )
    job.model.module.train()
    StepFlops(job.model).now()
    assert torch.equal(torch.get_rng_state(), rng)
    assert job.model.module.training
    assert all(p.grad is None or not p.grad.any() for p in job.model.module.parameters())
    after = job.model.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


class Windowed(TwoLayers):
    """Pads its input to a multiple of four tokens."""

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return super().forward(functional.pad(ids, (0, -ids.shape[1] % 4)), attention_mask)


class Convolved(TwoLayers):
    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embedding(ids).transpose(1, 2)
        mixed = functional.conv1d(hidden, torch.ones(8, 8, 1))
        return self.head(self.second(self.first(mixed.transpose(1, 2))).mean(dim=1))  # type: ignore


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Windowed(), "no polynomial of the batch's shape"),
        (Convolved(), "no rule for .*convolution"),
    ],
)
def test_a_model_beyond_the_rules_is_refused(model: nn.Module, message: str) -> None:
    adapted = inject(model, "all-linear", ("head.weight", "head.bias"))
    with pytest.raises(Uncountable, match=message):
        StepFlops(adapted)
