"""Dropout from words of random bits: the distribution, the gradient, the same bits again."""

import pytest
import torch
from torch import nn

from fedara_core.dropout import Dropout, dropout, with_fast_dropout


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_distribution(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(1 << 20)
    kept = dropout(x, p) != 0
    deviation = (p * (1 - p) / len(x)) ** 0.5
    assert abs(float(kept.double().mean()) - (1 - p)) < 4 * deviation
    # Neighbours come from one draw of 64 bits: no pair of places in it may go together.
    places = kept.view(-1, 4).double()
    correlation = torch.corrcoef(places.T) - torch.eye(4)
    assert correlation.abs().max() < 5 / len(places) ** 0.5


def test_outputs_are_scaled_and_the_gradient_goes_where_they_went() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 7, 3).transpose(0, 1).requires_grad_()
    y = dropout(x, 0.25)
    kept = y != 0
    torch.testing.assert_close(y, torch.where(kept, x / 0.75, 0.0))
    y.sum().backward()
    torch.testing.assert_close(x.grad, kept / 0.75)


def test_the_same_seed_gives_the_same_bits() -> None:
    x = torch.randn(101)
    drawn = [dropout(x, 0.3) for _ in range(2) if torch.manual_seed(7)]
    assert torch.equal(*drawn)
    assert not torch.equal(dropout(x, 0.3), drawn[0])


def test_layers_are_replaced_and_stay_in_their_mode() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Dropout(0.5), nn.Dropout1d(0.5)))
    module.eval()
    with_fast_dropout(module)
    layer = module.get_submodule("1.0")
    assert (type(layer), type(module.get_submodule("1.1"))) == (Dropout, nn.Dropout1d)
    assert not layer.training
    x = torch.randn(4, 3)
    assert torch.equal(layer(x), x)
    torch.manual_seed(0)
    assert (layer.train()(x) == 0).any()
