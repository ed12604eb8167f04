"""raFLoRA: "Preventing Rank Collapse in Federated Low-Rank Adaptation with Client Heterogeneity",
arXiv 2602.13486.

FlexLoRA (arXiv 2402.11505) weighs a client's whole product by n_k / sum n, so that a triplet that
few clients are able to train counts less in each round, and dies. Here each block of triplets is
averaged over those clients of the cohort that have it: h runs over the blocks between two
neighbouring capacities, N_h = sum of n_k over the clients with r_k above block h,
    Delta = sum_h sum_{k has h} n_k / N_h scale B_k[:, h] A_k[h, :] = U S V^T;
    B = U S / scale, A = V^T;  a client of capacity r_k gets and trains the first r_k triplets.
Up: r_k (d_in + d_out) floats per adapter, and the head.
Down: the same; in round 0 nothing, as the start is free.
Shapes: Delta (d_out, d_in), never formed; A (r, d_in), B (d_out, r); row i = [A[i], B[:, i]].
Start: LoRA's, A Kaiming-uniform and B = 0 (arXiv 2106.09685, section 4.1).
Deviation: built from the paper's rule; its code is not public. Blocks that no client of the cohort
    has stay in the sum as the server's own, at weight 1; what the paper does with them could not be
    checked. As in FlexLoRA here, the server keeps, and evaluates, lora_rank triplets of Delta, all
    of S is in B, triplets that Delta lacks keep their A with B = 0, and scale is
    lora_alpha / lora_rank at every client, whatever its r_k.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedara_core.merge.received import Received
from fedara_core.redistribute import Redistributing
from fedara_core.state import ServerState
from fedara_core.values import Parts


@dataclass(frozen=True, kw_only=True)
class RaFLora(Redistributing):
    """No hyperparameters of its own; capacities are adapter.client_lora_ranks, a shared setting."""

    def terms(self, state: ServerState, received: Received) -> Iterator[tuple[Parts, Tensor]]:
        ranks = [state.adapter.client_lora_ranks[client_id] for client_id in received.client_ids]
        totals = torch.zeros(state.adapter.lora_rank, dtype=torch.float64)  # N_h of each triplet
        for upload, lora_rank in zip(received.uploads, ranks, strict=True):
            totals[:lora_rank] += upload.num_examples
        for upload, lora_rank in zip(received.uploads, ranks, strict=True):
            own = self.own_state(state, upload.client_id)
            yield own.index.parts(upload.values), upload.num_examples / totals[:lora_rank]
        if not totals.all():
            yield state.parts, (totals == 0).double()
