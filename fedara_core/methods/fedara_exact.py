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
Down: live triplets, the head, and the rank_mask, one bit per triplet (a client may be new).
Shapes: A (r, d_in), E (r,), B (d_out, r); row i = [A[i], E[i], B[:, i]].
Rank-deficient sums: a singular value within float32's rounding of zero has no vectors of its own;
    its triplet is dead, a row of zeros, whatever the budget (so an adapter whose E never moved is
    gone). Triplets may move between adapters, but their number never grows.
Deviation: all of this, but for the clients' local training, differs from FedARA.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedara_core.adapters import AdapterConfig, LowRank
from fedara_core.errors import require_fractions, require_positive
from fedara_core.factors import svd_rows, truncated_product
from fedara_core.importance import scheduled_budget, top_k_masks
from fedara_core.method import (
    Client,
    Method,
    ServerState,
    client_shares,
    mean_whole,
    next_state,
    num_values,
    split_values,
    start_state,
)
from fedara_core.wire import Upload, message_bytes


@dataclass(frozen=True, kw_only=True)
class FedAraExact(Method):
    """final_budget: share of the first triplets that is left; warmup_fraction, final_fraction:
    shares of the rounds before and after the cubic; init_std: deviation of A and B; e_lr_factor:
    factor on E's learning rate. No paper has defaults: they are those of fedara.
    """

    needs_factors: ClassVar[bool] = True
    steady_rows: ClassVar[bool] = False

    final_budget: float = 0.25
    warmup_fraction: float = 0.1
    final_fraction: float = 0.3
    init_std: float = 0.1
    e_lr_factor: float = 1.0

    def __post_init__(self) -> None:
        require_fractions(self, "final_budget", "warmup_fraction", "final_fraction")
        require_positive(self, "init_std", "e_lr_factor")

    def init(
        self, model: nn.Module, adapter: AdapterConfig, *, seed: int, num_rounds: int
    ) -> ServerState:
        rows = svd_rows(adapter, seed, self.init_std)
        return start_state(model, adapter, rows, seed=seed, num_rounds=num_rounds)

    def form(self, state: ServerState) -> LowRank:
        return LowRank(scale=state.adapter.scale, singular=True)

    def lr_factor(self, part: str) -> float:
        return self.e_lr_factor if part == "E" else 1.0

    def download(self, model: nn.Module, state: ServerState, client: Client | None) -> int:
        super().download(model, state, client)
        return message_bytes(num_values(state, self.form(state)), state.num_triplets)

    def aggregate(self, state: ServerState, uploads: Sequence[Upload]) -> ServerState:
        form = self.form(state)
        whole = mean_whole(uploads, state)
        received = [split_values(upload.values, state, form)[0] for upload in uploads]
        rows, values = {}, {}
        for name in sorted(state.rows):
            live = state.rank_masks[name]
            sent = [client_rows[name][live] for client_rows in received]  # (r_live, width) each
            rows[name], values[name] = self._mean(sent, client_shares(uploads), state, name)
        num_live = sum(state.live_triplets.values())
        rank_masks = top_k_masks(values, min(scheduled_budget(state, self), num_live))
        for name in rank_masks:
            rank_masks[name] = rank_masks[name] & (values[name] > 0)
            rows[name][~rank_masks[name]] = 0
        return next_state(state, uploads, rows=rows, rank_masks=rank_masks, whole=whole)

    def _mean(
        self, sent: Sequence[Tensor], shares: Sequence[float], state: ServerState, name: str
    ) -> tuple[Tensor, Tensor]:
        """The mean update of one adapter: rows (r, width) of its first triplets, and S (r,)."""
        form, shape = self.form(state), state.adapter.shapes[name]
        rows = torch.zeros_like(state.rows[name])
        values = torch.zeros(len(rows), dtype=torch.float64)
        if not len(sent[0]):
            return rows, values
        parts = [form.split(client_rows.double(), shape) for client_rows in sent]
        weighted = [
            share * form.scale * part["E"] * part["B"]
            for share, part in zip(shares, parts, strict=True)
        ]
        left = torch.cat(weighted).T  # (d_out, K r)
        right = torch.cat([part["A"] for part in parts])  # (K r, d_in)
        u, s, vt = truncated_product(left, right, len(rows))
        rounding = torch.finfo(torch.float32).eps * left.norm() * right.norm()
        s = torch.where(s > rounding, s, 0.0)
        rows[: len(s)] = torch.cat([vt, s[:, None] / form.scale, u.T], dim=1)
        values[: len(s)] = s
        return rows, values
