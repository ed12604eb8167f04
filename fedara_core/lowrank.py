"""A frozen linear layer plus a change of low rank, with a backward pass of its own.

y = x (W + scale B A)^T + bias. Automatic differentiation needs two more products over all tokens
and an addition in each pass, and keeps what lies between them. Here the sum in brackets is formed
once a pass, which costs r / T of a product over T tokens, and the gradients are

    dx = dy (W + scale B A),    dA = scale (dy B)^T x,    dB = scale dy^T (x A^T).

Shapes: x (T, d_in), y (T, d_out), W (d_out, d_in), A (r, d_in), B^T (r, d_out) as rows.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """The layer's output (..., d_out) for x (..., d_in), in the weight's dtype.

    weight: frozen. a (r, d_in) and b (r, d_out) are rows in float32, and so are their gradients.
    The sum is formed in float32 alone: in bfloat16 it would lose a change that is small beside W.
    """
    num_tokens, (d_out, d_in) = x.numel() // x.shape[-1], weight.shape
    merged = weight.dtype == torch.float32 and num_tokens * (d_in + d_out) >= d_in * d_out
    out: Tensor = _LowRankLinear.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, a, b, scale, merged
    )
    return out


class _LowRankLinear(torch.autograd.Function):
    # Products with few rows are written with these rows first: twice as fast as transposed.

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        merged: bool,
    ) -> Tensor:
        ctx.scale, ctx.merged, ctx.shape = scale, merged, x.shape
        x = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        a, b = a.to(weight.dtype), b.to(weight.dtype)
        bias = None if bias is None else bias.to(weight.dtype)
        if merged:
            hidden = None
            y = functional.linear(x, _merge(weight, a, b, scale), bias)
        else:
            hidden = a @ x.T  # (r, T)
            y = functional.linear(x, weight, bias).addmm_(hidden.T, b, alpha=scale)
        ctx.save_for_backward(x, weight, a, b, hidden)
        return y.view(*ctx.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, hidden = ctx.saved_tensors
        needs_x, _, needs_bias, needs_a, needs_b, *_ = ctx.needs_input_grad
        dy = dy.reshape(-1, dy.shape[-1])
        dx = da = db = None
        above: Any = b @ dy.T if needs_a or not ctx.merged else None  # (r, T)
        if needs_x and ctx.merged:  # formed anew: kept, it would take as much memory as the model
            dx = dy @ _merge(weight, a, b, ctx.scale)
        elif needs_x:
            dx = (dy @ weight).addmm_(above.T, a, alpha=ctx.scale)
        if needs_a:
            da = (above @ x).float().mul_(ctx.scale)
        if needs_b:
            hidden = a @ x.T if hidden is None else hidden
            db = (hidden @ dy).float().mul_(ctx.scale)
        dbias = dy.float().sum(dim=0) if needs_bias else None
        return dx if dx is None else dx.view(ctx.shape), None, dbias, da, db, None, None


def _merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale B A."""
    return torch.addmm(weight, b.T, a, alpha=scale)
