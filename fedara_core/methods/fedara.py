"""FedARA: "Adaptive Rank Allocation for Federated Parameter-Efficient Fine-Tuning of Language
Models", arXiv 2501.14406 (IEEE Transactions on Computers, 10.1109/TC.2026.3655161).

1. Truncated SVD adaptation: W = W0 + scale B diag(E) A, all trained; A, B Gaussian, E = 0. It is
   SVD-shaped, not an SVD of W0. B, E and A are averaged separately over the common rank_mask.
2. Dynamic rank allocation: clients score their triplets over the round's own batches, vote for the
   top b(t) of the live ones; share[i] = sum_k p_k m_k[i]; a triplet with a share below
   vote_threshold is pruned for good, its row zeroed first, E included. b(t) is AdaLoRA's cubic.
3. Rank-based module pruning: an adapter without live triplets leaves the model and the traffic.
Up: d_in + 1 + d_out floats per live triplet, and the head; in rounds with a vote one bit per live
    triplet (arbitration "budget": also one float score each).
Down: live triplets, the head, and the rank_mask, one bit per triplet (a client may be new);
    in round 0 nothing.
Shapes: A (r, d_in), E (r,), B (d_out, r); row i = [A[i], E[i], B[:, i]].
Deviation (public text silent): init_std 0.1 (AdaLoRA's 0.02 stalls small encoders); no
    orthogonality penalty; no scores kept between rounds; the defaults below; arbitration "budget".
    importance_per_cost is ours and off by default; with it a run is not FedARA as published.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fedara_core.adapters import AdaptedModel, LowRank
from fedara_core.errors import InputError, require
from fedara_core.factors import orthogonality_penalty, svd_parts
from fedara_core.importance import (
    Importance,
    ImportanceMeter,
    relative_costs,
    scheduled_budget,
    top_k,
    top_shares,
)
from fedara_core.merge.received import Received
from fedara_core.method import Batch, Client, Method, Size
from fedara_core.state import ServerState, Start, relaid
from fedara_core.values import masks_of_bits
from fedara_core.wire import Upload


@dataclass(frozen=True, kw_only=True)
class FedAra(Method):
    """truncated_svd, rank_allocation, module_pruning: its parts, each with a switch (without the
    first ranks are allocated to LoRA pairs, without the third an emptied adapter stays in).
    init_std: deviation of A and B; e_lr_factor: factor on E's learning rate; orthogonality: weight
    of ||A A^T - I||^2 + ||B^T B - I||^2; final_budget: share of the first triplets that is left;
    warmup_fraction, final_fraction: shares of the rounds before and after the cubic.
    importance_per_cost (ours): a score is divided by `relative_costs` to this power, so that low
    layers, which keep the backward pass above them alive, lose their triplets first; 0: off, 1:
    importance for each multiplication.
    """

    coded: ClassVar = ("down", "feedback")
    younger: ClassVar = ("importance_per_cost",)

    truncated_svd: bool = True
    rank_allocation: bool = True
    module_pruning: bool = True
    importance: Importance = "sensitivity"
    importance_per_cost: float = 0.0
    arbitration: Literal["threshold", "budget"] = "threshold"
    vote_threshold: float = 0.5
    final_budget: float = 0.25
    warmup_fraction: float = 0.1
    final_fraction: float = 0.3
    init_std: float = 0.1
    e_lr_factor: float = 1.0
    orthogonality: float = 0.0

    def __post_init__(self) -> None:
        require(self, "in [0, 1]", "vote_threshold", "final_budget")
        require(self, "in [0, 1]", "warmup_fraction", "final_fraction")
        require(self, "above 0", "init_std", "e_lr_factor")
        require(self, "0 or above", "orthogonality", "importance_per_cost")
        if self.importance == "magnitude" and not self.truncated_svd:
            raise InputError("method.importance = 'magnitude' needs method.truncated_svd = true")

    def init(self, start: Start) -> ServerState:
        if self.truncated_svd:
            return start.state(self, svd_parts(start.adapter, start.seed, self.init_std))
        return super().init(start)

    def form(self, state: ServerState) -> LowRank:
        return LowRank(scale=state.adapter.scale, singular=self.truncated_svd)

    def lr_factor(self, part: str) -> float:
        return self.e_lr_factor if part == "E" else 1.0

    def budget(self, state: ServerState) -> int:
        """b(t): how many triplets the vote of this round may leave."""
        return scheduled_budget(state, self) if self.rank_allocation else state.num_triplets

    def votes(self, state: ServerState) -> bool:
        """Whether this round's clients vote: only where the budget is below what lives."""
        return self.budget(state) < state.num_live

    def download(self, model: AdaptedModel, state: ServerState, client: Client | None) -> Size:
        keep_dead = not self.module_pruning
        model.load(state.vector, state.index, self.form(state), keep_dead=keep_dead)
        if client is not None:
            client.notes["votes"] = self.votes(state)
            client.notes["importance"] = ImportanceMeter(self.importance)
        return self.message_size(state, client)

    def downlink(self, state: ServerState, client_id: int) -> Size:
        num_bits = state.num_triplets if self.rank_allocation else 0
        return Size(num_values=state.index.num_sent, num_bits=num_bits)

    def local_step(self, client: Client, batch: Batch) -> None:
        client.backward(batch)
        if client.notes["votes"]:
            client.notes["importance"].observe(client.model)
        if self.orthogonality:
            (self.orthogonality * orthogonality_penalty(client.model)).backward()  # type: ignore[no-untyped-call]
        client.step()

    def upload(self, client: Client, state: ServerState) -> Upload:
        if not client.notes["votes"]:
            return super().upload(client, state)
        scores = client.notes["importance"].scores(client.model)  # (live triplets,)
        if self.importance_per_cost:
            scores = scores / relative_costs(client.model) ** self.importance_per_cost
        values = client.sent_values
        if self.arbitration == "budget":
            values = torch.cat([values, scores])
        return client.make_upload(values, top_k(scores, self.budget(state)))

    def aggregate(self, state: ServerState, received: Received) -> ServerState:
        after = super().aggregate(state, received)
        if not self.votes(state):
            return after
        shares = received.share_of_bits()  # (live triplets,)
        kept = shares >= self.vote_threshold
        if self.arbitration == "budget":
            mean_scores = received.mean[state.index.num_sent :]
            kept = top_shares(shares, mean_scores, self.budget(state))
        return relaid(after, self.form(after), masks_of_bits(kept, state.rank_masks))
