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

from fedara_core.redistribute import Redistributing


@dataclass(frozen=True, kw_only=True)
class FlexLora(Redistributing):
    """No hyperparameters of its own; capacities are adapter.client_lora_ranks, a shared setting."""
