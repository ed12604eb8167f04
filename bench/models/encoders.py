"""Models: a frozen encoder with a classification head.

minilm: all-MiniLM-L6-v2 from its PyPI package, found by path and checked by hash, never imported.
tiny: a random BERT of two layers with a hashing tokeniser, for tests; toy: the same in plain torch.
Any other name is a folder or a hub name for transformers' AutoModel.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.config.sections import ModelConfig
from bench.models import fit, packing, toy
from bench.models.packing import pack, pad_for_head
from bench.models.source import DRAWN, load_config, load_tokenizer, loading, padding_id
from fedara_core.dropout import with_fast_dropout
from fedara_core.errors import InputError
from fedara_core.seeds import derive

_CPU = torch.device("cpu")
_TOY_DROPOUT = 0.1  # BERT's
_MEAN_HEAD = ("classifier.weight", "classifier.bias")


class MeanPooled(nn.Module):
    """A linear head on the mean of the last hidden states over the attention_mask.

    packed: whether the encoder, one of transformers, reads the texts without padding.
    """

    def __init__(self, encoder: nn.Module, hidden_size: int, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(hidden_size, num_classes)
        self.packed = False
        self.first_position = fit.first_position(encoder)

    @property
    def transformer(self) -> nn.Module:
        return self.encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if self.packed:
            packing = pack(attention_mask)
            inputs = packing.inputs(input_ids, self.first_position)
            packed = self.encoder(**inputs)[0][0]  # (T, hidden)
            return self.classifier(packing.mean(packed))  # type: ignore[no-any-return]
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        weights = attention_mask[..., None].to(hidden.dtype)  # (n, length, 1)
        pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1)  # (n, hidden)
        return self.classifier(pooled)  # type: ignore[no-any-return]


class OwnHead(nn.Module):
    """A transformers sequence classifier with the head that its architecture comes with.

    A decoder's head looks at the last token of the attention_mask, whatever that token is.
    packed: whether the model reads the texts without padding; its head sees them padded again.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.packed = False
        self.first_position = fit.first_position(model)
        fit.look_at_last(model)
        pad_for_head(model)

    @property
    def transformer(self) -> Any:
        return self.model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if self.packed:
            inputs = pack(attention_mask).inputs(input_ids, self.first_position)
            return self.model(**inputs).logits  # type: ignore[no-any-return]
        output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return output.logits  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A model with forward(input_ids, attention_mask); `head` names its head's parameters.

    facts: how it computes, for the record.
    """

    model: nn.Module
    head: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)


def build_model(
    config: ModelConfig, *, num_classes: int, seed: int, device: torch.device = _CPU
) -> Classifier:
    """The pretrained encoder in float32 on the CPU, with a fresh head drawn from the seed. Raises
    InputError if the model is missing, altered, or none that gives logits for texts of max_length.

    device: where it will run; model.attention = "auto" goes by it.
    """
    torch.manual_seed(derive(seed, "head"))
    if config.name == "toy":
        classifier = _toy(config, num_classes)
    else:
        auto = "eager" if device.type == "cpu" else "sdpa"
        attention = auto if config.attention == "auto" else config.attention
        config = config.model_copy(update={"attention": attention})
        classifier = _transformer(config, num_classes)
    if config.dropout_masks == "words":
        with_fast_dropout(classifier.model)
    return classifier


def _transformer(config: ModelConfig, num_classes: int) -> Classifier:
    auto_class = "AutoModelForSequenceClassification" if config.pooling == "model" else "AutoModel"
    model = _load(config, auto_class, num_classes)
    pad = 0 if config.name in DRAWN else _settle_padding(config, model)
    classifier = _with_own_head(model) if config.pooling == "model" else _pooled(model, num_classes)
    if config.name not in DRAWN:
        fit.require_logits(config, classifier.model, pad, num_classes)
    slow_masks = config.attention == "eager" and config.dropout_masks == "torch"
    packed = config.packing and fit.reads_packed(
        config,
        classifier.model,
        pad,
        packing.register("eager_torch" if slow_masks else config.attention),
    )
    return replace(classifier, facts={"attention": config.attention, "packed": packed})


def _toy(config: ModelConfig, num_classes: int) -> Classifier:
    if config.pooling == "model":
        raise InputError("model.pooling = 'model': 'toy' has no own head; allowed: mean")
    fit.require_positions(config, toy.NUM_POSITIONS)
    dropout = _TOY_DROPOUT if config.dropout is None else config.dropout
    mean = MeanPooled(toy.ToyEncoder(dropout), toy.HIDDEN, num_classes)
    return Classifier(model=mean, head=_MEAN_HEAD)


def _with_own_head(model: Any) -> Classifier:
    own = OwnHead(model)
    prefix = f"model.{model.base_model_prefix}."
    head = tuple(name for name, _ in own.named_parameters() if not name.startswith(prefix))
    return Classifier(model=own, head=head)


def _pooled(encoder: Any, num_classes: int) -> Classifier:
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # the mean does not use it, so an adapter there would never train
    hidden_size = encoder.config.get_text_config().hidden_size
    return Classifier(model=MeanPooled(encoder, hidden_size, num_classes), head=_MEAN_HEAD)


def _load(config: ModelConfig, auto_class: str, num_classes: int) -> Any:
    import transformers

    # A fresh head and an unused pooler are meant here; transformers would print notices about them.
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    auto = getattr(transformers, auto_class)
    settings = load_config(config)
    fit.require_one_stack(config.name, settings)
    settings.num_labels = num_classes
    dropouts = ["hidden_dropout_prob", "attention_probs_dropout_prob", "dropout"]
    dropouts += ["attention_dropout", "seq_classif_dropout", "classifier_dropout"]
    for name in dropouts if config.dropout is not None else []:
        if getattr(settings, name, None) is not None:
            setattr(settings, name, config.dropout)
    if config.name == "tiny":
        model = auto.from_config(settings, attn_implementation=config.attention)
    else:
        with loading(config.name) as source:
            model = auto.from_pretrained(
                source,
                config=settings,
                attn_implementation=config.attention,
                dtype=torch.float32,
                trust_remote_code=False,
            )
    fit.require_positions(config, fit.num_positions(model, settings))
    fit.with_linear(model)
    return model


def _settle_padding(config: ModelConfig, model: Any) -> int:
    """The padding id. A decoder whose settings name none gets it after its weights are loaded: an
    embedding would not train the row of a padding id that it knows."""
    settings = model.config.get_text_config()
    known = getattr(settings, "pad_token_id", None)
    if known is None and config.pooling == "model":
        known = padding_id(model.config, load_tokenizer(config))
        settings.pad_token_id = known
    return known or 0
