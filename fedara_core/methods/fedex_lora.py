"""FedEx-LoRA: "Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models",
arXiv 2410.09432.

A and B are averaged as in FedIT (arXiv 2305.05644); what that misses of the mean of the products
goes into the base weight, so that the server's model is exactly the mean of the clients':
    A <- mean(A), B <- mean(B);  W <- W + sum_k p_k scale B_k A_k - scale mean(B) mean(A).
Up: r (d_in + d_out) floats per adapter, and the head.
Down: r (d_in + d_out) floats per adapter, K r (d_in + d_out) of the last residual's factors for a
    cohort of K, and the head. A client that missed more rounds gets their residuals, too; where the
    dense change is less, it gets that, d_in d_out. In round 0 nothing.
Shapes: A (r, d_in), B (d_out, r), row i = [A[i], B[:, i]]; delta (d_out, d_in) is W - W0.
Deviation: means are weighted by num_examples (the authors' code takes plain ones). What a client
    has to catch up on, and the dense limit, are ours. The residual's factors are [B_k] and
    [p_k (A_k - mean(A))], K r rows; these sum to zero over k, so that (K - 1) r rows would do.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedara_core.merge.received import Received
from fedara_core.method import Method, Size, missed_values
from fedara_core.state import ServerState, Start, with_added_delta, with_zero_delta


@dataclass(frozen=True, kw_only=True)
class FedExLora(Method):
    """No hyperparameters of its own: lora_rank, lora_alpha and targets are shared settings."""

    combine: ClassVar = "gather"
    coded: ClassVar = ("down", "feedback")

    def init(self, start: Start) -> ServerState:
        return with_zero_delta(super().init(start))

    def downlink(self, state: ServerState, client_id: int) -> Size:
        num_exact = missed_values(state, client_id)
        return Size(num_values=state.index.num_sent, num_exact=num_exact)

    def aggregate(self, state: ServerState, received: Received) -> ServerState:
        after = super().aggregate(state, received)
        clients = [state.index.parts(upload.values) for upload in received.uploads]
        # The product of the means is taken from the state as stored: what clients will compute.
        terms = [*zip(clients, received.shares, strict=True), (after.parts, -1.0)]
        return with_added_delta(after, terms, len(clients) * state.adapter.lora_rank)
