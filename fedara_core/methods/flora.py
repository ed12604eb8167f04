"""FLoRA: "Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
arXiv 2409.05976.

Clients' pairs are stacked instead of averaged, which is exact, and merged into the base weight:
    W <- W + scale [p_1 B_1 ... p_K B_K] [A_1; ...; A_K] = W + sum_k p_k scale B_k A_k.
In every round every client starts again from B = 0 and an A of its own, drawn from (seed, round,
client_id), so that the stack spans sum_k r_k directions; one of capacity r_k trains r_k triplets.
Up: r_k (d_in + d_out) floats per adapter, and the head.
Down: sum_k r_k (d_in + d_out) floats per adapter, the last round's stack, and the head. A client
    that missed more rounds gets their stacks, too; where the dense change is less, it gets that,
    d_in d_out. Nothing for the fresh A, nor in round 0.
Shapes: A (r, d_in), B (d_out, r), row i = [A[i], B[:, i]]; delta (d_out, d_in) is W - W0.
Deviation: what a client has to catch up on, and the dense limit, are ours. scale is lora_alpha /
    lora_rank at every client, whatever its r_k (in the authors' code it is 2 at every client).
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from fedara_core.adapters import AdaptedModel
from fedara_core.factors import lora_parts
from fedara_core.merge.received import Received, mean_of_whole
from fedara_core.method import Client, Method, Size, missed_values, next_state
from fedara_core.seeds import derive
from fedara_core.state import ServerState, Start, with_added_delta, with_zero_delta
from fedara_core.values import Tensors


@dataclass(frozen=True, kw_only=True)
class FLora(Method):
    """No hyperparameters of its own; capacities are adapter.client_lora_ranks, a shared setting.
    The server's own rows start afresh, too, B = 0: what was learnt is in the delta."""

    combine: ClassVar = "gather"
    version: ClassVar[int] = 2
    uses_client_lora_ranks: ClassVar[bool] = True

    def init(self, start: Start) -> ServerState:
        return with_zero_delta(super().init(start))

    def download(self, model: AdaptedModel, state: ServerState, client: Client | None) -> Size:
        if client is None:
            return super().download(model, state, client)
        own = self.own_state(state, client.client_id)
        vector = own.vector.clone()
        drawn = fresh(state, state.round_index, client.client_id)["A"]
        for name, a in own.index.parts(vector)["A"].items():  # (r_k, d_in)
            a.copy_(drawn[name][: len(a)])
        return super().download(model, replace(own, vector=vector), client)

    def downlink(self, state: ServerState, client_id: int) -> Size:
        num_whole_values = state.index.num_sent - state.index.num_row_values
        return Size(num_values=num_whole_values, num_exact=missed_values(state, client_id))

    def aggregate(self, state: ServerState, received: Received) -> ServerState:
        clients = [
            self.own_state(state, upload.client_id).index.parts(upload.values)
            for upload in received.uploads
        ]
        vector = state.index.pack(fresh(state, state.round_index + 1), state.whole)
        vector[state.index.runs[""]] = mean_of_whole(received.uploads, state.index)
        after = next_state(state, received, vector=vector)
        num_rows = sum(state.adapter.client_lora_ranks[k] for k in received.client_ids)
        return with_added_delta(after, zip(clients, received.shares, strict=True), num_rows)


def fresh(state: ServerState, *numbers: int) -> dict[str, Tensors]:
    """LoRA's start, drawn from the seed and from the round and, for a client's, the client_id."""
    return lora_parts(state.adapter, derive(state.seed, "restart", *numbers))
