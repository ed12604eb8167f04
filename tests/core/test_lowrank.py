"""The low-rank layer's own forward and backward pass against torch's automatic one."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedara_core.lowrank import low_rank_linear

D_IN, D_OUT, RANK, SCALE = 24, 16, 3, 0.5


def drawn(num_tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """x, W, bias, A, B^T."""
    torch.manual_seed(num_tokens)
    shapes = [(2, num_tokens // 2, D_IN), (D_OUT, D_IN), (D_OUT,), (RANK, D_IN), (RANK, D_OUT)]
    x, weight, bias, a, b = (torch.randn(shape) for shape in shapes)
    return [x.to(dtype), weight.to(dtype), bias, a, b]


def plain(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The formula, in float64."""
    x, weight, bias, a, b = (t.double() for t in (x, weight, bias, a, b))
    return functional.linear(x, weight + SCALE * b.T @ a, bias)


# Of 2 tokens the sum of the weights is not formed, of 60 it is.
@pytest.mark.parametrize(
    ("num_tokens", "dtype", "error"),
    [(2, torch.float32, 1e-5), (60, torch.float32, 1e-5), (60, torch.bfloat16, 0.03)],
)
def test_output_and_gradients(num_tokens: int, dtype: torch.dtype, error: float) -> None:
    tensors = drawn(num_tokens, dtype)
    upper = torch.randn(2, num_tokens // 2, D_OUT)
    for trained in ((0, 3, 4), (0, 4), (3, 4), (0, 2, 3)):
        found = []
        for run in (lambda *t: low_rank_linear(*t, SCALE), plain):
            own = [t.clone().requires_grad_(i in trained) for i, t in enumerate(tensors)]
            y = run(*own)
            (y * upper.to(y.dtype)).sum().backward()
            found.append([y, *(own[i].grad for i in trained)])
        for ours, theirs in zip(*found, strict=True):
            assert ours is not None
            assert (ours - theirs).abs().max() <= error * theirs.abs().max()
        assert {g.dtype for i, g in zip(trained, found[0][1:], strict=True) if i > 1} == {
            torch.float32
        }


def test_a_small_change_is_not_lost_in_bfloat16() -> None:
    """1 + s B A would be rounded to 1; x is made so that the ones cancel."""
    x, weight, bias, a, b = drawn(60, torch.bfloat16)
    x[..., 1::2] = -x[..., ::2]
    tensors = x, torch.ones_like(weight), torch.zeros_like(bias), a / 1000, b
    change, wanted = low_rank_linear(*tensors, SCALE), plain(*tensors)
    assert (change - wanted).norm() < 0.02 * wanted.norm()
