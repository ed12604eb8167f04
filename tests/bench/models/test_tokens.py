"""Tokenisers: missing ones, those of other models, and words that are unknown to them."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from bench.config.sections import DatasetConfig, ModelConfig
from bench.data.texts import load_dataset
from bench.models.source import load_tokenizer
from bench.models.tokens import encode
from fedara_core.errors import InputError
from support.models import GPT2, SIZES, WORDS, write_model, write_tokenizer

CASES = Path(__file__).parents[2] / "cases"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def refused(config: ModelConfig, texts: list[str]) -> str:
    with pytest.raises(InputError) as caught:
        encode(config, texts, np.zeros(len(texts)))
    message = str(caught.value)
    assert "\n" not in message
    assert "allowed" in message
    return message


def warned(config: ModelConfig, texts: list[str]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encode(config, texts, np.zeros(len(texts)))
    return [str(item.message) for item in caught]


# ---- no tokeniser ----


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "XLMRoberta", "Albert", "DebertaV2", "Qwen2"])
def test_a_folder_without_a_tokeniser_is_refused(kind: str, tmp_path: Path) -> None:
    """transformers makes one of special tokens alone, to which every word is unknown."""
    getattr(transformers, f"{kind}Config")(**SIZES).save_pretrained(tmp_path)
    message = refused(ModelConfig(name=str(tmp_path)), ["rain"])
    assert "its tokeniser's files are missing" in message
    assert "and no words" in message


@pytest.mark.parametrize("kind", ["Llama", "MPNet", "GPT2", "Bloom"])
def test_a_folder_of_another_kind_without_a_tokeniser_is_refused(kind: str, tmp_path: Path) -> None:
    getattr(transformers, f"{kind}Config")().save_pretrained(tmp_path)
    assert "model.name" in refused(ModelConfig(name=str(tmp_path)), ["rain"])


def test_a_model_that_lost_its_tokeniser_is_refused(tmp_path: Path) -> None:
    config = write_model(tmp_path, transformers.BertConfig(**SIZES))
    assert len(encode(config, ["rain"], np.zeros(1))) == 1
    for name in TOKENIZER_FILES:
        (tmp_path / name).unlink(missing_ok=True)
    assert "its tokeniser's files are missing" in refused(config, ["rain"])


def test_a_vocabulary_without_its_merges_is_refused(tmp_path: Path) -> None:
    config = write_model(tmp_path, GPT2)
    for name in TOKENIZER_FILES:
        (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    assert "`vocab` and `merges`" in refused(config, ["ab"])


def test_a_tokeniser_of_letters_needs_no_files(tmp_path: Path) -> None:
    transformers.CanineConfig().save_pretrained(tmp_path)
    assert load_tokenizer(ModelConfig(name=str(tmp_path))).tokenize("ab") == ["a", "b"]


def test_the_tokeniser_of_minilm_is_whole() -> None:
    assert warned(ModelConfig(name="minilm"), ["rain and wind", "cloud"]) == []


# ---- unknown words ----


def test_many_unknown_words_are_told_of_with_their_share(tmp_path: Path) -> None:
    config = write_model(tmp_path, transformers.BertConfig(**SIZES), pad_token="<end>")
    (text,) = warned(config, ["rain zebra wind zebra", "rain <end>"])
    assert "40.0 % of the tokens of 2 texts are '[UNK]'" in text  # "<end>" is no word


def test_few_unknown_words_are_not_told_of(tmp_path: Path) -> None:
    config = write_model(tmp_path, transformers.BertConfig(**SIZES))
    assert warned(config, ["rain " * 9 + "zebra"]) == []  # a tenth
    assert len(warned(config, ["rain " * 8 + "zebra"])) == 1


def test_texts_without_a_token_are_no_reason_to_warn(tmp_path: Path) -> None:
    config = write_model(tmp_path, transformers.BertConfig(**SIZES))
    assert warned(config, ["", ""]) == []


# ---- ids that the embedding does not have ----


def test_a_tokeniser_with_more_tokens_than_the_embedding_is_refused(tmp_path: Path) -> None:
    config = write_model(tmp_path, transformers.BertConfig(**SIZES))
    more = [f"word{i}" for i in range(10, 20)]
    write_tokenizer(tmp_path, [*WORDS, *more, "covid"])
    texts = load_dataset(DatasetConfig(name=f"file:{CASES / 'covid'}")).train_texts
    message = refused(config, texts)
    assert "tokens up to id 20 ('covid'), and its embedding has 20 rows" in message
    assert "allowed: ids up to 19" in message
    assert len(encode(config, ["word19"], np.zeros(1))) == 1


def test_tokens_that_were_added_to_a_tokeniser_alone_are_refused(tmp_path: Path) -> None:
    config = write_model(tmp_path, GPT2)
    write_tokenizer(tmp_path, [*WORDS, *(f"word{i}" for i in range(10, 20))])
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["zebra", "yak"])
    tokenizer.save_pretrained(tmp_path)
    assert "id 21 ('yak'), and its embedding has 20 rows" in refused(config, ["rain zebra yak"])


def test_a_padding_token_that_the_embedding_does_not_have_pads_nothing(tmp_path: Path) -> None:
    """A padding token is often added to a tokeniser; the end token pads instead."""
    config = write_model(tmp_path, transformers.LlamaConfig(**SIZES, eos_token_id=3))
    words = [*WORDS, *(f"word{i}" for i in range(10, 20)), "[PAD]"]
    write_tokenizer(tmp_path, words, pad_token="[PAD]")
    assert encode(config, ["rain", "rain rain"], np.zeros(2)).input_ids.tolist() == [[1, 3], [1, 1]]


# ---- blocks ----


@pytest.mark.parametrize("name", ["toy", "minilm"])
def test_blocks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten texts of unlike lengths, at once and by threes; what is unknown is said once, of all."""
    texts = [" ".join(["rain", "\u0e01\u0e02", "wind"] * n) for n in range(10)]
    config = ModelConfig(name=name, max_length=12)
    whole, said = encode(config, texts, np.arange(10)), warned(config, texts)
    monkeypatch.setattr("bench.models.tokens._BLOCK", 3)
    parts = encode(config, texts, np.arange(10))
    for part in ("input_ids", "lengths", "labels"):
        assert torch.equal(getattr(whole, part), getattr(parts, part))
    assert warned(config, texts) == said
    assert len(said) == (name == "minilm")
