"""FedLoRA: LoRA under FedAvg. "Towards Building the Federated GPT" (FedIT), arXiv 2305.05644.

Equations: W = W0 + scale B A; A and B are averaged separately, mean(B) mean(A) (so the mean of the
    products is not what the server gets: the method's known inexactness).
Start: A Kaiming-uniform as in the LoRA reference code, B = 0 (LoRA, arXiv 2106.09685, section 4.1).
Up: r (d_in + d_out) floats per adapter, and the head.
Down: the same; in round 0 nothing, as the start is free.
Shapes: A (r, d_in), B (d_out, r); row i = [A[i], B[:, i]].
"""

from dataclasses import dataclass
from typing import ClassVar

from fedara_core.method import Method


@dataclass(frozen=True, kw_only=True)
class Lora(Method):
    """No hyperparameters of its own: lora_rank, lora_alpha and targets are shared settings."""

    coded: ClassVar = ("down", "feedback")
    plain_mean: ClassVar = True
