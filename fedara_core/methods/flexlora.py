"""FlexLoRA: "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", arXiv 2402.11505.

The server forms the exact mean of the clients' changes and redistributes its SVD:
    Delta = sum_k p_k scale B_k A_k = U S V^T;  B = U S / scale, A = V^T;
a client of capacity r_k gets and trains the first r_k triplets, Delta's best approximation of that
rank. All of S is on one side (half of it, sqrt(S), on one side only is a published bug).
Up: r_k (d_in + d_out) floats per adapter, and the head.
Down: the same.
Shapes: Delta (d_out, d_in), never formed; A (r, d_in), B (d_out, r); row i = [A[i], B[:, i]].
Start: LoRA's, A Kaiming-uniform and B = 0 (arXiv 2106.09685, section 4.1).
Deviation: the server keeps, and evaluates, lora_rank triplets of Delta, not Delta itself. Where
    Delta has fewer, the others keep their A with B = 0, so that they can train. scale is
    lora_alpha / lora_rank at every client, whatever its r_k.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedara_core.factors import join_pair, split_pair, truncated_product
from fedara_core.method import (
    Client,
    Method,
    ServerState,
    client_shares,
    first_rows,
    mean_whole,
    next_state,
    split_values,
)
from fedara_core.wire import Upload


@dataclass(frozen=True, kw_only=True)
class FlexLora(Method):
    """No hyperparameters of its own; capacities are adapter.client_lora_ranks, a shared setting."""

    uses_client_lora_ranks: ClassVar[bool] = True
    needs_factors: ClassVar[bool] = True
    own_rows: ClassVar[bool] = True
    steady_rows: ClassVar[bool] = False

    def download(self, model: nn.Module, state: ServerState, client: Client | None) -> int:
        if client is not None:
            client_lora_rank = state.adapter.client_lora_ranks[client.client_id]
            state = replace(state, rank_masks=first_rows(state.rank_masks, client_lora_rank))
        return super().download(model, state, client)

    def aggregate(self, state: ServerState, uploads: Sequence[Upload]) -> ServerState:
        form, adapter = self.form(state), state.adapter
        stacked: dict[str, list[Tensor]] = {name: [] for name in state.rows}
        for upload, share in zip(uploads, client_shares(uploads), strict=True):
            rank_masks = first_rows(state.rank_masks, adapter.client_lora_ranks[upload.client_id])
            trained, _, _ = split_values(upload.values, state, form, rank_masks=rank_masks)
            for name, (_, d_in) in adapter.shapes.items():
                pairs = trained[name][rank_masks[name]].double()  # (r_k, d_in + d_out)
                pairs[:, d_in:] *= share
                stacked[name].append(pairs)
        rows = {name: self._truncate(name, stacked[name], state) for name in state.rows}
        return next_state(state, uploads, rows=rows, whole=mean_whole(uploads, state))

    def _truncate(self, name: str, stacked: Sequence[Tensor], state: ServerState) -> Tensor:
        """LoRA rows (r, d_in + d_out) of the best approximation of the stacked pairs' product."""
        shape, rows = state.adapter.shapes[name], state.rows[name].clone()
        a, b = split_pair(torch.cat(list(stacked)), shape)  # (sum r_k, d_in), (d_out, sum r_k)
        u, s, vt = truncated_product(b, a, len(rows))  # of Delta / scale: scale acts in the model
        rows[:, shape[1] :] = 0
        rows[: len(s)] = join_pair(vt, u * s).float()
        return rows
