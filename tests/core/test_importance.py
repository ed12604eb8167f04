"""What keeping a triplet costs, against sums by hand."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from fedara_core.adapters import AdaptedModel, LowRank, inject
from fedara_core.importance import relative_costs, top_k
from support.adapted import load_rows

FORM = LowRank(scale=1.0)


def adapted(layers: dict[str, nn.Module], num_live: dict[str, int]) -> AdaptedModel:
    """Layers one after another; those with an entry in num_live are wrapped."""
    model = inject(nn.Sequential(OrderedDict(layers)), list(num_live), ())
    shapes = model.shapes
    rows = {name: torch.ones(n, sum(shapes[name])) for name, n in num_live.items() if n}
    load_rows(model, rows, FORM)
    return model


def chain(num_live: dict[str, int]) -> AdaptedModel:
    """Layers whose name order is not their own: "low" comes after "high"."""
    return adapted(
        {
            "low": nn.Linear(2, 3),
            "norm": nn.LayerNorm(3),
            "high": nn.Linear(3, 5),
            "plain": nn.Linear(5, 4),
            "head": nn.Linear(4, 2),
        },
        num_live,
    )


def test_costs_by_hand() -> None:
    """high has one triplet, low has two: what is above both has three to pay for it."""
    shared = (5 * 4 + 4 * 2) / 3
    high = 3 * (3 + 5) + shared
    low = 3 * (2 + 3) + 3 * 5 / 2 + shared
    costs = torch.tensor([high, low, low])
    # All of it is paid, and no more: own products, and the backward pass above "low".
    assert float(costs.sum()) == pytest.approx(3 * (8 + 5 + 5) + 3 * 5 + 5 * 4 + 4 * 2)
    found = relative_costs(chain({"high": 1, "low": 2}))
    torch.testing.assert_close(found, costs / costs.mean())
    assert found.dtype == torch.float32


def test_only_what_lives_pays() -> None:
    """A dead adapter has no cost and no share: the triplets of the one that is left are alike."""
    for num_live in ({"high": 0, "low": 1}, {"high": 3, "low": 0}):
        found = relative_costs(chain(num_live))
        assert found.tolist() == [1.0] * sum(num_live.values())
    assert relative_costs(chain({"high": 0, "low": 0})).tolist() == []


def test_the_order_is_the_models_and_not_that_of_names() -> None:
    """By name "10" and "11" come before "2"; of equal scores the lowest layers lose theirs."""
    num_layers, num_live = 12, 2
    model = adapted(
        {str(i): nn.Linear(6, 6) for i in range(num_layers)},
        {str(i): num_live for i in range(num_layers)},
    )
    costs = relative_costs(model).view(num_layers, num_live)
    assert torch.equal(costs[:, 0], costs[:, 1])
    by_name = dict(zip(model.adapters, costs[:, 0].tolist(), strict=True))
    in_order = [by_name[str(i)] for i in range(num_layers)]
    assert in_order == sorted(in_order, reverse=True)
    assert len(set(in_order)) == num_layers
    # Layer 0 alone needs the gradient of layer 1's input: half of it for each of its triplets.
    assert in_order[0] / in_order[1] == pytest.approx((36 + _above(0)) / (36 + _above(1)))
    for num_kept in range(num_layers + 1):
        bits = top_k(1 / costs.flatten(), num_live * num_kept).view(num_layers, num_live)
        kept = {name for name, own in zip(model.adapters, bits, strict=True) if own.all()}
        assert kept == {str(i) for i in range(num_layers - num_kept, num_layers)}


def _above(layer: int) -> float:
    """A triplet's share of the layers above it: 36 multiplications each, two triplets a layer."""
    return sum(36 / (2 * k) for k in range(layer + 1, 12))
