"""Makes a transformers model fit this suite, or says why it does not: linear layers, positions, and
the token that a decoder's head looks at."""

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from bench.config.sections import ModelConfig
from fedara_core.errors import InputError

ALLOWED = "allowed: an encoder such as BERT, or a decoder such as Llama"

_SHORT = 3  # tokens
_PADDING_ERROR = 0.01  # of the largest logit; rounding is far below
_PACKING_ERROR = 1e-4  # likewise
_LENGTHS = (0.4, 1.0, 0.1, 0.7)  # of max_length


class FromConv1D(nn.Linear):
    """The linear layer that acts as a Conv1D of transformers (GPT-2's), whose weight is (in, out).

    Adapters wrap linear layers only. `with_conv1d` gives the model its own layers back.
    """


def with_linear(model: nn.Module) -> None:
    """Replace each Conv1D of transformers by its FromConv1D, in place."""
    from transformers.pytorch_utils import Conv1D

    for name, layer in list(model.named_modules()):
        if isinstance(layer, Conv1D):
            d_in, d_out = layer.weight.shape
            linear = FromConv1D(d_in, d_out, device="meta")
            linear.weight = nn.Parameter(layer.weight.detach().T.contiguous())
            linear.bias = layer.bias
            model.set_submodule(name, linear)


def with_conv1d(model: nn.Module) -> None:
    """Replace each FromConv1D by the Conv1D that it came from, in place."""
    from transformers.pytorch_utils import Conv1D

    for name, layer in list(model.named_modules()):
        if isinstance(layer, FromConv1D):
            conv = Conv1D(layer.out_features, layer.in_features)  # type: ignore[no-untyped-call]
            conv.weight = nn.Parameter(layer.weight.detach().T.contiguous())
            conv.bias = layer.bias
            model.set_submodule(name, conv)


def require_one_stack(name: str, settings: Any) -> None:
    """Raise InputError for an encoder-decoder."""
    if getattr(settings, "is_encoder_decoder", False):
        raise InputError(
            f"model.name = {name!r} is an encoder-decoder ({settings.model_type}): its decoder, on "
            f"which the head would be, has no text of its own to read; {ALLOWED}"
        )


def num_positions(model: nn.Module, settings: Any) -> int | None:
    """How many tokens a model has positions for; None if that is not limited.

    RoBERTa, MPNet and their like count positions from the padding id on, so that 514 rows of the
    embedding hold 512 tokens. Such an embedding has a padding_idx.
    """
    limits = [getattr(settings.get_text_config(), "max_position_embeddings", None) or 0]
    limits += [layer.num_embeddings - first_position(model) for layer in _shifted(model)]
    return min((limit for limit in limits if limit > 0), default=None)  # XLNet's is -1


def first_position(model: nn.Module) -> int:
    """The position id of a text's first token."""
    return max((layer.padding_idx + 1 for layer in _shifted(model)), default=0)


def _shifted(model: nn.Module) -> list[Any]:
    """The embeddings of absolute positions that count from a padding id on."""
    return [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Embedding) and layer.padding_idx is not None
        if "position" in name.rpartition(".")[2] and "relative" not in name
    ]


def require_positions(config: ModelConfig, positions: int | None) -> None:
    """Raise InputError if texts of max_length tokens are longer than a model's positions."""
    if positions is not None and config.max_length > positions:
        raise InputError(
            f"model.max_length = {config.max_length} is above the {positions} positions of "
            f"{config.name!r}; allowed: 4 to {positions}"
        )


def require_logits(config: ModelConfig, model: nn.Module, pad: int, num_classes: int) -> None:
    """Raise InputError unless a model gives logits for a text of max_length tokens, for a short one
    beside it, and for a short one alone; warn if the padding of the short one changes its logits.

    pad: the padding id. The model's state stays as it is.
    """
    ids = torch.full((2, config.max_length), 1 if pad == 0 else 0)
    attention_mask = torch.ones_like(ids)
    ids[1, _SHORT:], attention_mask[1, _SHORT:] = pad, 0
    try:
        logits = _logits(model, ids, attention_mask)
        alone = _logits(model, ids[1:, :_SHORT], attention_mask[1:, :_SHORT])
        problem = "" if logits.shape == (2, num_classes) else f"logits {tuple(logits.shape)}"
    except Exception as error:  # each architecture has its own
        text = " ".join(str(error).split())[:200]
        problem = f"{type(error).__name__}: {text}"
    if problem:
        raise InputError(
            f"model.name = {config.name!r} does not work on texts of {_SHORT} and of "
            f"model.max_length = {config.max_length} tokens ({problem}); {ALLOWED}, that reads both"
        )
    if (alone[0] - logits[1]).abs().max() > _PADDING_ERROR * alone.abs().max():
        warnings.warn(
            f"model.name = {config.name!r} does not heed the attention_mask: what it says of a "
            "text depends on how long the others of the batch are",
            RuntimeWarning,
            stacklevel=2,
        )


def reads_packed(config: ModelConfig, wrapper: Any, pad: int, implementation: str) -> bool:
    """Let a model read packed texts, if its logits then are those of padded ones; whether it does.

    wrapper: around the `transformer`, with a switch `packed`. pad: the padding id. implementation:
    the packed attention's name. Of a model that does not, nothing is changed.
    """
    vocabulary = wrapper.transformer.config.get_text_config().vocab_size
    known = torch.tensor([token_id for token_id in range(min(vocabulary, 1000)) if token_id != pad])
    lengths = torch.tensor([max(1, round(share * config.max_length)) for share in _LENGTHS])
    attention_mask = (torch.arange(config.max_length) < lengths[:, None]).long()
    drawn = torch.randint(
        len(known), attention_mask.shape, generator=torch.Generator().manual_seed(0)
    )
    ids = torch.where(attention_mask.bool(), known[drawn], pad)
    padded = _logits(wrapper, ids, attention_mask)
    before = wrapper.transformer.config._attn_implementation
    try:
        wrapper.transformer.set_attn_implementation(implementation)
        wrapper.packed = True
        error = (_logits(wrapper, ids, attention_mask) - padded).abs().max()
        if error <= _PACKING_ERROR * padded.abs().max():
            return True
    except Exception:  # each architecture has its own
        pass
    wrapper.packed = False
    wrapper.transformer.set_attn_implementation(before)
    return False


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The model's logits without dropout; which of its modules are in training stays as it is."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        return model(ids, attention_mask)  # type: ignore[no-any-return]
    finally:
        for module in in_training:
            module.training = True


def look_at_last(model: Any) -> None:
    """Let the head of a decoder see the last token of the attention_mask at all positions.

    transformers looks for the last token that is not the padding id, and so for the wrong one where
    a text ends with that id; XLNet takes the last of the batch. Other heads stay as they are.
    """
    if _finds_last(type(model)) or getattr(model.config, "summary_type", "") == "last":
        base = getattr(model, model.base_model_prefix)
        base.register_forward_hook(_spread_last, with_kwargs=True)


def _finds_last(cls: type) -> bool:
    """Whether the class's forward goes by the padding id, or hands on to one that does."""
    for parent in cls.__mro__:
        if "forward" in vars(parent):
            names = inspect.unwrap(vars(parent)["forward"]).__code__.co_names
            if set(names) != {"super", "forward"}:
                return "pad_token_id" in names
    return False


def _spread_last(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """The output with the last token's hidden state (n, hidden) at all positions."""
    mask: Tensor | None = kwargs.get("attention_mask")  # (n, length)
    if mask is None:
        return output
    hidden = output.last_hidden_state  # (n, length, hidden)
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * positions).argmax(dim=1)  # (n,)
    chosen = hidden[torch.arange(len(hidden), device=mask.device), last]
    output.last_hidden_state = chosen[:, None].expand_as(hidden)
    return output
