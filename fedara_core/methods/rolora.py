"""RoLoRA: "Robust Federated Finetuning of Foundation Models via Alternating Minimization of LoRA",
arXiv 2409.02346.

Equations: W = W0 + scale B A. Even rounds (from 0) train B with A fixed, odd rounds A with B fixed;
    B goes first, as with B = 0 A has no gradient. The half that rests is the same at all clients,
    so the mean of the other half gives the exact mean update, sum_k p_k scale B_k A_k.
Up: r d_out floats per adapter in even rounds, r d_in in odd ones, and the head.
Down: the half that the last round trained, r d_in floats per adapter in even rounds and r d_out in
    odd ones, and the head; from round 2 on r (d_in + d_out) to a client that was not in the last
    round's cohort. In round 0 nothing.
Shapes: A (r, d_in), B (d_out, r); row i = [A[i], B[:, i]].
Deviation: clients may miss rounds, and then catch up on both halves; the head trains every round.
"""

from dataclasses import dataclass

from fedara_core.method import Alternating


@dataclass(frozen=True, kw_only=True)
class RoLora(Alternating):
    """No hyperparameters of its own."""
