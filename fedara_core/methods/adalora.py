"""AdaLoRA: "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512,
under FedAvg (arXiv 1602.05629).

Equations: W = W0 + scale B diag(E) A (the paper's P Lambda Q), all trained; A, B Gaussian, E = 0.
    Loss: cross-entropy + orthogonality x mean over all A and B of ||A A^T - I||_F, ||B^T B - I||_F.
    A weight's score is its smoothed sensitivity |w dLoss/dw| times its smoothed uncertainty (eq. 8
    to 11), a triplet's is s(E_i) + mean_j s(B_ji) + mean_j s(A_ij) (eq. 7). After its local steps
    every client for itself keeps the b(t) best of the live triplets and sets the other E_i to zero
    (eq. 6, with a round as the pruning interval); b(t) is the cubic of appendix A, over rounds.
    Server: E_i = sum_k p_k m_k E_ki: a triplet that a client did not send has E_i = 0 there, as in
    eq. 6, and the A_i and B_i that it downloaded: A_i = sum_k p_k (m_k A_ki + (1 - m_k) A_i), and
    likewise B_i. What at least one client of the cohort sent is live next.
Up: the client's own b(t) triplets, d_in + 1 + d_out floats each, the head, and one mask bit per
    live triplet.
Down: live triplets (the union of the last uploads), the head, and the rank_mask, one bit per
    triplet; in round 0 nothing.
Shapes: A (r, d_in), E (r,), B (d_out, r); row i = [A[i], E[i], B[:, i]].
Regrowth: a client trains the whole union, so a triplet that it pruned may come back to it while
    another client keeps it; what the whole cohort prunes is gone.
Deviation: the paper has no federation. Its scores run on through training; here they start anew in
    each round, as clients keep nothing between rounds, and so are drawn up in the last rounds too,
    where the paper keeps its choice. A_i and B_i that a client trained and then pruned do not reach
    the server. The penalty is that of the authors' code and of PEFT, a mean
    of norms; eq. 4 has a sum of squared norms. b(t) is rounded, their code cuts.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedara_core.adapters import AdaptedModel, LowRank
from fedara_core.errors import require
from fedara_core.factors import orthogonality_gaps, svd_parts
from fedara_core.importance import ImportanceMeter, scheduled_budget, top_k
from fedara_core.merge.received import Received
from fedara_core.method import Batch, Client, Method, Size, with_unsent
from fedara_core.state import ServerState, Start, relaid
from fedara_core.values import masks_of_bits
from fedara_core.wire import Upload


@dataclass(frozen=True, kw_only=True)
class AdaLora(Method):
    """final_budget: share of the first triplets that is left (the paper starts with 1.5 times the
    last); warmup_fraction, final_fraction: shares of the rounds before and after the cubic (of the
    order of the paper's GLUE runs, which set them by data set); init_std: deviation of A and B (the
    authors' code); e_lr_factor: factor on E's learning rate; orthogonality: weight of the penalty
    (the paper: 0.1, 0.3 or 0.5).
    """

    combine: ClassVar = "masked"
    version: ClassVar[int] = 2

    final_budget: float = 2 / 3
    warmup_fraction: float = 0.1
    final_fraction: float = 0.5
    init_std: float = 0.02
    e_lr_factor: float = 1.0
    orthogonality: float = 0.1

    def __post_init__(self) -> None:
        require(self, "in [0, 1]", "final_budget", "warmup_fraction", "final_fraction")
        require(self, "above 0", "init_std", "e_lr_factor")
        require(self, "0 or above", "orthogonality")

    def init(self, start: Start) -> ServerState:
        return start.state(self, svd_parts(start.adapter, start.seed, self.init_std))

    def form(self, state: ServerState) -> LowRank:
        return LowRank(scale=state.adapter.scale, singular=True)

    def lr_factor(self, part: str) -> float:
        return self.e_lr_factor if part == "E" else 1.0

    def download(self, model: AdaptedModel, state: ServerState, client: Client | None) -> Size:
        size = super().download(model, state, client)
        if client is not None:
            client.notes["importance"] = ImportanceMeter("smoothed")
        return size

    def downlink(self, state: ServerState, client_id: int) -> Size:
        return Size(num_values=state.index.num_sent, num_bits=state.num_triplets)

    def local_step(self, client: Client, batch: Batch) -> None:
        client.backward(batch)
        if self.orthogonality:
            (self.orthogonality * mean_orthogonality(client.model)).backward()  # type: ignore[no-untyped-call]
        client.notes["importance"].observe(client.model)  # the paper's loss has the penalty in it
        client.step()

    def upload(self, client: Client, state: ServerState) -> Upload:
        scores = client.notes["importance"].scores(client.model)
        kept = top_k(scores, scheduled_budget(state, self))  # (live triplets,)
        return client.make_upload(state.index.take(client.sent_values, kept), kept)

    def aggregate(self, state: ServerState, received: Received) -> ServerState:
        mean = with_unsent(state, received, received.share_of_bits(), zero="E")
        after = super().aggregate(state, mean)
        sent = torch.stack([header.bits for header in received.headers]).any(dim=0)
        return relaid(after, self.form(after), masks_of_bits(sent, state.rank_masks))


def mean_orthogonality(model: AdaptedModel) -> Tensor:
    """Mean of ||A A^T - I||_F and ||B^T B - I||_F over the adapters that have live triplets."""
    norms = [gap.norm() for gap in orthogonality_gaps(model)]
    return torch.stack(norms).mean() if norms else torch.zeros((), requires_grad=True)
