"""Texts to token ids, and what shows that a tokeniser is not the model's."""

import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from bench.config.sections import ModelConfig
from bench.models import toy
from bench.models.source import DRAWN, load_config, load_tokenizer, loading, padding_id
from fedara_core.errors import InputError
from fedara_core.train import Encoded

# Of the tokens of words: a larger share of unknown ones is warned of.
MAX_UNKNOWN = 0.1


def encode(config: ModelConfig, texts: Sequence[str], labels: np.ndarray) -> Encoded:
    """Tokenise: int32 ids, cut to max_length and padded to the longest text.

    Raises InputError for ids that the model's embedding does not have. Warns if more than
    MAX_UNKNOWN of the tokens are unknown.
    """
    ids, pad = _tokenize(config, texts)
    rows = [torch.tensor(item or [pad], dtype=torch.int32) for item in ids]  # some have no token
    lengths = torch.tensor([len(row) for row in rows])
    padded = pad_sequence(rows, batch_first=True, padding_value=pad)
    return Encoded(input_ids=padded, lengths=lengths, labels=torch.from_numpy(labels).long())


def _tokenize(config: ModelConfig, texts: Sequence[str]) -> tuple[list[list[int]], int]:
    """Token ids of each text, and the padding id."""
    if config.name in DRAWN:
        return [_hash_tokens(text)[: config.max_length] for text in texts], 0
    tokenizer, settings = load_tokenizer(config), load_config(config)
    with loading(config.name):
        encoded = tokenizer(list(texts), truncation=True, max_length=config.max_length)
    ids: list[list[int]] = encoded["input_ids"]
    every = np.concatenate([np.array(row, dtype=np.int64) for row in ids])
    _require_rows(config.name, every, tokenizer, settings)
    _warn_of_unknown(config.name, every, len(texts), tokenizer)
    return ids, padding_id(settings, tokenizer)


def _require_rows(name: str, ids: np.ndarray, tokenizer: Any, settings: Any) -> None:
    """ids (num_tokens,): of all texts."""
    num_rows = getattr(settings.get_text_config(), "vocab_size", None)
    largest = int(ids.max(initial=0))
    if num_rows is not None and largest >= num_rows:
        raise InputError(
            f"model.name = {name!r}: its tokeniser makes tokens up to id {largest} "
            f"({tokenizer.convert_ids_to_tokens(largest)!r:.80}), and its embedding has {num_rows} "
            f"rows; allowed: ids up to {num_rows - 1}, as from the tokeniser that belongs to the "
            "weights, or weights whose embedding was resized"
        )


def _warn_of_unknown(name: str, ids: np.ndarray, num_texts: int, tokenizer: Any) -> None:
    """ids (num_tokens,): of all texts. Tokens that stand for no word, such as [CLS], do not count.
    Byte-level tokenisers know every token."""
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return
    words = ids[~np.isin(ids, [i for i in tokenizer.all_special_ids if i != unknown])]
    share = float(np.mean(words == unknown)) if len(words) else 0.0
    if share > MAX_UNKNOWN:
        warnings.warn(
            f"model.name = {name!r}: {100 * share:.1f} % of the tokens of {num_texts} texts are "
            f"{tokenizer.unk_token!r}, words unknown to its tokeniser; usual are less than "
            f"{100 * MAX_UNKNOWN:g} %",
            RuntimeWarning,
            stacklevel=3,
        )


def _hash_tokens(text: str) -> list[int]:
    """One id per lower-case word: 0 pads, 1 starts, the rest is CRC-32 modulo the vocabulary."""
    hashed = (zlib.crc32(word.encode()) % (toy.VOCABULARY - 2) + 2 for word in text.lower().split())
    return [1, *hashed]
