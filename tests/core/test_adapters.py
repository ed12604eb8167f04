"""Adapters: which layers are wrapped, rows in and out, and what pruning really saves."""

import tempfile
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.config.sections import ModelConfig
from bench.models.encoders import Classifier, MeanPooled, OwnHead, build_model
from fedara_core.adapters import AdaptedModel, AdapterForm, LowRank, inject
from fedara_core.errors import InputError
from fedara_core.method import Client
from fedara_core.values import Index, Masks, Tensors, count_live, make_index

HIDDEN, INNER, NUM_CLASSES, LORA_RANK = 16, 32, 3, 4
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []
SVD = LowRank(scale=2.0, singular=True)
PAIRS = LowRank(scale=2.0, singular=False)

_BERT_SIZES = {
    "vocab_size": 50,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": INNER,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
# Linear layers of an encoder layer, and other linear layers outside the head (BERT's pooler).
ARCHITECTURES: dict[str, tuple[Any, int, int]] = {
    "bert": (transformers.BertConfig(**_BERT_SIZES), 6, 1),
    "roberta": (transformers.RobertaConfig(**_BERT_SIZES, pad_token_id=1), 6, 0),
    "distilbert": (
        transformers.DistilBertConfig(
            vocab_size=50,
            dim=HIDDEN,
            hidden_dim=INNER,
            n_layers=2,
            n_heads=2,
            max_position_embeddings=40,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
        ),
        *(6, 0),
    ),
    "llama": (
        transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            pad_token_id=0,
        ),
        *(7, 0),
    ),
}


@cache
def saved(architecture: str) -> str:
    """A folder with the encoder alone, random weights; it lives as long as the process."""
    folder = tempfile.TemporaryDirectory()
    _FOLDERS.append(folder)
    torch.manual_seed(0)
    transformers.AutoModel.from_config(ARCHITECTURES[architecture][0]).save_pretrained(folder.name)
    return folder.name


def build(architecture: str, pooling: Literal["model", "mean"], seed: int = 0) -> Classifier:
    config = ModelConfig(name=saved(architecture), pooling=pooling, max_length=32)
    return build_model(config, num_classes=NUM_CLASSES, seed=seed)


def tiny_bert(targets: str | Sequence[str] = "all-linear") -> AdaptedModel:
    classifier = build("bert", "mean")
    return inject(classifier.model, targets, classifier.head)


def random_parts(model: AdaptedModel, form: AdapterForm) -> dict[str, Tensors]:
    """LORA_RANK rows for every adapter."""
    torch.manual_seed(1)
    parts: dict[str, Tensors] = {}
    for name, shape in model.shapes.items():
        for part, width in form.widths(shape).items():
            parts.setdefault(part, {})[name] = 0.3 * torch.randn(LORA_RANK, width)
    return parts


def masks(model: AdaptedModel, live: Sequence[int]) -> dict[str, Tensor]:
    """The same live triplets in every adapter."""
    chosen = torch.zeros(LORA_RANK, dtype=torch.bool)
    chosen[list(live)] = True
    return {name: chosen.clone() for name in model.adapters}


def index_of(model: AdaptedModel, form: AdapterForm, rank_masks: Masks) -> Index:
    whole = {name: tuple(p.shape) for name, p in model.whole_parameters.items()}
    return make_index(form, model.shapes, count_live(rank_masks), whole)


def write(
    model: AdaptedModel,
    parts: dict[str, Tensors],
    rank_masks: Masks,
    form: AdapterForm,
    *,
    keep_dead: bool = False,
) -> Tensor:
    """Load the live rows, and the whole parameters as they are; the vector that was loaded."""
    index = index_of(model, form, rank_masks)
    live = {
        part: {name: rows[rank_masks[name]] for name, rows in own.items()}
        for part, own in parts.items()
    }
    whole = {name: p.detach().clone() for name, p in model.whole_parameters.items()}
    vector = index.pack(live, whole)
    model.load(vector, index, form, keep_dead=keep_dead)
    return vector


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.arange(1, 25).reshape(3, 8)
    attention_mask = torch.ones_like(ids)
    attention_mask[1, 5:] = 0
    return ids * attention_mask, attention_mask


def num_trained(model: AdaptedModel) -> int:
    return sum(p.numel() for p in model.module.parameters() if p.requires_grad)


# ---- inject ----


def test_targets_match_whole_names_and_endings() -> None:
    all_names = set(tiny_bert().shapes)
    assert len(all_names) == 12
    query = {f"encoder.encoder.layer.{i}.attention.self.query" for i in (0, 1)}
    assert set(tiny_bert(["query"]).shapes) == query
    assert set(tiny_bert("query").shapes) == query
    assert set(tiny_bert(["self.query", "key"]).shapes) == query | {
        name.replace("query", "key") for name in query
    }
    one = "encoder.encoder.layer.1.output.dense"
    assert set(tiny_bert([one]).shapes) == {one}
    assert tiny_bert([one]).shapes == {one: (HIDDEN, INNER)}
    # An ending is made of whole words: "output.dense" is not "put.dense".
    assert len(tiny_bert(["output.dense"]).shapes) == 4
    with pytest.raises(InputError, match=r"'put\.dense'"):
        tiny_bert(["put.dense"])


@pytest.mark.parametrize("targets", [["query", "q_proj"], "classifier", ["LayerNorm"]])
def test_a_target_without_a_layer_is_named_with_the_choices(targets: str | list[str]) -> None:
    """The head and layers that are not linear are no targets."""
    with pytest.raises(InputError) as error:
        tiny_bert(targets)
    text = str(error.value)
    assert "\n" not in text
    assert repr(targets if isinstance(targets, str) else targets[-1]) in text
    assert "adapter.targets" in text
    for choice in ("all-linear", "dense", "key", "query", "value"):
        assert choice in text
    assert "classifier" not in text.partition("allowed")[2]


@pytest.mark.parametrize("pooling", ["model", "mean"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_linear_wraps_all_but_the_head(
    architecture: str, pooling: Literal["model", "mean"]
) -> None:
    classifier = build(architecture, pooling)
    model = classifier.model
    assert isinstance(model, MeanPooled if pooling == "mean" else OwnHead)
    model.eval()
    ids, attention_mask = batch()
    plain = model(ids, attention_mask)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head_layers = {name.rpartition(".")[0] for name in classifier.head}
    _, per_layer, others = ARCHITECTURES[architecture]
    adapted = inject(model, "all-linear", classifier.head)
    adapters = adapted.adapters
    assert list(adapters) == sorted(linear - head_layers)
    assert len(adapters) == 2 * per_layer + (others if pooling == "model" else 0)
    assert classifier.head
    assert adapted.whole_parameters.keys() == set(classifier.head)

    assert torch.equal(model(ids, attention_mask), plain)  # no rows yet
    write(adapted, random_parts(adapted, SVD), masks(adapted, range(LORA_RANK)), SVD)
    logits = model(ids, attention_mask)
    assert logits.shape == (3, NUM_CLASSES)
    assert not torch.allclose(logits, plain)
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    with_grad = {name for name, p in model.named_parameters() if p.grad is not None}
    in_adapters = {f"{name}.parts.{part}" for name in adapters for part in "AEB"}
    assert with_grad == in_adapters | set(classifier.head)
    assert all(p.requires_grad == (name in with_grad) for name, p in model.named_parameters())


@pytest.mark.parametrize("pooling", ["model", "mean"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_seed_draws_the_head_alone(
    architecture: str, pooling: Literal["model", "mean"]
) -> None:
    first, same, other = (build(architecture, pooling, seed) for seed in (0, 0, 1))
    weights = [dict(classifier.model.named_parameters()) for classifier in (first, same, other)]
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name
        drawn = name in first.head and weight.any()  # biases that start at zero are equal
        assert torch.equal(weight, weights[2][name]) != bool(drawn), name


# ---- rows ----


@pytest.mark.parametrize("form", [SVD, PAIRS, LowRank(scale=2.0, frozen=("A",))])
def test_parameters_and_gradients_are_views_of_the_vector(form: LowRank) -> None:
    model = tiny_bert()
    rank_masks = masks(model, [1, 3])
    first, second, *_ = model.adapters
    rank_masks[first][:] = False
    parts = random_parts(model, form)
    vector = write(model, parts, rank_masks, form)
    before = vector.clone()
    assert torch.equal(model.vector, vector)
    assert not model.adapters[first].parts
    for name, adapter in model.adapters.items():
        for part, rows in adapter.parts.items():
            assert torch.equal(rows, parts[part][name][[1, 3]])
            assert rows.requires_grad == (part not in form.frozen)
    model.module(*batch()).sum().backward()
    assert model.gradient.shape == (model.index.num_trained,)
    gradients = model.index.parts(torch.cat([model.gradient, torch.zeros_like(vector)]))
    for name, adapter in model.adapters.items():
        for part, rows in adapter.parts.items():
            if part not in form.frozen:
                assert rows.grad is not None
                assert torch.equal(gradients[part][name], rows.grad)
                assert rows.grad.any()
    for name, parameter in model.whole_parameters.items():
        assert torch.equal(model.index.whole(model.vector)[name], parameter)
    # What is done to the vector is done to the parameters, and never to what was loaded.
    with torch.no_grad():
        model.vector.add_(1)
    adapter = model.adapters[second]
    assert torch.equal(adapter.parts["B"], parts["B"][second][[1, 3]] + 1)
    assert torch.equal(vector, before)
    model.load(vector, model.index, form)
    assert torch.equal(adapter.parts["B"], parts["B"][second][[1, 3]])


def test_backward_gives_the_gradient_of_its_batch_alone() -> None:
    model = tiny_bert()
    vector = write(model, random_parts(model, SVD), masks(model, [0]), SVD)
    ids, attention_mask = batch()
    first = {"input_ids": ids, "attention_mask": attention_mask, "labels": torch.tensor([0, 1, 2])}
    gradients = []
    for batches in ([first | {"labels": torch.tensor([2, 2, 0])}, first], [first]):
        client = Client(client_id=0, num_examples=3, model=model)
        model.load(vector, model.index, SVD)
        for one in batches:
            client.backward(one)
        gradients.append(client.gradient.clone())
    assert gradients[0].any()
    assert torch.equal(*gradients)


def test_another_index_leaves_nothing_of_the_first() -> None:
    model = tiny_bert()
    write(model, random_parts(model, SVD), masks(model, range(LORA_RANK)), SVD)
    first, *others = model.adapters
    rank_masks = {first: torch.tensor([False, True, False, False])}
    parts = {part: {first: rows[first]} for part, rows in random_parts(model, PAIRS).items()}
    write(model, parts, rank_masks, PAIRS)
    assert model.adapters[first].num_live == 1
    assert set(model.adapters[first].parts) == {"A", "B"}
    assert not any(model.adapters[name].parts for name in others)


def test_the_order_of_the_vector() -> None:
    """Trained parts, whole parameters, parts that stay, frozen parts; each in name order."""
    form = LowRank(scale=1.0, singular=True, frozen=("A",), local=("B",))
    shapes = {"x": (2, 3), "y": (4, 5)}
    index = make_index(form, shapes, {"y": 1, "x": 2, "dead": 0}, {"w": (7,), "b": (2, 2)})
    order = [(p.part, p.name, p.shape, p.start) for p in index.pieces]
    assert order == [
        ("E", "x", (2, 1), 0),
        ("E", "y", (1, 1), 2),
        ("", "b", (2, 2), 3),
        ("", "w", (7,), 7),
        ("B", "x", (2, 2), 14),
        ("B", "y", (1, 4), 18),
        ("A", "x", (2, 3), 22),
        ("A", "y", (1, 5), 28),
    ]
    assert (index.num_sent, index.num_trained, index.size) == (14, 22, 33)
    assert index.runs == {
        "E": slice(0, 3),
        "": slice(3, 14),
        "B": slice(14, 22),
        "A": slice(22, 33),
    }
    assert index.row_widths.tolist() == [1, 1, 1, 4, 7]
    bits = torch.tensor([True, False, True])
    assert index.per_row(bits, whole=True).tolist() == [True, False, True, True, True]
    assert index.per_value(bits, whole=True).tolist() == [True, False, True] + [True] * 11
    clients = torch.arange(2 * 33.0).view(2, 33)  # a leading axis of clients
    assert index.parts(clients)["A"]["y"].tolist() == [
        [[28.0, 29, 30, 31, 32]],
        [[61.0, 62, 63, 64, 65]],
    ]


def test_low_rank_adds_scale_times_the_product() -> None:
    model = tiny_bert(["intermediate.dense"])
    x = torch.randn(2, 5, HIDDEN)
    for form in (SVD, PAIRS):
        parts = random_parts(model, form)
        write(model, parts, masks(model, [0, 2]), form)
        for name, adapter in model.adapters.items():
            a, b = (parts[part][name][[0, 2]] for part in "AB")
            e = parts["E"][name][[0, 2], 0] if form.singular else torch.ones(2)
            weight = adapter.base.weight + 2.0 * b.T @ torch.diag(e) @ a
            expected = x @ weight.T + adapter.base.bias
            torch.testing.assert_close(adapter(x), expected, rtol=1e-5, atol=1e-5)


# ---- pruning ----


def test_pruning_shrinks_parameters_and_optimiser_state() -> None:
    model = tiny_bert()
    parts = random_parts(model, SVD)
    widths = sum(rows.shape[1] for own in parts.values() for rows in own.values())
    num_head = NUM_CLASSES * HIDDEN + NUM_CLASSES
    for live in ([0, 1, 2, 3], [2], []):
        write(model, parts, masks(model, live), SVD)
        assert len(model.vector) == len(model.gradient) == num_trained(model)
        assert num_trained(model) == len(live) * widths + num_head
        trained = [p for p in model.module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        model.module(*batch()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        moments = [s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        assert sum(moment.numel() for moment in moments) == 2 * num_trained(model)


def test_an_adapter_without_live_rows_leaves_the_forward() -> None:
    model = tiny_bert()
    parts = random_parts(model, SVD)
    x = torch.randn(2, 5, HIDDEN)
    adapter = model.adapters["encoder.encoder.layer.0.attention.self.query"]
    write(model, parts, masks(model, [0]), SVD)
    assert not torch.equal(adapter(x), adapter.base(x))
    write(model, parts, masks(model, []), SVD)
    assert torch.equal(adapter(x), adapter.base(x))
    assert not list(adapter.parts.parameters())
    assert not adapter(x).requires_grad


@pytest.mark.parametrize("form", [SVD, PAIRS])
def test_keep_dead_computes_the_same_and_never_moves(form: LowRank) -> None:
    model = tiny_bert()
    parts, rank_masks = random_parts(model, form), masks(model, [])
    vector = write(model, parts, rank_masks, form)
    gone = model.module(*batch())
    write(model, parts, rank_masks, form, keep_dead=True)
    kept = model.module(*batch())
    assert torch.equal(kept, gone)
    assert torch.equal(model.vector, vector)  # dead rows are no part of it
    widths = sum(rows.shape[1] for own in parts.values() for rows in own.values())
    assert num_trained(model) == widths + NUM_CLASSES * HIDDEN + NUM_CLASSES
    kept.square().sum().backward()
    dead = [p for adapter in model.adapters.values() for p in adapter.parts.parameters()]
    assert all(p.grad is not None and not p.grad.any() for p in dead)
    assert not any(p.any() for p in dead)
    write(model, parts, rank_masks, form)
    assert not any(adapter.parts for adapter in model.adapters.values())


@pytest.mark.parametrize(("top_only", "grads"), [(True, [False, True]), (False, [True, True])])
def test_backward_stops_below_the_lowest_live_adapter(top_only: bool, grads: list[bool]) -> None:
    model = tiny_bert()
    rank_masks = masks(model, range(LORA_RANK))
    for name in rank_masks:
        if top_only and ".layer.0." in name:
            rank_masks[name][:] = False
    write(model, random_parts(model, SVD), rank_masks, SVD)
    seen: list[bool] = []
    ran_backward: list[int] = []
    for number, layer in enumerate(model.module.encoder.encoder.layer):

        def look(module: nn.Module, inputs: Any, output: Any, number: int = number) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            seen.append(hidden.requires_grad)
            if hidden.requires_grad:
                hidden.register_hook(lambda grad: ran_backward.append(number))

        layer.register_forward_hook(look)
    model.module(*batch()).sum().backward()
    assert seen == grads
    assert sorted(ran_backward) == [number for number, grad in enumerate(grads) if grad]


def test_flops_fall_with_the_triplets() -> None:
    model = tiny_bert()
    parts = random_parts(model, SVD)

    def flops(live: Sequence[int], keep_dead: bool = False) -> int:
        write(model, parts, masks(model, live), SVD, keep_dead=keep_dead)
        with FlopCounterMode(display=False) as counter:
            model.module(*batch()).sum().backward()
        return counter.get_total_flops()

    full, half, none = flops(range(4)), flops([0, 1]), flops([])
    assert full > half > none > 0
    assert flops([], keep_dead=True) > none
    # Without any live row there is no backward pass through the encoder at all.
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.module(*batch())
    assert none < counter.get_total_flops() * 1.01


def test_live_rows_are_counted_by_adapter() -> None:
    masks = {"b": [True, False, True], "none": [], "a": [False], "c": [True]}
    counted = count_live(
        {name: torch.tensor(mask, dtype=torch.bool) for name, mask in masks.items()}
    )
    assert list(counted.items()) == [("a", 0), ("b", 2), ("c", 1), ("none", 0)]
    assert count_live({}) == {}
