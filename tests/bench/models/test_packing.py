"""Texts without padding: the same logits and gradients, for the models that allow it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from bench.config.sections import ModelConfig
from bench.models.encoders import build_model
from bench.models.packing import pack
from support.models import GPT2, SIZES, write_model

LENGTHS = (5, 12, 1, 8)
HEADS = {"num_key_value_heads": 1}
MODELS: dict[str, tuple[Any, str]] = {
    "bert": (transformers.BertConfig(**SIZES), "mean"),
    "bert pooler": (transformers.BertConfig(**SIZES), "model"),
    "roberta": (transformers.RobertaConfig(**SIZES), "mean"),
    "roberta head": (transformers.RobertaConfig(**SIZES), "model"),
    "llama": (transformers.LlamaConfig(**SIZES, **HEADS), "mean"),
    "gpt2": (GPT2, "mean"),
}


def batch(*, full: bool = False) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor((12,) * len(LENGTHS) if full else LENGTHS)
    mask = (torch.arange(12) < lengths[:, None]).long()
    ids = torch.randint(4, 10, mask.shape, generator=torch.Generator().manual_seed(1))
    return ids, mask


def of(mask: Tensor) -> Tensor:
    return torch.arange(mask.numel()).view(mask.shape)


@pytest.mark.parametrize("full", [False, True])
def test_pad_and_take(full: bool) -> None:
    _, mask = batch(full=full)
    packing = pack(mask)
    values = of(mask)[mask.bool()].double()
    assert packing.is_full is full
    assert torch.equal(packing.take(of(mask).double()), values)
    assert torch.equal(packing.pad(values), of(mask) * mask.double())
    assert torch.equal(packing.positions, torch.arange(12).expand_as(mask)[mask.bool()])
    sums = (of(mask) * mask).sum(dim=1)
    torch.testing.assert_close(packing.mean(values[:, None])[:, 0], sums / mask.sum(dim=1).double())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_and_gradients_are_those_of_padded_texts(
    name: str, attention: str, tmp_path: Path
) -> None:
    settings, pooling = MODELS[name]
    special = {"pad_token": "[UNK]"}
    config = write_model(tmp_path, settings, **special).model_copy(
        update={"pooling": pooling, "attention": attention}
    )
    found = []
    for packing in (True, False):
        own = config.model_copy(update={"packing": packing})
        classifier = build_model(own, num_classes=3, seed=0)
        assert classifier.facts == {"attention": attention, "packed": packing}
        model = classifier.model.eval().requires_grad_(True)
        ids, mask = batch()
        logits = model(ids, mask)
        functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
        found.append([logits, *(p.grad for _, p in sorted(model.named_parameters()))])
    for ours, theirs in zip(*found, strict=True):
        if theirs is not None and theirs.abs().max() > 0:
            assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max() + 1e-7


def test_padding_costs_nothing(tmp_path: Path) -> None:
    """Layers but attention see the tokens alone."""
    config = write_model(tmp_path, transformers.BertConfig(**SIZES), pad_token="!")
    seen: list[int] = []
    model = build_model(config, num_classes=3, seed=0).model.eval()
    layer = model.get_submodule("encoder.encoder.layer.0.intermediate.dense")
    layer.register_forward_hook(lambda module, args, out: seen.append(out.numel()))
    model(*batch())
    assert seen == [sum(LENGTHS) * SIZES["intermediate_size"]]


@pytest.mark.parametrize(
    "settings",
    [
        transformers.MPNetConfig(**SIZES),  # relative positions over the whole row
        transformers.MistralConfig(**SIZES, **HEADS, sliding_window=4),
        transformers.Gemma2Config(**SIZES, **HEADS, head_dim=8, sliding_window=4),
    ],
    ids=["mpnet", "mistral", "gemma2"],
)
def test_models_that_do_not_allow_it_stay_padded(settings: Any, tmp_path: Path) -> None:
    config = write_model(tmp_path, settings, pad_token="[UNK]", eos_token="<end>")
    classifier = build_model(config, num_classes=3, seed=0)
    assert classifier.facts == {"attention": "eager", "packed": False}
    assert classifier.model(*batch()).shape == (4, 3)


def test_a_model_that_is_drawn_is_packed_too() -> None:
    facts = build_model(ModelConfig(name="tiny"), num_classes=2, seed=0).facts
    assert facts == {"attention": "eager", "packed": True}
