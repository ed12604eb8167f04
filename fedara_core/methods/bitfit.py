"""BitFit: "Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
arXiv 2106.10199, under FedAvg (arXiv 1602.05629).

Equations: y = W0 x + b and layer_norm(x) * g + b, with every b of the encoder trained, W0 and g
    frozen. Biases are parameters that train whole; no adapter has a row.
Up: d_out floats per adapter, all other biases (of layer norms, and of linear layers outside
    adapter.targets), and the head.
Down: the same; in round 0 nothing, as the start is free.
Shapes: b (d_out,), or (d,) in a layer norm.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedara_core.errors import InputError
from fedara_core.method import Method
from fedara_core.state import ServerState, Start


@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """No hyperparameters of its own; adapter.lora_rank, lora_alpha and targets have no effect."""

    coded: ClassVar = ("down", "feedback")
    plain_mean: ClassVar = True
    low_rank: ClassVar = False

    def init(self, start: Start) -> ServerState:
        parameters = start.model.module.named_parameters()
        biases = [p for name, p in parameters if name.endswith("bias") and not p.requires_grad]
        if not biases:
            raise InputError(
                "method.name = 'bitfit': the model's encoder has no bias; allowed: a model with "
                "biases, such as BERT's relatives"
            )
        for bias in biases:
            bias.requires_grad_(True)
        return start.state(self, {})
