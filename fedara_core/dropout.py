"""Dropout whose masks come from 16 random bits a value.

torch draws each mask value by itself, which on a CPU takes longer than all else that dropout does.
Here one draw of 64 bits decides on four values. The probability is p to the next 2^-16, and outputs
are scaled by that probability.
"""

from typing import Any

import torch
from torch import Tensor, nn

_WORDS = 1 << 16  # values of a word
_WORD_DTYPE, _DRAW_DTYPE = torch.int16, torch.int64


def dropout(x: Tensor, p: float) -> Tensor:
    """x with values at zero with probability p, from torch's generator; the others are larger by
    1 / (1 - p). On a GPU torch's own dropout."""
    if x.device.type != "cpu":
        return nn.functional.dropout(x, p)
    num_dropped = min(round(p * _WORDS), _WORDS - 1)  # so many of the values of a word
    if num_dropped == 0:
        return x
    out: Tensor = _Dropout.apply(x, num_dropped)  # type: ignore[no-untyped-call]
    return out


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, num_dropped: int) -> Tensor:
        ctx.scale = _WORDS / (_WORDS - num_dropped)
        kept = _words(x) >= num_dropped - _WORDS // 2
        ctx.save_for_backward(kept)
        return _scaled(x, kept, ctx.scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return _scaled(dy, kept, ctx.scale), None


def _words(x: Tensor) -> Tensor:
    """Random words in the shape of x, all values of a word equally likely."""
    words_per_draw = _DRAW_DTYPE.itemsize // _WORD_DTYPE.itemsize
    draws = torch.empty(-(-x.numel() // words_per_draw), dtype=_DRAW_DTYPE)
    limits = torch.iinfo(_DRAW_DTYPE)
    return draws.random_(limits.min, None).view(_WORD_DTYPE)[: x.numel()].view(x.shape)


def _scaled(x: Tensor, kept: Tensor, scale: float) -> Tensor:
    """x * scale where kept, else zero. With factors in x's dtype: a bool would be cast by value."""
    return kept.to(x.dtype).mul_(scale).mul_(x)


class Dropout(nn.Dropout):
    """A layer of `dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training else x


def with_fast_dropout(module: nn.Module) -> None:
    """Replace each of torch's dropout layers inside a module, in place."""
    for name, layer in list(module.named_modules()):
        if type(layer) is nn.Dropout:
            module.set_submodule(name, Dropout(layer.p).train(layer.training))
