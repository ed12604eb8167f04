"""Linear probe: only the classification head trains; the lower line of every comparison.

Source: the usual linear-probing baseline, under FedAvg (arXiv 1602.05629).
Equations: softmax(W h + b) with h the frozen encoder's output; W, b averaged.
Up: the head. No adapter has a row, so the encoder runs without backward.
Down: the same; in round 0 nothing, as the start is free.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedara_core.method import Method
from fedara_core.state import ServerState, Start


@dataclass(frozen=True, kw_only=True)
class HeadOnly(Method):
    """What the frozen encoder gives for free."""

    coded: ClassVar = ("down", "feedback")
    plain_mean: ClassVar = True
    low_rank: ClassVar = False

    def init(self, start: Start) -> ServerState:
        return start.state(self, {})
