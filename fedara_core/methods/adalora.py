"""AdaLoRA: "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512,
under FedAvg (arXiv 1602.05629).

Equations: W = W0 + scale B diag(E) A (the paper's P Lambda Q), all trained; A, B Gaussian, E = 0.
    Loss: cross-entropy + orthogonality x mean over all A and B of ||A A^T - I||_F, ||B^T B - I||_F.
    A weight's score is its smoothed sensitivity |w dLoss/dw| times its smoothed uncertainty (eq. 8
    to 11), a triplet's is s(E_i) + mean_j s(B_ji) + mean_j s(A_ij) (eq. 7). After its local steps
    every client for itself keeps the b(t) best of the live triplets and sets the other E_i to zero
    (eq. 6, with a round as the pruning interval); b(t) is the cubic of appendix A, over rounds.
    Server: rows = sum_k p_k m_k rows_k: a triplet that a client did not send counts as zero there.
    What at least one client of the cohort sent is live next.
Up: the client's own b(t) triplets, d_in + 1 + d_out floats each, the head, and one mask bit per
    live triplet.
Down: live triplets (the union of the last uploads), the head, and the rank_mask, one bit per
    triplet.
Shapes: A (r, d_in), E (r,), B (d_out, r); row i = [A[i], E[i], B[:, i]].
Regrowth: a client trains the whole union, so a triplet that it pruned may come back to it while
    another client keeps it; what the whole cohort prunes is gone.
Deviation: the paper has no federation. Its scores run on through training; here they start anew in
    each round, as clients keep nothing between rounds, and so are drawn up in the last rounds too,
    where the paper keeps its choice. A triplet that is not sent counts as zero with A_i and B_i,
    where the paper zeroes E_i alone. The penalty is that of the authors' code and of PEFT, a mean
    of norms; eq. 4 has a sum of squared norms. b(t) is rounded, their code cuts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedara_core.adapters import AdapterConfig, LowRank, read_rows, write_rows
from fedara_core.errors import require_fractions, require_not_negative, require_positive
from fedara_core.factors import orthogonality_gaps, svd_rows
from fedara_core.importance import ImportanceMeter, scheduled_budget, top_k_masks
from fedara_core.method import (
    Batch,
    Client,
    Method,
    ServerState,
    bits_to_masks,
    join_values,
    live_values,
    make_upload,
    num_values,
    split_values,
    start_state,
)
from fedara_core.wire import Upload, message_bytes


@dataclass(frozen=True, kw_only=True)
class AdaLora(Method):
    """final_budget: share of the first triplets that is left (the paper starts with 1.5 times the
    last); warmup_fraction, final_fraction: shares of the rounds before and after the cubic (of the
    order of the paper's GLUE runs, which set them by data set); init_std: deviation of A and B (the
    authors' code); orthogonality: weight of the penalty (the paper: 0.1, 0.3 or 0.5).
    """

    needs_factors: ClassVar[bool] = True
    own_rows: ClassVar[bool] = True
    steady_rows: ClassVar[bool] = False

    final_budget: float = 2 / 3
    warmup_fraction: float = 0.1
    final_fraction: float = 0.5
    init_std: float = 0.02
    orthogonality: float = 0.1

    def __post_init__(self) -> None:
        require_fractions(self, "final_budget", "warmup_fraction", "final_fraction")
        require_positive(self, "init_std")
        require_not_negative(self, "orthogonality")

    def init(
        self, model: nn.Module, adapter: AdapterConfig, *, seed: int, num_rounds: int
    ) -> ServerState:
        rows = svd_rows(adapter, seed, self.init_std)
        return start_state(model, adapter, rows, seed=seed, num_rounds=num_rounds)

    def form(self, state: ServerState) -> LowRank:
        return LowRank(scale=state.adapter.scale, singular=True)

    def download(self, model: nn.Module, state: ServerState, client: Client | None) -> int:
        super().download(model, state, client)
        if client is not None:
            client.notes["importance"] = ImportanceMeter("smoothed")
        return message_bytes(num_values(state, self.form(state)), state.num_triplets)

    def local_step(self, client: Client, batch: Batch) -> None:
        client.backward(batch)
        if self.orthogonality:
            (self.orthogonality * mean_orthogonality(client.model)).backward()  # type: ignore[no-untyped-call]
        client.notes["importance"].observe(client.model)  # the paper's loss has the penalty in it
        client.step()

    def upload(self, client: Client, state: ServerState) -> Upload:
        scores = client.notes["importance"].scores(client.model)
        kept = top_k_masks(scores, scheduled_budget(state, self))
        write_rows(client.model, read_rows(client.model), kept, self.form(state))
        bits = torch.cat([torch.zeros(0, dtype=torch.bool), *kept.values()])  # (live triplets,)
        return make_upload(client, live_values(client.model, state), bits)

    def aggregate(self, state: ServerState, uploads: Sequence[Upload]) -> ServerState:
        after = super().aggregate(state, [self._padded(upload, state) for upload in uploads])
        sent = torch.stack([upload.bits for upload in uploads]).any(dim=0)  # (live triplets,)
        return replace(after, rank_masks=bits_to_masks(sent, state))

    def _padded(self, upload: Upload, state: ServerState) -> Upload:
        """The upload with zeros in place of the live triplets that it leaves out."""
        form, sent = self.form(state), bits_to_masks(upload.bits, state)
        rows, whole, _ = split_values(upload.values, state, form, rank_masks=sent)
        for name, mask in sent.items():
            rows[name][~mask] = 0
        return replace(upload, values=join_values(rows, whole, state, form))


def mean_orthogonality(model: nn.Module) -> Tensor:
    """Mean of ||A A^T - I||_F and ||B^T B - I||_F over the adapters that have live triplets."""
    norms = [gap.norm() for gap in orthogonality_gaps(model)]
    return torch.stack(norms).mean() if norms else torch.zeros((), requires_grad=True)
