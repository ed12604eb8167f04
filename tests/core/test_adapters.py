"""Adapters: which layers are wrapped, rows in and out, and what pruning really saves."""

import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.config.schema import ModelConfig
from bench.models.encoders import Classifier, MeanPooled, OwnHead, build_model
from fedara_core.adapters import (
    Layout,
    LowRank,
    Masks,
    Rows,
    adapter_shapes,
    columns,
    count_live,
    inject,
    named_adapters,
    read_rows,
    write_rows,
)
from fedara_core.errors import InputError
from fedara_core.method import whole_parameters

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


def tiny_bert(targets: str | Sequence[str] = "all-linear") -> nn.Module:
    classifier = build("bert", "mean")
    inject(classifier.model, targets, classifier.head)
    return classifier.model


def random_rows(model: nn.Module, form: LowRank, lora_rank: int = LORA_RANK) -> Rows:
    torch.manual_seed(1)
    shapes = adapter_shapes(model).items()
    return {name: 0.3 * torch.randn(lora_rank, form.width(shape)) for name, shape in shapes}


def masks(rows: Rows, live: Sequence[int]) -> Masks:
    """The same live triplets in every adapter."""
    chosen = torch.zeros(LORA_RANK, dtype=torch.bool)
    chosen[list(live)] = True
    return {name: chosen.clone() for name in rows}


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.arange(1, 25).reshape(3, 8)
    attention_mask = torch.ones_like(ids)
    attention_mask[1, 5:] = 0
    return ids * attention_mask, attention_mask


def num_trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ---- inject ----


def test_targets_match_whole_names_and_endings() -> None:
    all_names = set(adapter_shapes(tiny_bert()))
    assert len(all_names) == 12
    query = {f"encoder.encoder.layer.{i}.attention.self.query" for i in (0, 1)}
    assert set(adapter_shapes(tiny_bert(["query"]))) == query
    assert set(adapter_shapes(tiny_bert("query"))) == query
    assert set(adapter_shapes(tiny_bert(["self.query", "key"]))) == query | {
        name.replace("query", "key") for name in query
    }
    one = "encoder.encoder.layer.1.output.dense"
    assert set(adapter_shapes(tiny_bert([one]))) == {one}
    assert adapter_shapes(tiny_bert([one])) == {one: (HIDDEN, INNER)}
    # An ending is made of whole words: "output.dense" is not "put.dense".
    assert len(adapter_shapes(tiny_bert(["output.dense"]))) == 4
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
    inject(model, "all-linear", classifier.head)
    adapters = dict(named_adapters(model))
    assert list(adapters) == sorted(linear - head_layers)
    assert len(adapters) == 2 * per_layer + (others if pooling == "model" else 0)
    assert classifier.head
    assert whole_parameters(model).keys() == set(classifier.head)

    assert torch.equal(model(ids, attention_mask), plain)  # no rows yet
    rows = random_rows(model, SVD)
    write_rows(model, rows, masks(rows, range(LORA_RANK)), SVD)
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


@pytest.mark.parametrize("form", [SVD, PAIRS])
def test_rows_round_trip_through_the_model(form: LowRank) -> None:
    model = tiny_bert()
    rows = random_rows(model, form)
    rank_masks = masks(rows, [1, 3])
    first, second, *_ = rows
    rank_masks[first][:] = False
    write_rows(model, rows, rank_masks, form)
    read = read_rows(model)
    assert list(read) == [name for name in rows if name != first]
    for name, live in read.items():
        assert torch.equal(live, rows[name][[1, 3]])
    # What the model holds is its own: training must not reach the rows it came from.
    before = rows[second].clone()
    with torch.no_grad():
        dict(named_adapters(model))[second].parts["A"].zero_()
    assert torch.equal(rows[second], before)
    # A second write leaves nothing of the first.
    write_rows(model, {second: rows[second]}, {second: rank_masks[second]}, form)
    assert list(read_rows(model)) == [second]


@pytest.mark.parametrize("parts", [None, ("A",), ("B",), ("A", "B")])
@pytest.mark.parametrize("form", [SVD, PAIRS, LowRank(scale=2.0, frozen=("A",))])
@pytest.mark.parametrize("alike", ["layers", "layers, one adapter of each dead", "some neighbours"])
def test_what_lies_together_comes_out_row_by_row(
    alike: str, form: LowRank, parts: tuple[str, ...] | None
) -> None:
    """Layers that are alike, or neighbours that are, others that are not, and adapters without live
    rows; downloads that write over a trained model's parameters and drop its gradients."""
    model = tiny_bert()
    whole = list(whole_parameters(model).values())
    first = random_rows(model, form)
    rank_masks = masks(first, [0, 3])
    names = list(first)
    half = len(names) // 2
    if alike == "layers, one adapter of each dead":
        rank_masks[names[1]][:] = rank_masks[names[1 + half]][:] = False
    if alike == "some neighbours":
        rank_masks[names[1]][0] = False
        rank_masks[names[4]][:] = False
    write_rows(model, first, rank_masks, form)
    assert model.layout._num_layers == (1 if alike == "some neighbours" else 2)
    layout = model.layout
    assert isinstance(layout, Layout)
    for rows in (first, {name: values + 5 for name, values in first.items()}):
        for _ in range(2):  # the second time nothing of it is read again
            write_rows(model, rows, rank_masks, form)
            assert model.layout is layout
            trained = [p for _, a in named_adapters(model) for p in a.parts.parameters()]
            assert all(p.grad is None for p in trained)
            model(*batch()).sum().backward()
            with torch.no_grad():
                for parameter in trained:
                    parameter += 1
            expected = [
                (rows[name][rank_masks[name]] + 1)[:, columns(form, shape, parts)].flatten()
                for name, shape in adapter_shapes(model).items()
            ]
            expected += [parameter.detach().flatten() for parameter in whole]
            assert torch.equal(layout.read(parts, whole), torch.cat(expected))


def write_one_by_itself(model: nn.Module) -> None:
    adapter = next(adapter for _, adapter in named_adapters(model))
    adapter.write(torch.zeros(1, SVD.width(adapter.shape)), SVD)


def move(model: nn.Module) -> None:
    model.double().float()  # as .to() a device does: parameters get memory of their own


@pytest.mark.parametrize("change", [write_one_by_itself, move])
def test_a_layout_that_no_longer_holds_is_made_anew(change: Callable[[nn.Module], None]) -> None:
    model = tiny_bert()
    rows = random_rows(model, SVD)
    rank_masks = masks(rows, [1])
    for _ in range(2):
        write_rows(model, rows, rank_masks, SVD)
    layout = model.layout
    assert isinstance(layout, Layout)
    assert layout.intact
    change(model)
    assert not layout.intact
    write_rows(model, rows, rank_masks, SVD)
    assert model.layout is not layout
    for name, live in read_rows(model).items():
        assert torch.equal(live, rows[name][[1]])


def test_low_rank_adds_scale_times_the_product() -> None:
    model = tiny_bert(["intermediate.dense"])
    x = torch.randn(2, 5, HIDDEN)
    for form in (SVD, PAIRS):
        rows = random_rows(model, form)
        write_rows(model, rows, masks(rows, [0, 2]), form)
        for name, adapter in named_adapters(model):
            live = rows[name][[0, 2]]
            a, b = live[:, :HIDDEN], live[:, -INNER:]
            e = live[:, HIDDEN] if form.singular else torch.ones(2)
            weight = adapter.base.weight + 2.0 * b.T @ torch.diag(e) @ a
            expected = x @ weight.T + adapter.base.bias
            torch.testing.assert_close(adapter(x), expected, rtol=1e-5, atol=1e-5)


# ---- pruning ----


def test_pruning_shrinks_parameters_and_optimiser_state() -> None:
    model = tiny_bert()
    rows = random_rows(model, SVD)
    widths = sum(values.shape[1] for values in rows.values())
    num_head = NUM_CLASSES * HIDDEN + NUM_CLASSES
    for live in ([0, 1, 2, 3], [2], []):
        write_rows(model, rows, masks(rows, live), SVD)
        assert num_trained(model) == len(live) * widths + num_head
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        model(*batch()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        moments = [s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        assert sum(moment.numel() for moment in moments) == 2 * num_trained(model)


def test_an_adapter_without_live_rows_leaves_the_forward() -> None:
    model = tiny_bert()
    rows = random_rows(model, SVD)
    x = torch.randn(2, 5, HIDDEN)
    adapter = dict(named_adapters(model))["encoder.encoder.layer.0.attention.self.query"]
    write_rows(model, rows, masks(rows, [0]), SVD)
    assert not torch.equal(adapter(x), adapter.base(x))
    write_rows(model, rows, masks(rows, []), SVD)
    assert torch.equal(adapter(x), adapter.base(x))
    assert not list(adapter.parts.parameters())
    assert not adapter(x).requires_grad
    assert read_rows(model) == {}


@pytest.mark.parametrize("form", [SVD, PAIRS])
def test_keep_dead_computes_the_same_and_never_moves(form: LowRank) -> None:
    model = tiny_bert()
    rows = random_rows(model, form)
    rank_masks = masks(rows, [])
    write_rows(model, rows, rank_masks, form)
    gone = model(*batch())
    write_rows(model, rows, rank_masks, form, keep_dead=True)
    kept = model(*batch())
    assert torch.equal(kept, gone)
    assert read_rows(model) == {}
    widths = sum(values.shape[1] for values in rows.values())
    assert num_trained(model) == widths + NUM_CLASSES * HIDDEN + NUM_CLASSES
    kept.square().sum().backward()
    parts = [p for _, adapter in named_adapters(model) for p in adapter.parts.parameters()]
    assert all(p.grad is not None and not p.grad.any() for p in parts)
    torch.optim.AdamW(parts, lr=1.0, weight_decay=0.1).step()
    assert not any(p.any() for p in parts)
    with torch.no_grad():
        for part in parts:
            part.fill_(torch.nan)  # a client that diverged
    for _ in range(2):
        write_rows(model, dict(rows), rank_masks, form, keep_dead=True)
        assert not any(p.any() for p in parts)


def test_rows_of_another_width_are_refused() -> None:
    model = tiny_bert()
    rows = random_rows(model, SVD)
    rank_masks = masks(rows, [0])
    write_rows(model, rows, rank_masks, SVD)
    wide = {name: torch.cat([values, values[:, :1]], dim=1) for name, values in rows.items()}
    with pytest.raises(AssertionError, match="another width"):
        write_rows(model, wide, rank_masks, SVD)


@pytest.mark.parametrize(("top_only", "grads"), [(True, [False, True]), (False, [True, True])])
def test_backward_stops_below_the_lowest_live_adapter(top_only: bool, grads: list[bool]) -> None:
    model = tiny_bert()
    rows = random_rows(model, SVD)
    rank_masks = masks(rows, range(LORA_RANK))
    for name in rank_masks:
        if top_only and ".layer.0." in name:
            rank_masks[name][:] = False
    write_rows(model, rows, rank_masks, SVD)
    seen: list[bool] = []
    ran_backward: list[int] = []
    for number, layer in enumerate(model.encoder.encoder.layer):

        def look(module: nn.Module, inputs: Any, output: Any, number: int = number) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            seen.append(hidden.requires_grad)
            if hidden.requires_grad:
                hidden.register_hook(lambda grad: ran_backward.append(number))

        layer.register_forward_hook(look)
    model(*batch()).sum().backward()
    assert seen == grads
    assert sorted(ran_backward) == [number for number, grad in enumerate(grads) if grad]


def test_flops_fall_with_the_triplets() -> None:
    model = tiny_bert()
    rows = random_rows(model, SVD)

    def flops(live: Sequence[int], keep_dead: bool = False) -> int:
        write_rows(model, rows, masks(rows, live), SVD, keep_dead=keep_dead)
        with FlopCounterMode(display=False) as counter:
            model(*batch()).sum().backward()
        return counter.get_total_flops()

    full, half, none = flops(range(4)), flops([0, 1]), flops([])
    assert full > half > none > 0
    assert flops([], keep_dead=True) > none
    # Without any live row there is no backward pass through the encoder at all.
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*batch())
    assert none < counter.get_total_flops() * 1.01


def test_live_rows_are_counted_by_adapter() -> None:
    masks = {"b": [True, False, True], "none": [], "a": [False], "c": [True]}
    counted = count_live(
        {name: torch.tensor(mask, dtype=torch.bool) for name, mask in masks.items()}
    )
    assert list(counted.items()) == [("a", 0), ("b", 2), ("c", 1), ("none", 0)]
    assert count_live({}) == {}
