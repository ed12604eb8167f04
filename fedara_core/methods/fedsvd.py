"""FedSVD: "Adaptive Orthogonalization for Private Federated Learning with LoRA", arXiv 2505.12805.

Equations: W = W0 + scale B A. Clients train B with A fixed, so its mean B = sum_k p_k B_k gives the
    exact mean update. After every round the server refactors: U S V^T = svd(B A), A <- V^T, with
    orthonormal rows, and B <- U S. B A has rank r at most, so the function stays as it is.
The row space of A never changes (B A lies in it): the SVD turns the basis within. SGD can not tell,
    its steps on B turn along; what AdamW does with each weight depends on the basis.
Up: r d_out floats per adapter, and the head.
Down: r (d_in + d_out) floats per adapter, and the head; in round 0 nothing.
Shapes: A (r, d_in), B (d_out, r); row i = [A[i], B[:, i]]; U (d_out, r), S (r,), V^T (r, d_in).
Deviation: A's random draw is orthonormal too (the authors' code starts from LoRA's draw, B = 0, and
    has orthonormal rows from the first SVD on); the head trains and is averaged, so that heads are
    alike in all methods (their code freezes it: freeze_head = true); no differential privacy.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fedara_core.adapters import LowRank
from fedara_core.factors import lora_parts, signed_svd, truncated_product
from fedara_core.merge.received import Received
from fedara_core.method import Method, Size
from fedara_core.state import ServerState, Start


@dataclass(frozen=True, kw_only=True)
class FedSvd(Method):
    """freeze_head: leave the head at its random start, untrained and unsent (their code: true). The
    SVD runs after every round, the authors' default.
    """

    coded: ClassVar = ("down",)  # the basis is another after each SVD

    freeze_head: bool = False

    def init(self, start: Start) -> ServerState:
        if self.freeze_head:
            start.model.freeze_head()
        parts = lora_parts(start.adapter, start.seed)
        for name, a in parts["A"].items():
            _, _, vt = signed_svd(a, len(a))
            parts["A"][name] = vt.float()
        return start.state(self, parts)

    def form(self, state: ServerState) -> LowRank:
        return LowRank(scale=state.adapter.scale, frozen=("A",))

    def downlink(self, state: ServerState, client_id: int) -> Size:
        num_sent = state.index.num_sent
        return Size(num_values=num_sent, num_exact=state.index.size - num_sent)  # A has changed

    def aggregate(self, state: ServerState, received: Received) -> ServerState:
        after = super().aggregate(state, received)
        vector = after.vector.clone()
        parts = after.index.parts(vector)
        for name, a in parts["A"].items():
            refactor(a, parts["B"][name])
        return replace(after, vector=vector)


def refactor(a: Tensor, b: Tensor) -> None:
    """Make A (r, d_in) = V^T and B^T (r, d_out) = (U S)^T of the SVD of their product, in place."""
    u, s, vt = truncated_product(b.T, a, len(a))
    a.copy_(vt)
    b.copy_((u * s).T)
