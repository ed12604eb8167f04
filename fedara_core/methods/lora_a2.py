"""LoRA-A2: "Towards Robust and Efficient Federated Low-Rank Adaptation with Heterogeneous
Clients" (Alternating freeze and Adaptive rank selection), arXiv 2410.22815.

Equations: W = W0 + scale B A. Even rounds (from 0) train B with A fixed, odd rounds A with B fixed.
    A client first probes: it trains the half of all triplets, then scores each by what it adds to
    the change of W (eq. 4), ||dB_i A_i||_F = ||dB_i|| ||A_i|| or ||B_i|| ||dA_i||, and chooses the
    top r_k N over the whole model (N adapters, lora_rank the server's rank). The others go back to
    where they were and stay there for the rest of the round (eq. 6).
    Server: row_i <- row_i + sum_k p_k m_ki (row_ki - row_i), m_ki whether client k chose i: a
    triplet that is not sent counts as unchanged. As one half is common to all, this is exact.
Up: the trained half of the chosen triplets, r_k d_out floats per adapter on average in even rounds
    and r_k d_in in odd ones, the head, and one mask bit per triplet.
Down: the half that the last round trained, r d_in floats per adapter in even rounds and r d_out in
    odd ones, and the head; r (d_in + d_out) to a client that was not in the last round's cohort,
    and in round 0.
Shapes: A (r, d_in), B (d_out, r); row i = [A[i], B[:, i]].
Deviation: the paper probes for one epoch and then, by its Algorithm 2, trains 5 from the start;
    here the probe is the first local steps of the round, so that all methods train equally long,
    and the chosen triplets keep its progress. The others are put back after each step: Adam's
    momentum and weight decay would move them even without gradients. The head trains and is
    averaged, so that heads are alike in all methods; the paper freezes it (freeze_head = true).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from fedara_core.adapters import AdapterConfig, LowRank, named_adapters, read_rows, write_rows
from fedara_core.errors import InputError, require_positive
from fedara_core.importance import top_k_masks
from fedara_core.method import (
    Batch,
    Client,
    Method,
    ServerState,
    alternating_bytes,
    bits_to_masks,
    freeze_head,
    join_values,
    live_values,
    make_upload,
    split_values,
)
from fedara_core.wire import Upload


@dataclass(frozen=True, kw_only=True)
class LoraA2(Method):
    """budget: r_k as a share of the client's capacity in adapter.client_lora_ranks (the paper: 1,
    2, 4 or 8 of 16); probe_steps: local steps before the choice (the paper: an epoch; 2, as after
    one step Adam's changes are all of a size); b_lr_factor: factor on B's learning rate (the paper:
    5); freeze_head: leave the head at its start, unsent (the paper: true).
    """

    uses_client_lora_ranks: ClassVar[bool] = True
    needs_factors: ClassVar[bool] = True
    own_rows: ClassVar[bool] = True
    steady_rows: ClassVar[bool] = False

    budget: float = 0.5
    probe_steps: int = 2
    b_lr_factor: float = 5.0
    freeze_head: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            raise InputError(f"method.budget = {self.budget} must be in (0, 1]")
        require_positive(self, "probe_steps", "b_lr_factor")

    def init(
        self, model: nn.Module, adapter: AdapterConfig, *, seed: int, num_rounds: int
    ) -> ServerState:
        if self.freeze_head:
            freeze_head(model)
        return super().init(model, adapter, seed=seed, num_rounds=num_rounds)

    def form(self, state: ServerState) -> LowRank:
        resting = "B" if state.round_index % 2 else "A"
        return LowRank(scale=state.adapter.scale, frozen=(resting,))

    def lr_factor(self, part: str) -> float:
        return self.b_lr_factor if part == "B" else 1.0

    def num_chosen(self, adapter: AdapterConfig, client_id: int) -> int:
        """r_k N: how many triplets the client trains and sends."""
        lora_rank = self.budget * adapter.client_lora_ranks[client_id]
        return max(1, round(lora_rank * len(adapter.shapes)))

    def download(self, model: nn.Module, state: ServerState, client: Client | None) -> int:
        num_bytes = super().download(model, state, client)
        if client is None:
            return num_bytes
        halves = {  # what trains in this round: (r, d_out) or (r, d_in) by adapter
            name: next(part for part in adapter.parts.values() if part.requires_grad)
            for name, adapter in named_adapters(model)
        }
        client.notes["halves"] = halves
        client.notes["start"] = {name: half.detach().clone() for name, half in halves.items()}
        client.notes["chosen"] = state.rank_masks
        client.notes["num_chosen"] = self.num_chosen(state.adapter, client.client_id)
        return alternating_bytes(state, self.form(state), client)

    def local_step(self, client: Client, batch: Batch) -> None:
        client.backward(batch)
        for name, half in client.notes["halves"].items():
            half.grad[~client.notes["chosen"][name]] = 0  # before the gradients are clipped
        client.step()
        if len(client.losses) == self.probe_steps:
            choose(client)
        with torch.no_grad():
            for name, half in client.notes["halves"].items():
                left_out = ~client.notes["chosen"][name]
                half[left_out] = client.notes["start"][name][left_out]

    def upload(self, client: Client, state: ServerState) -> Upload:
        if len(client.losses) < self.probe_steps:  # a round as short as this is all probe
            choose(client)
        chosen = client.notes["chosen"]
        write_rows(client.model, read_rows(client.model), chosen, self.form(state))
        bits = torch.cat([chosen[name] for name in sorted(chosen)])
        return make_upload(client, live_values(client.model, state), bits)

    def aggregate(self, state: ServerState, uploads: Sequence[Upload]) -> ServerState:
        return super().aggregate(state, [self._filled(upload, state) for upload in uploads])

    def _filled(self, upload: Upload, state: ServerState) -> Upload:
        """The upload with the state's values in place of the triplets that it leaves out."""
        form, sent = self.form(state), bits_to_masks(upload.bits, state)
        rows, whole, _ = split_values(upload.values, state, form, rank_masks=sent)
        return replace(upload, values=join_values(rows, whole, state, form))


def choose(client: Client) -> None:
    """Note the triplets with the largest ||dB_i|| ||A_i|| (or ||B_i|| ||dA_i||) over the model."""
    scores = {}
    for name, adapter in named_adapters(client.model):
        start = client.notes["start"][name]
        changes = [part - start if part.requires_grad else part for part in adapter.parts.values()]
        a, b = (change.detach().norm(dim=1) for change in changes)  # (r,) each
        scores[name] = (a * b).cpu()
    client.notes["chosen"] = top_k_masks(scores, client.notes["num_chosen"])
