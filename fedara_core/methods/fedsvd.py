"""FedSVD: "Adaptive Orthogonalization for Private Federated Learning with LoRA", arXiv 2505.12805.

Equations: W = W0 + scale B A. Clients train B with A fixed, so its mean B = sum_k p_k B_k gives the
    exact mean update. After every round the server refactors: U S V^T = svd(B A), A <- V^T, with
    orthonormal rows, and B <- U S. B A has rank r at most, so the function stays as it is.
The row space of A never changes (B A lies in it): the SVD turns the basis within. SGD can not tell,
    its steps on B turn along; what AdamW does with each weight depends on the basis.
Up: r d_out floats per adapter, and the head.
Down: r (d_in + d_out) floats per adapter, and the head.
Shapes: A (r, d_in), B (d_out, r); row i = [A[i], B[:, i]]; U (d_out, r), S (r,), V^T (r, d_in).
Deviation: A's random draw is orthonormal too (the authors' code starts from LoRA's draw, B = 0, and
    has orthonormal rows from the first SVD on); the head trains (their code freezes it); no
    differential privacy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from fedara_core.adapters import AdapterConfig, LowRank, Shape
from fedara_core.factors import join_pair, lora_rows, signed_svd, split_pair, truncated_product
from fedara_core.method import Method, ServerState, start_state
from fedara_core.wire import Upload


@dataclass(frozen=True, kw_only=True)
class FedSvd(Method):
    """No hyperparameters of its own: the SVD runs after every round, the authors' default."""

    steady_rows: ClassVar[bool] = False  # the basis is another after each SVD

    def init(
        self, model: nn.Module, adapter: AdapterConfig, *, seed: int, num_rounds: int
    ) -> ServerState:
        rows = lora_rows(adapter, seed)
        for name, shape in adapter.shapes.items():
            a, b = split_pair(rows[name], shape)
            _, _, vt = signed_svd(a, len(a))
            rows[name] = join_pair(vt.float(), b)
        return start_state(model, adapter, rows, seed=seed, num_rounds=num_rounds)

    def form(self, state: ServerState) -> LowRank:
        return LowRank(scale=state.adapter.scale, frozen=("A",))

    def aggregate(self, state: ServerState, uploads: Sequence[Upload]) -> ServerState:
        mean = super().aggregate(state, uploads)
        rows = {
            name: refactor(mean.rows[name], shape) for name, shape in state.adapter.shapes.items()
        }
        return replace(mean, rows=rows)


def refactor(rows: Tensor, shape: Shape) -> Tensor:
    """LoRA rows (r, d_in + d_out) with the same product B A, its SVD: A = V^T, B = U S."""
    a, b = split_pair(rows, shape)
    u, s, vt = truncated_product(b, a, len(a))
    return join_pair(vt, u * s).float()
