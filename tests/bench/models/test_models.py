"""Models and tokenising: the demo encoder, limits of length, padding, and texts without a token."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from bench.config.sections import ModelConfig
from bench.metering.flops import StepFlops
from bench.models import source, tokens
from bench.models.encoders import build_model
from bench.models.tokens import encode
from fedara_core.adapters import inject
from fedara_core.errors import InputError

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 40,
}


def test_the_demo_encoder_is_checked_by_its_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    source.minilm_folder.cache_clear()
    folder = source.minilm_folder()
    assert (folder / "model.safetensors").is_file()
    source.minilm_folder.cache_clear()
    monkeypatch.setattr(source, "_MINILM_SHA256", "0" * 64)
    with pytest.raises(InputError, match=r"has sha256 53aa51.*; allowed: 0000"):
        source.minilm_folder()


def test_minilm_gives_logits_that_do_not_depend_on_padding() -> None:
    config = ModelConfig(name="minilm", max_length=16)
    data = encode(config, ["a short text", "a much longer text about many things"], np.zeros(2))
    model = build_model(config, num_classes=3, seed=0).model.eval()
    device = torch.device("cpu")
    with torch.no_grad():
        both = model(*list(data.batch(torch.tensor([0, 1]), device).values())[:2])
        alone = model(*list(data.batch(torch.tensor([0]), device).values())[:2])
    assert both.shape == (2, 3)
    assert torch.allclose(both[0], alone[0], atol=1e-5)


def test_toy_is_berts_shape_and_names_and_sees_no_padding() -> None:
    """Of the same state as transformers' BERT it has the same output: no token types, no pooler."""
    model = build_model(ModelConfig(name="toy"), num_classes=3, seed=0).model.eval()
    bert = build_model(ModelConfig(name="tiny"), num_classes=3, seed=0).model.eval()
    missing, unexpected = bert.load_state_dict(model.state_dict(), strict=False)
    assert (missing, unexpected) == (["encoder.embeddings.token_type_embeddings.weight"], [])
    torch.nn.init.zeros_(bert.encoder.embeddings.token_type_embeddings.weight)
    texts = ["carries tea", "the wooden spoon stirs the soup"]
    data = encode(ModelConfig(name="toy"), texts, np.zeros(2))
    batch = data.batch(torch.arange(2), torch.device("cpu"))
    del batch["labels"], batch["texts"]
    torch.testing.assert_close(model(**batch), bert(**batch), rtol=0, atol=1e-5)
    alone = data.batch(torch.tensor([0]), torch.device("cpu"))
    del alone["labels"], alone["texts"]
    torch.testing.assert_close(model(**alone)[0], model(**batch)[0], rtol=0, atol=1e-6)


def test_toy_has_limits() -> None:
    for wrong, said in (({"max_length": 129}, "128 positions"), ({"pooling": "model"}, "own head")):
        with pytest.raises(InputError, match=said):
            build_model(ModelConfig(name="toy", **wrong), num_classes=3, seed=0)


def test_both_attentions_compute_the_same_and_count_the_same() -> None:
    """Padded texts, the backward pass included."""
    texts = ["carries tea", "the wooden spoon stirs the soup"]
    batch = encode(ModelConfig(name="tiny"), texts, np.zeros(2)).batch(
        torch.arange(2), torch.device("cpu")
    )
    labels = batch.pop("labels")
    del batch["texts"]
    seen = []
    for attention in ("sdpa", "eager"):
        config = ModelConfig(name="tiny", attention=attention)
        model = build_model(config, num_classes=3, seed=0).model.eval()
        torch.nn.functional.cross_entropy(model(**batch), labels).backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        adapted = inject(model, "all-linear", ["classifier.weight", "classifier.bias"])
        seen.append((gradients, StepFlops(adapted).now().flops(8, 16)))
    (sdpa, counted), (eager, same) = seen
    torch.testing.assert_close(eager, sdpa, rtol=1e-4, atol=1e-6)
    assert sdpa.abs().max() > 1e-3
    assert counted == same


def test_roberta_holds_two_tokens_less_than_it_has_positions(tmp_path: Path) -> None:
    settings = transformers.RobertaConfig(**SIZES, pad_token_id=1)
    transformers.RobertaModel(settings).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"max_length = 39 .* allowed: 4 to 38"):
        build_model(ModelConfig(name=str(tmp_path), max_length=39), num_classes=2, seed=0)
    config = ModelConfig(name=str(tmp_path), max_length=38)
    model = build_model(config, num_classes=2, seed=0).model
    assert model(torch.full((1, 38), 5), torch.ones(1, 38)).shape == (1, 2)


def test_a_damaged_model_file_is_refused(tmp_path: Path) -> None:
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(InputError, match="can not be loaded"):
        build_model(ModelConfig(name=str(tmp_path), max_length=8), num_classes=2, seed=0)


def test_a_text_without_a_token_becomes_one_padding_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens._Hashing, "ids", lambda self, texts: [[], [5, 6]])
    monkeypatch.setattr(tokens._Hashing, "pad", 9)
    data = encode(ModelConfig(name="tiny"), ["", "two words"], np.zeros(2))
    assert data.lengths.tolist() == [1, 2]
    assert data.input_ids.tolist() == [[9, 9], [5, 6]]


def test_texts_are_cut_and_padded_to_the_longest() -> None:
    config = ModelConfig(name="tiny", max_length=4)
    data = encode(config, ["one", "one two three four five"], np.array([1, 0]))
    assert data.lengths.tolist() == [2, 4]
    assert data.input_ids.shape == (2, 4)
    assert data.input_ids[0, 2:].tolist() == [0, 0]
    batch = data.batch(torch.tensor([0]), torch.device("cpu"))
    assert batch["input_ids"].shape == (1, 2)
    assert batch["attention_mask"].tolist() == [[1, 1]]
    assert batch["labels"].tolist() == [1]
