"""The bare loops do the work that they stand for: averages by hand."""

import pytest
import torch
from torch import Tensor, nn

from bench.micro.bare import BareLora, add_lora, average, train_round


@pytest.mark.parametrize("messages", [False, True])
def test_clients_that_train_nothing_average_to_what_they_got(messages: bool) -> None:
    mean = [torch.tensor([1.0, -2.0]), torch.tensor([[4.0]])]
    parameters = [torch.full((2,), 9.0), torch.full((1, 1), 9.0)]
    found = average(parameters, mean, [1, 3, 4], messages=messages)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, mean, strict=True))
    assert all(torch.equal(copied, m) for copied, m in zip(parameters, mean, strict=True))
    assert torch.equal(mean[0], torch.tensor([1.0, -2.0]))


class Tiny(nn.Module):
    """One layer to adapt and a classifier; tokens are taken as features."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.classifier = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.layer(input_ids * attention_mask))
        return logits


def test_lora_starts_as_nothing_and_every_client_from_the_same_values() -> None:
    """Two equal clients average to what one trains; another batch gives something else."""
    torch.manual_seed(0)
    model = Tiny()
    batch = {
        "input_ids": torch.randn(4, 3),
        "attention_mask": torch.ones(4, 3),
        "labels": torch.tensor([0, 1, 1, 0]),
    }
    before = model(batch["input_ids"], batch["attention_mask"])
    trained = add_lora(model, 2)
    assert isinstance(model.layer, BareLora)
    assert torch.equal(model(batch["input_ids"], batch["attention_mask"]), before)
    # A (2, 3), B (3, 2), and the classifier's weight (2, 3) and bias (2,).
    assert sum(parameter.numel() for parameter in trained) == 6 + 6 + 6 + 2
    start = [parameter.detach().clone() for parameter in trained]
    one = train_round(model, trained, start, [[batch, batch]], 1e-2)
    two = train_round(model, trained, start, [[batch, batch], [batch, batch]], 1e-2)
    other = train_round(model, trained, start, [[batch]], 1e-2)
    for mine, same, different, first in zip(one, two, other, start, strict=True):
        torch.testing.assert_close(mine, same)
        assert not torch.equal(mine, first)
        assert not torch.allclose(mine, different, atol=1e-5)
