"""FedARA with exact aggregation: an extension of arXiv 2501.14406, ours and in no paper. Never
report it as FedARA.

Equations: clients train W = W0 + scale B diag(E) A; A, B Gaussian, E = 0 at the start.
    Server: Delta = sum_k p_k scale B_k diag(E_k) A_k, exactly, as the product of the stacked
    [p_k scale B_k E_k] (d_out, K r) and [A_k] (K r, d_in); Delta = U S V^T by QR of both and an SVD
    of the small core, cut to lora_rank triplets per adapter. Over all adapters together the b(t)
    largest singular values live on: of all choices of b(t) triplets this one changes the mean
    update least. b(t) is the cubic of arXiv 2303.10512 over rounds; clients score and vote nothing.
    A = V^T, B = U, E = S / scale: A and B orthonormal, all of the magnitude in E.
Up: live triplets, d_in + 1 + d_out floats each, and the head.
Down: live triplets, the head, and the rank_mask, one bit per triplet (a client may be new);
    in round 0 nothing.
Shapes: A (r, d_in), E (r,), B (d_out, r); row i = [A[i], E[i], B[:, i]].
Rank-deficient sums: a singular value within float32's rounding of zero has no vectors of its own;
    its triplet is dead, a row of zeros, whatever the budget (so an adapter whose E never moved is
    gone). Triplets may move between adapters, but their number never grows.
Deviation: all of this, but for the clients' local training, differs from FedARA.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedara_core.adapters import LowRank
from fedara_core.errors import require
from fedara_core.factors import svd_parts, truncated_product
from fedara_core.importance import scheduled_budget, top_k
from fedara_core.merge.received import Received
from fedara_core.method import Method, Size, next_state
from fedara_core.state import ServerState, Start, with_parts
from fedara_core.values import Tensors


@dataclass(frozen=True, kw_only=True)
class FedAraExact(Method):
    """final_budget: share of the first triplets that is left; warmup_fraction, final_fraction:
    shares of the rounds before and after the cubic; init_std: deviation of A and B; e_lr_factor:
    factor on E's learning rate. No paper has defaults: they are those of fedara.
    """

    combine: ClassVar = "gather"
    coded: ClassVar = ("down",)

    final_budget: float = 0.25
    warmup_fraction: float = 0.1
    final_fraction: float = 0.3
    init_std: float = 0.1
    e_lr_factor: float = 1.0

    def __post_init__(self) -> None:
        require(self, "in [0, 1]", "final_budget", "warmup_fraction", "final_fraction")
        require(self, "above 0", "init_std", "e_lr_factor")

    def init(self, start: Start) -> ServerState:
        return start.state(self, svd_parts(start.adapter, start.seed, self.init_std))

    def form(self, state: ServerState) -> LowRank:
        return LowRank(scale=state.adapter.scale, singular=True)

    def lr_factor(self, part: str) -> float:
        return self.e_lr_factor if part == "E" else 1.0

    def downlink(self, state: ServerState, client_id: int) -> Size:
        return Size(num_values=state.index.num_sent, num_bits=state.num_triplets)

    def aggregate(self, state: ServerState, received: Received) -> ServerState:
        whole = state.index.whole(received.mean)
        clients = [state.index.parts(upload.values) for upload in received.uploads]
        parts: dict[str, Tensors] = {"A": {}, "E": {}, "B": {}}
        values: Tensors = {}  # adapter -> (r,), zero where there is no triplet
        for name, mask in state.rank_masks.items():
            values[name] = torch.zeros(len(mask), dtype=torch.float64)
            if state.live_triplets[name]:
                own = [{part: client[part][name] for part in parts} for client in clients]
                u, s, vt = self._mean(own, received.shares, state.adapter.scale, len(mask))
                values[name][: len(s)] = s
                e = s[:, None] / state.adapter.scale
                for part, rows in (("A", vt), ("E", e), ("B", u.T)):
                    parts[part][name] = rows.float()
        budget = min(scheduled_budget(state, self), state.num_live)
        pooled = torch.cat([torch.zeros(0, dtype=torch.float64), *values.values()])
        chosen = torch.split(
            top_k(pooled, budget) & (pooled > 0), [len(s) for s in values.values()]
        )
        rank_masks = dict(zip(values, chosen, strict=True))
        live = {
            part: {name: rows[rank_masks[name][: len(rows)]] for name, rows in tensors.items()}
            for part, tensors in parts.items()
        }
        after = next_state(state, received, rank_masks=rank_masks)
        return with_parts(after, self.form(after), live, whole)

    def _mean(
        self,
        sent: Sequence[Mapping[str, Tensor]],
        shares: Sequence[float],
        scale: float,
        lora_rank: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The SVD of the mean update of one adapter, cut to lora_rank triplets: U, S, V^T.

        sent: of each client A (r_live, d_in), E (r_live, 1), B^T (r_live, d_out).
        """
        weighted = [
            share * scale * own["E"].double() * own["B"].double()
            for share, own in zip(shares, sent, strict=True)
        ]
        left = torch.cat(weighted).T  # (d_out, K r)
        right = torch.cat([own["A"].double() for own in sent])  # (K r, d_in)
        u, s, vt = truncated_product(left, right, lora_rank)
        rounding = torch.finfo(torch.float32).eps * left.norm() * right.norm()
        return u, torch.where(s > rounding, s, 0.0), vt
