"""Methods whose server adds the clients' products and redistributes the sum's SVD.

    Delta = sum over terms of scale B A = U S V^T;  B = U S / scale, A = V^T.
All of S is on one side (half of it, sqrt(S), on one side only is a published bug). Delta is never
formed.
Shapes: A (r, d_in), B (d_out, r); parts hold B transposed. Delta (d_out, d_in).
"""

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from fedara_core.adapters import AdaptedModel
from fedara_core.factors import put_product
from fedara_core.merge.received import Received, mean_of_whole
from fedara_core.method import Client, Method, Size, next_state
from fedara_core.state import ServerState
from fedara_core.values import Parts


class Redistributing(Method):
    """A client of capacity r_k gets and trains the first r_k triplets, Delta's best approximation
    of that rank. Delta is the clients' mean, sum_k p_k scale B_k A_k, if a method does not say
    otherwise."""

    combine: ClassVar = "gather"
    uses_client_lora_ranks: ClassVar[bool] = True

    def terms(self, state: ServerState, received: Received) -> Iterator[tuple[Parts, Tensor]]:
        """Rows of Delta's terms by part and adapter, and what each weighs: (rows,) float64."""
        for upload, share in zip(received.uploads, received.shares, strict=True):
            parts = self.own_state(state, upload.client_id).index.parts(upload.values)
            lora_rank = state.adapter.client_lora_ranks[upload.client_id]
            yield parts, torch.full((lora_rank,), share, dtype=torch.float64)

    def download(self, model: AdaptedModel, state: ServerState, client: Client | None) -> Size:
        own = state if client is None else self.own_state(state, client.client_id)
        return super().download(model, own, client)

    def aggregate(self, state: ServerState, received: Received) -> ServerState:
        left: dict[str, list[Tensor]] = {name: [] for name in state.adapter.shapes}
        right: dict[str, list[Tensor]] = {name: [] for name in state.adapter.shapes}
        for parts, weights in self.terms(state, received):
            for name in left:
                left[name].append(weights[:, None] * parts["B"][name].double())  # (r_k, d_out)
                right[name].append(parts["A"][name].double())  # (r_k, d_in)
        vector = state.vector.clone()
        new = state.index.parts(vector)
        for name in left:  # of Delta / scale: scale acts in the model
            put_product(
                new["A"][name], new["B"][name], torch.cat(left[name]), torch.cat(right[name])
            )
        vector[state.index.runs[""]] = mean_of_whole(received.uploads, state.index)
        return next_state(state, received, vector=vector)
