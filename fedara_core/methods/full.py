"""Full fine-tuning under FedAvg: "Communication-Efficient Learning of Deep Networks from
Decentralized Data", arXiv 1602.05629; the upper line of every comparison.

Equations: w <- sum_k p_k w_k over all parameters w of the model, embeddings and layer norms too.
    Each is trained whole; no adapter has a row.
Up: d_in d_out floats per adapter, all other parameters (biases, layer norms, embeddings), and the
    head.
Down: the same; in round 0 nothing, as the start is free.
Shapes: those of the model's parameters. A parameter that two layers share is one, sent once.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedara_core.method import Method
from fedara_core.state import ServerState, Start


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """No hyperparameters of its own; adapter.lora_rank, lora_alpha and targets have no effect."""

    coded: ClassVar = ("down", "feedback")
    plain_mean: ClassVar = True
    low_rank: ClassVar = False

    def init(self, start: Start) -> ServerState:
        start.model.module.requires_grad_(True)
        return start.state(self, {})
