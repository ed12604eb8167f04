"""Batches without padding: texts follow one another in one row, and attention keeps them apart.

All layers but attention work on one token at a time, so that padding only costs them time.
Attention pads for itself: its share of the work is small where texts are short.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedara_core.dropout import dropout

_UNKNOWN = ("sliding_window", "softcap", "s_aux")  # what some models add to attention, not here


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Where the T tokens of n texts lie.

    lengths (n,), the longest of them; mask (n, longest) bool; places (T,): of the tokens in the
    padded (n * longest,); positions (T,): each token's place in its text.
    """

    lengths: Tensor
    longest: int
    mask: Tensor
    places: Tensor
    positions: Tensor

    @property
    def padded_shape(self) -> tuple[int, int]:
        return len(self.lengths), self.longest

    @property
    def is_full(self) -> bool:
        """Whether all texts are of one length."""
        return len(self.places) == len(self.lengths) * self.longest

    def pad(self, packed: Tensor) -> Tensor:
        """(T, ...) to (n, longest, ...), with zeros between."""
        n, longest = self.padded_shape
        rest = packed.shape[1:]
        if self.is_full:
            return packed.reshape(n, longest, *rest)
        padded = packed.new_zeros(n * longest, *rest).index_copy(0, self.places, packed)
        return padded.view(n, longest, *rest)

    def take(self, padded: Tensor) -> Tensor:
        """(n, longest, ...) to (T, ...); the inverse of `pad`."""
        flat = padded.flatten(0, 1)
        return flat if self.is_full else flat.index_select(0, self.places)

    def inputs(self, input_ids: Tensor, first_position: int) -> dict[str, Any]:
        """What a model of transformers takes for the batch input_ids (n, length)."""
        return {
            "input_ids": self.take(input_ids[:, : self.longest])[None],  # (1, T)
            "position_ids": (self.positions + first_position)[None],
            "packing": self,
        }

    def mean(self, packed: Tensor) -> Tensor:
        """Mean over the tokens of each text: (T, d) to (n, d)."""
        return self.pad(packed).sum(dim=1) / self.lengths[:, None].to(packed.dtype)


def pack(attention_mask: Tensor) -> Packing:
    """The packing of a batch with this mask (n, length), whose texts are padded at their end."""
    lengths = attention_mask.sum(dim=1)
    longest = int(lengths.max())
    positions = torch.arange(longest, device=attention_mask.device)
    mask = positions < lengths[:, None]
    places = mask.flatten().nonzero().flatten()
    return Packing(
        lengths=lengths, longest=longest, mask=mask, places=places, positions=places % longest
    )


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    kernel: str,
    packing: Packing,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' attention for packed texts: query (1, heads, T, d) to (1, T, heads, d).

    kernel: torch's "sdpa"; "eager", plain products, or "eager_torch", the same with torch's own
    dropout. Raises ValueError for what it does not know.
    """
    unknown = [name for name in _UNKNOWN if more.get(name) is not None]
    if attention_mask is not None or unknown:
        raise ValueError(f"attention of packed texts knows no {unknown or 'mask'}")
    q, k, v = (packing.pad(x[0].transpose(0, 1)).transpose(1, 2) for x in (query, key, value))
    if k.shape[1] != q.shape[1]:  # several heads of queries share one of keys and values
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    seen = _seen(packing, causal=getattr(module, "is_causal", False))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    mixed = _KERNELS[kernel](q, k, v, seen, scale, dropout)  # (n, heads, longest, d)
    return packing.take(mixed.transpose(1, 2))[None], None


def _seen(packing: Packing, *, causal: bool) -> Tensor | None:
    """Which keys each query sees (n or 1, 1, longest or 1, longest) bool; None: all of them."""
    seen = None if packing.is_full else packing.mask[:, None, None]
    if causal:
        square = packing.mask.new_ones(packing.longest, packing.longest).tril()[None, None]
        seen = square if seen is None else square & seen
    return seen


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    scale: float,
    p: float,
    drop: Callable[[Tensor, float], Tensor] = dropout,
) -> Tensor:
    scores = (q * scale) @ k.transpose(2, 3)  # (n, heads, longest, longest)
    if seen is not None:
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    shares = functional.softmax(scores, dim=-1)
    return (drop(shares, p) if p else shares) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, p: float) -> Tensor:
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, dropout_p=p, scale=scale
    )


_KERNELS: dict[str, Callable[..., Tensor]] = {
    "eager": _eager,
    "eager_torch": partial(_eager, drop=functional.dropout),
    "sdpa": _sdpa,
}


def register(kernel: str) -> str:
    """Make `attention` with this kernel known to transformers; the name to give to a model."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    name = f"packed_{kernel}"
    AttentionInterface.register(name, partial(attention, kernel=kernel))
    AttentionMaskInterface.register(name, _no_mask)
    return name


def pad_for_head(model: Any) -> None:
    """Let the head of a transformers classifier see packed texts padded again: (n, longest, d).

    A pooler, which some models have inside, is a part of the head.
    """
    base = getattr(model, model.base_model_prefix)
    now: list[Packing] = []  # of the forward pass that runs

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        now[:] = filter(None, [kwargs.get("packing")])

    def pad_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(packing.pad(args[0][0]) for packing in now) or args

    def pad_output(module: nn.Module, args: Any, output: Any) -> Any:
        for packing in now:
            output.last_hidden_state = packing.pad(output.last_hidden_state[0])
        return output

    base.register_forward_pre_hook(note, with_kwargs=True)
    base.register_forward_hook(pad_output)
    if getattr(base, "pooler", None) is not None:
        base.pooler.register_forward_pre_hook(pad_input)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Packed texts are kept apart by `attention` itself."""
