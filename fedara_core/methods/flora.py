"""FLoRA: "Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
arXiv 2409.05976.

Clients' pairs are stacked instead of averaged, which is exact, and merged into the base weight:
    W <- W + scale [p_1 B_1 ... p_K B_K] [A_1; ...; A_K] = W + sum_k p_k scale B_k A_k.
Every round starts again from a fresh A and B = 0; a client of capacity r_k trains r_k triplets.
Up: r_k (d_in + d_out) floats per adapter, and the head.
Down: sum_k r_k (d_in + d_out) floats per adapter, the last round's stack, and the head. A client
    that missed more rounds gets their stacks, too; where the dense change is less, it gets that,
    d_in d_out. In round 0, and for the fresh A (drawn from the seed and the round), nothing.
Shapes: A (r, d_in), B (d_out, r), row i = [A[i], B[:, i]]; delta (d_out, d_in) is W - W0.
Deviation: what a client has to catch up on, and the dense limit, are ours. The fresh A is one draw
    for all clients. scale is lora_alpha / lora_rank at every client, whatever its r_k.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from fedara_core.adapters import AdapterConfig
from fedara_core.factors import lora_rows, split_pair
from fedara_core.method import (
    Client,
    Method,
    ServerState,
    client_shares,
    first_rows,
    mean_whole,
    missed_values,
    next_state,
    num_values,
    split_values,
    start_with_delta,
)
from fedara_core.seeds import derive
from fedara_core.wire import Upload, message_bytes


@dataclass(frozen=True, kw_only=True)
class FLora(Method):
    """No hyperparameters of its own; capacities are adapter.client_lora_ranks, a shared setting."""

    uses_client_lora_ranks: ClassVar[bool] = True
    needs_factors: ClassVar[bool] = True
    own_rows: ClassVar[bool] = True
    steady_rows: ClassVar[bool] = False

    def init(
        self, model: nn.Module, adapter: AdapterConfig, *, seed: int, num_rounds: int
    ) -> ServerState:
        return start_with_delta(model, adapter, seed=seed, num_rounds=num_rounds)

    def download(self, model: nn.Module, state: ServerState, client: Client | None) -> int:
        if client is None:
            return super().download(model, state, client)
        client_lora_rank = state.adapter.client_lora_ranks[client.client_id]
        own = replace(state, rank_masks=first_rows(state.rank_masks, client_lora_rank))
        super().download(model, own, client)
        num_whole = num_values(state, self.form(state), rank_masks={})
        return message_bytes(
            num_whole + missed_values(state, client.client_id, state.extra["stacked_rows"])
        )

    def aggregate(self, state: ServerState, uploads: Sequence[Upload]) -> ServerState:
        form, adapter = self.form(state), state.adapter
        delta = {name: change.double() for name, change in state.fixed["delta"].items()}
        stacked_rows = state.extra["stacked_rows"].clone()
        for upload, share in zip(uploads, client_shares(uploads), strict=True):
            client_lora_rank = adapter.client_lora_ranks[upload.client_id]
            stacked_rows[state.round_index] += client_lora_rank
            rank_masks = first_rows(state.rank_masks, client_lora_rank)
            # Rows that the client does not have are those of the round's start, with B = 0.
            trained, _, _ = split_values(upload.values, state, form, rank_masks=rank_masks)
            for name, shape in adapter.shapes.items():
                a, b = split_pair(trained[name].double(), shape)
                delta[name] += share * adapter.scale * (b @ a)
        return next_state(
            state,
            uploads,
            rows=lora_rows(adapter, derive(state.seed, "restart", state.round_index + 1)),
            whole=mean_whole(uploads, state),
            fixed={"delta": {name: change.float() for name, change in delta.items()}},
            extra={"stacked_rows": stacked_rows},
        )
