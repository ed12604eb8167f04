"""FSLoRA: "Federated Sketching LoRA: A Flexible Framework for Heterogeneous Collaborative
Fine-Tuning of LLMs", arXiv 2501.19389.

Equations: a client of capacity r_k draws a sketch S_k in every round, r_k of the r diagonal entries
    at random, each r / r_k, the others 0, so that E[S_k] = I. It trains the triplets of its sketch,
    W_k = W0 + scale B S_k A, and the others, without gradients, stay as they are.
    Server: row_i <- row_i + sum_k p_k m_ki (row_ki - row_i), m_ki whether i is in S_k: a triplet
    that a client does not have counts as unchanged. Its own model is W0 + scale B A.
Up: r_k (d_in + d_out) floats per adapter, and the head. Server and client both draw the sketch from
    the seed, so it does not travel.
Down: the same; in round 0 nothing, as the start is free.
Shapes: A (r, d_in), B (d_out, r), S_k (r, r); row i = [A[i], B[:, i]].
Deviation: built from the paper, as the authors' code compares layers' names with "lora_A" and
    "lora_B" alone, which never holds, so that nothing is sketched. Weights are num_examples
    (theirs are equal). Their server moves by a step of AdamW along the mean change, here by the
    change itself, as in the paper's equation. Each adapter has a draw of its own (their code draws
    for A and B apart). The head trains whole at every client.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fedara_core.adapters import AdaptedModel
from fedara_core.merge.received import Received
from fedara_core.method import Client, Method, Size, with_unsent
from fedara_core.seeds import generator
from fedara_core.state import ServerState, relaid
from fedara_core.values import bits_of_masks
from fedara_core.wire import Header


@dataclass(frozen=True, kw_only=True)
class FsLora(Method):
    """No hyperparameters of its own; r_k is adapter.client_lora_ranks, a shared setting."""

    combine: ClassVar = "masked"
    uses_client_lora_ranks: ClassVar[bool] = True

    def own_state(self, state: ServerState, client_id: int) -> ServerState:
        """The rows of the client's sketch, under a scale that is r / r_k times as large."""
        ratio = state.adapter.lora_rank / state.adapter.client_lora_ranks[client_id]
        adapter = replace(state.adapter, lora_alpha=ratio * state.adapter.lora_alpha)
        own = replace(state, adapter=adapter)
        return relaid(own, self.form(own), sketch(state, client_id))

    def download(self, model: AdaptedModel, state: ServerState, client: Client | None) -> Size:
        own = state if client is None else self.own_state(state, client.client_id)
        return super().download(model, own, client)

    def sent_bits(self, state: ServerState, header: Header) -> Tensor:
        return bits_of_masks(sketch(state, header.client_id), state.rank_masks)

    def aggregate(self, state: ServerState, received: Received) -> ServerState:
        share = received.share_of_bits(partial(self.sent_bits, state))
        return super().aggregate(state, with_unsent(state, received, share))


def sketch(state: ServerState, client_id: int) -> dict[str, Tensor]:
    """Which triplets the client has in the state's round: (r,) bool by adapter, r_k of them."""
    num_kept = state.adapter.client_lora_ranks[client_id]
    draw = generator(state.seed, "sketch", state.round_index, client_id)
    masks = {}
    for name, mask in state.rank_masks.items():
        masks[name] = torch.zeros_like(mask)
        masks[name][torch.randperm(len(mask), generator=draw)[:num_kept]] = True
    return masks
