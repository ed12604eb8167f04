"""Texts to token ids, and what shows that a tokeniser is not the model's."""

import warnings
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bench.config.sections import ModelConfig
from bench.models import toy
from bench.models.source import DRAWN, load_config, load_tokenizer, loading, padding_id
from fedara_core.errors import InputError
from fedara_core.train import Encoded

# Of the tokens of words: a larger share of unknown ones is warned of.
MAX_UNKNOWN = 0.1
_BLOCK = 16384  # texts at a time: lists of ids take ten times the memory of the ids


def encode(config: ModelConfig, texts: Sequence[str], labels: np.ndarray) -> Encoded:
    """Tokenise: int32 ids, cut to max_length and padded to the longest text.

    Raises InputError for ids that the model's embedding does not have. Warns if more than
    MAX_UNKNOWN of the tokens are unknown.
    """
    tokenizer = _Hashing(config) if config.name in DRAWN else _Tokenizer(config)
    blocks = [
        _padded(tokenizer.ids(texts[start : start + _BLOCK]), tokenizer.pad)
        for start in range(0, len(texts), _BLOCK)
    ]
    tokenizer.warn()
    longest = max(ids.shape[1] for ids, _ in blocks)
    padded = torch.full((len(texts), longest), tokenizer.pad, dtype=torch.int32)
    for start, (ids, _) in zip(range(0, len(texts), _BLOCK), blocks, strict=True):
        padded[start : start + len(ids), : ids.shape[1]] = ids
    return Encoded(
        input_ids=padded,
        lengths=torch.cat([lengths for _, lengths in blocks]),
        labels=torch.from_numpy(labels).long(),
    )


def _padded(ids: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids as one tensor (n, longest), and lengths (n,)."""
    rows = [torch.tensor(item or [pad], dtype=torch.int32) for item in ids]  # some have no token
    lengths = torch.tensor([len(row) for row in rows])
    return pad_sequence(rows, batch_first=True, padding_value=pad), lengths


class _Hashing:
    """The tokeniser of models that have no files."""

    pad = 0

    def __init__(self, config: ModelConfig) -> None:
        self._max_length = config.max_length

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [_hash_tokens(text)[: self._max_length] for text in texts]

    def warn(self) -> None:
        """No word is unknown."""


class _Tokenizer:
    """A model's tokeniser, and what it has seen. Tokens that stand for no word, such as [CLS], do
    not count. Byte-level tokenisers know every token."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._tokenizer, settings = load_tokenizer(config), load_config(config)
        self._num_rows = getattr(settings.get_text_config(), "vocab_size", None)
        self._unknown = self._tokenizer.unk_token_id
        self._special = [i for i in self._tokenizer.all_special_ids if i != self._unknown]
        self._num_texts = self._num_words = self._num_unknown = 0
        self.pad = padding_id(settings, self._tokenizer)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text. Raises InputError for those that the embedding does not have."""
        config = self._config
        with loading(config.name):
            encoded = self._tokenizer(list(texts), truncation=True, max_length=config.max_length)
        ids: list[list[int]] = encoded["input_ids"]
        every = np.concatenate([np.array(row, dtype=np.int64) for row in ids])
        self._require_rows(every)
        words = every[~np.isin(every, self._special)]
        self._num_texts += len(texts)
        self._num_words += len(words)
        if self._unknown is not None:
            self._num_unknown += int(np.sum(words == self._unknown))
        return ids

    def _require_rows(self, ids: np.ndarray) -> None:
        """ids (num_tokens,): of some texts."""
        largest = int(ids.max(initial=0))
        if self._num_rows is not None and largest >= self._num_rows:
            token = self._tokenizer.convert_ids_to_tokens(largest)
            raise InputError(
                f"model.name = {self._config.name!r}: its tokeniser makes tokens up to id "
                f"{largest} ({token!r:.80}), and its embedding has {self._num_rows} rows; allowed: "
                f"ids up to {self._num_rows - 1}, as from the tokeniser that belongs to the "
                "weights, or weights whose embedding was resized"
            )

    def warn(self) -> None:
        """Warn if too many of all texts' tokens are unknown."""
        share = self._num_unknown / max(1, self._num_words)
        if share > MAX_UNKNOWN:
            warnings.warn(
                f"model.name = {self._config.name!r}: {100 * share:.1f} % of the tokens of "
                f"{self._num_texts} texts are {self._tokenizer.unk_token!r}, words unknown to its "
                f"tokeniser; usual are less than {100 * MAX_UNKNOWN:g} %",
                RuntimeWarning,
                stacklevel=3,
            )


def _hash_tokens(text: str) -> list[int]:
    """One id per lower-case word: 0 pads, 1 starts, the rest is CRC-32 modulo the vocabulary."""
    hashed = (zlib.crc32(word.encode()) % (toy.VOCABULARY - 2) + 2 for word in text.lower().split())
    return [1, *hashed]
