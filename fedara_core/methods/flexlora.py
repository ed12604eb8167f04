"""FlexLoRA: "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", arXiv 2402.11505.

The server forms the exact mean of the clients' changes and redistributes its SVD:
    Delta = sum_k p_k scale B_k A_k = U S V^T;  B = U S / scale, A = V^T;
a client of capacity r_k gets and trains the first r_k triplets, Delta's best approximation of that
rank. All of S is on one side (half of it, sqrt(S), on one side only is a published bug).
Up: r_k (d_in + d_out) floats per adapter, and the head.
Down: the same; in round 0 nothing, as the start is free.
Shapes: Delta (d_out, d_in), never formed; A (r, d_in), B (d_out, r); row i = [A[i], B[:, i]].
Start: LoRA's, A Kaiming-uniform and B = 0 (arXiv 2106.09685, section 4.1).
Deviation: the server keeps, and evaluates, lora_rank triplets of Delta, not Delta itself. Where
    Delta has fewer, the others keep their A with B = 0, so that they can train. scale is
    lora_alpha / lora_rank at every client, whatever its r_k.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedara_core.adapters import AdaptedModel
from fedara_core.factors import truncated_product
from fedara_core.merge.received import Received, mean_of_whole
from fedara_core.method import Client, Method, Size, next_state
from fedara_core.state import ServerState


@dataclass(frozen=True, kw_only=True)
class FlexLora(Method):
    """No hyperparameters of its own; capacities are adapter.client_lora_ranks, a shared setting."""

    combine: ClassVar = "gather"
    uses_client_lora_ranks: ClassVar[bool] = True

    def download(self, model: AdaptedModel, state: ServerState, client: Client | None) -> Size:
        own = state if client is None else self.own_state(state, client.client_id)
        return super().download(model, own, client)

    def aggregate(self, state: ServerState, received: Received) -> ServerState:
        left: dict[str, list[Tensor]] = {name: [] for name in state.adapter.shapes}
        right: dict[str, list[Tensor]] = {name: [] for name in state.adapter.shapes}
        for upload, share in zip(received.uploads, received.shares, strict=True):
            parts = self.own_state(state, upload.client_id).index.parts(upload.values)
            for name in left:
                left[name].append(share * parts["B"][name].double())  # (r_k, d_out)
                right[name].append(parts["A"][name].double())  # (r_k, d_in)
        vector = state.vector.clone()
        new = state.index.parts(vector)
        for name in left:
            a, b = new["A"][name], new["B"][name]  # (r, d_in), B^T (r, d_out)
            # Of Delta / scale: scale acts in the model.
            u, s, vt = truncated_product(torch.cat(left[name]).T, torch.cat(right[name]), len(a))
            a[: len(s)] = vt.float()
            b.zero_()
            b[: len(s)] = (u * s).T.float()
        vector[state.index.runs[""]] = mean_of_whole(received.uploads, state.index)
        return next_state(state, received, vector=vector)
