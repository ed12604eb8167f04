"""Small folders with a transformers model and a tokeniser of few words."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from bench.config.sections import ModelConfig

SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 40,
}
GPT2 = transformers.GPT2Config(
    vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=40, bos_token_id=3, eos_token_id=3
)
# Real words at ids 0 and 1, as in byte-level vocabularies.
WORDS = ["!", "rain", "[UNK]", "<end>", "wind", "cloud", "soup", "bread", "oven", "storm"]


def write_tokenizer(folder: Path, words: Sequence[str] = WORDS, **special: str) -> None:
    """A tokeniser of whole words; special: pad_token and others, of the words."""
    known = {word: token_id for token_id, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, unk_token="[UNK]", **special).save_pretrained(folder)


def write_model(folder: Path, settings: Any, *, seed: int = 0, **special: str) -> ModelConfig:
    """A model of random weights, with the tokeniser of WORDS."""
    torch.manual_seed(seed)
    transformers.AutoModel.from_config(settings).save_pretrained(folder)
    write_tokenizer(folder, **special)
    return ModelConfig(name=str(folder), max_length=16, attention="eager")
