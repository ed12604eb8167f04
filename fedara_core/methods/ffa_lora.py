"""FFA-LoRA: "Improving LoRA in Privacy-preserving Federated Learning", arXiv 2403.12313.

Equations: W = W0 + scale B A with A fixed at its random draw; B trains, from B = 0. As A is common,
    sum_k p_k scale B_k A = scale (sum_k p_k B_k) A: the mean of B gives the exact mean update.
Up: r d_out floats per adapter, and the head.
Down: the same; in round 0 nothing. A never travels: each client draws it from the seed.
Shapes: A (r, d_in), B (d_out, r); row i = [A[i], B[:, i]].
Deviation: the head trains and is averaged, so that heads are alike in all methods; the paper
    freezes it (freeze_head = true). The learning rate is a shared setting: mind that B alone wants
    a larger one than A and B together.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedara_core.adapters import LowRank
from fedara_core.method import Method
from fedara_core.state import ServerState, Start


@dataclass(frozen=True, kw_only=True)
class FfaLora(Method):
    """freeze_head: leave the head at its random start, untrained and unsent (the paper: true)."""

    coded: ClassVar = ("down", "feedback")
    plain_mean: ClassVar = True

    freeze_head: bool = False

    def init(self, start: Start) -> ServerState:
        if self.freeze_head:
            start.model.freeze_head()
        return super().init(start)

    def form(self, state: ServerState) -> LowRank:
        return LowRank(scale=state.adapter.scale, frozen=("A",))
