"""LoRA-A2: "Towards Robust and Efficient Federated Low-Rank Adaptation with Heterogeneous
Clients" (Alternating freeze and Adaptive rank selection), arXiv 2410.22815.

Equations: W = W0 + scale B A. Even rounds (from 0) train B with A fixed, odd rounds A with B fixed.
    A client first probes: it trains the half of all triplets, then scores each by what it would add
    to the change of W (eq. 4), ||dB_i A_i||_F = ||dB_i|| ||A_i|| or ||B_i|| ||dA_i||, with dB_i and
    dA_i the sums of the probe's gradients, and chooses the top r_k N over the whole model (N
    adapters, lora_rank the server's rank). The others go back to where they were and stay there for
    the rest of the round (eq. 6).
    Server: row_i <- row_i + sum_k p_k m_ki (row_ki - row_i), m_ki whether client k chose i: a
    triplet that is not sent counts as unchanged. As one half is common to all, this is exact.
Up: the trained half of the chosen triplets, r_k d_out floats per adapter on average in even rounds
    and r_k d_in in odd ones, the head, and one mask bit per triplet.
Down: the half that the last round trained, r d_in floats per adapter in even rounds and r d_out in
    odd ones, and the head; from round 2 on r (d_in + d_out) to a client that was not in the last
    round's cohort. In round 0 nothing.
Shapes: A (r, d_in), B (d_out, r); row i = [A[i], B[:, i]].
Deviation: the paper probes for one epoch and then, by its Algorithm 2, trains 5 from the start;
    here the probe is the first local steps of the round, so that all methods train equally long,
    and the chosen triplets keep its progress. The paper's dB_i is what the epoch changed: after few
    steps of Adam every change is about as large as the learning rate, and all clients would choose
    by ||A_i||; a sum of gradients is the change that SGD would make. Other than Adam's it tells
    layers of large gradients from those of small ones, which may stay unchosen for good. The other
    triplets are put back after each step: Adam's momentum and weight decay would move them even
    without gradients. The head trains and is averaged, so that heads are alike in all methods; the
    paper freezes it (freeze_head = true).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedara_core.adapters import AdaptedModel, AdapterSpec
from fedara_core.errors import require
from fedara_core.importance import top_k
from fedara_core.merge.received import Received
from fedara_core.method import Alternating, Batch, Client, Size, with_unsent
from fedara_core.state import ServerState, Start
from fedara_core.wire import Upload


@dataclass(frozen=True, kw_only=True)
class LoraA2(Alternating):
    """budget: r_k as a share of the client's capacity in adapter.client_lora_ranks (the paper: 1,
    2, 4 or 8 of 16); probe_steps: local steps before the choice (the paper: an epoch); b_lr_factor:
    factor on B's learning rate (the paper: 5); freeze_head: leave the head at its start, unsent
    (the paper: true).
    """

    combine: ClassVar = "masked"
    uses_client_lora_ranks: ClassVar[bool] = True
    version: ClassVar[int] = 2

    budget: float = 0.5
    probe_steps: int = 2
    b_lr_factor: float = 5.0
    freeze_head: bool = False

    def __post_init__(self) -> None:
        require(self, "in (0, 1]", "budget")
        require(self, "above 0", "probe_steps", "b_lr_factor")

    def init(self, start: Start) -> ServerState:
        if self.freeze_head:
            start.model.freeze_head()
        return super().init(start)

    def lr_factor(self, part: str) -> float:
        return self.b_lr_factor if part == "B" else 1.0

    def num_chosen(self, adapter: AdapterSpec, client_id: int) -> int:
        """r_k N: how many triplets the client trains and sends."""
        lora_rank = self.budget * adapter.client_lora_ranks[client_id]
        return max(1, round(lora_rank * len(adapter.shapes)))

    def download(self, model: AdaptedModel, state: ServerState, client: Client | None) -> Size:
        size = super().download(model, state, client)
        if client is not None:
            client.notes["start"] = client.vector.clone()
            client.notes["gradients"] = torch.zeros_like(client.gradient)
            note_chosen(client, torch.ones(state.num_live, dtype=torch.bool))
            client.notes["num_chosen"] = self.num_chosen(state.adapter, client.client_id)
        return size

    def local_step(self, client: Client, batch: Batch) -> None:
        client.backward(batch)
        if len(client.losses) <= self.probe_steps:
            client.notes["gradients"] += client.gradient
        client.gradient[client.notes["left_out"]] = 0  # before it is clipped
        client.step()
        if len(client.losses) == self.probe_steps:
            choose(client)
        left_out = client.notes["left_out"]
        client.vector[left_out] = client.notes["start"][left_out]

    def upload(self, client: Client, state: ServerState) -> Upload:
        if len(client.losses) < self.probe_steps:  # a round as short as this is all probe
            choose(client)
        chosen = client.notes["chosen"]
        return client.make_upload(state.index.take(client.sent_values, chosen), chosen)

    def aggregate(self, state: ServerState, received: Received) -> ServerState:
        return super().aggregate(state, with_unsent(state, received, received.share_of_bits()))


def note_chosen(client: Client, chosen: Tensor) -> None:
    """Note the chosen triplets (live triplets,) bool, and which values (num_trained,) are not."""
    left_out = ~client.model.index.per_value(chosen, whole=True)
    client.notes["chosen"], client.notes["left_out"] = chosen, left_out.to(client.vector.device)


def choose(client: Client) -> None:
    """Note the triplets with the largest scores over the model."""
    note_chosen(client, top_k(scores(client), client.notes["num_chosen"]))


def scores(client: Client) -> Tensor:
    """||dB_i|| ||A_i||, or ||B_i|| ||dA_i||, of each triplet (live triplets,), on the CPU."""
    model, index = client.model, client.model.index
    resting = model.vector[index.num_trained :]
    halves = index.parts(torch.cat([client.notes["gradients"], resting]))
    norms = [torch.cat([rows.norm(dim=1) for rows in half.values()]) for half in halves.values()]
    return torch.stack(norms).prod(dim=0).cpu()
