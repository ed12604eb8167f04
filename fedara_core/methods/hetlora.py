"""HetLoRA: "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
arXiv 2401.06432.

1. Truncation: client k trains the first r_k triplets of the server's.
2. Rank self-pruning: the local loss is F_k + lambda ||B_tail|| ||A_tail||, the tail being the rows
   from floor(gamma r_k) on; where the tail's norm shrank against the downloaded one, the client
   drops the tail, and r_k is floor(gamma r_k) from then on.
3. Sparsity-weighted aggregation: uploads are padded with zero rows; A and B are averaged with
   weights S_k / sum S, S_k = ||B_k A_k||_F. (Equal S_k make it FedAvg of LoRA with equal weights.)
Up: r_k (d_in + d_out) floats per adapter (floor(gamma r_k) for r_k in a round of pruning), and the
    head.
Down: r_k (d_in + d_out) floats per adapter, and the head; in round 0 nothing.
Shapes: A (r, d_in), B (d_out, r); row i = [A[i], B[:, i]].
Deviation: the head is averaged by num_examples, as in all methods here. The paper writes one layer;
    over all adapters S_k is the norm of all B_k A_k together and the tail's norm a sum, so that a
    client has one weight and one r_k. r_k stays at 1 or above. Rows that no client of the cohort
    holds keep their values, since a row of zeros could never train again, and are pruned once they
    are beyond every client's r_k. How gamma r_k becomes a whole number could not be checked in the
    paper: floor drops a triplet at every pruning, "nearest" none below r_k = 51 at gamma = 0.99.
    scale is lora_alpha / lora_rank at every client, whatever its r_k. The default of `penalty` is
    ours.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedara_core.adapters import AdaptedModel
from fedara_core.errors import require
from fedara_core.merge.received import Received
from fedara_core.method import Batch, Client, Method, Size, next_state, with_mean
from fedara_core.state import ServerState, Start, relaid, truncated
from fedara_core.values import Index, bits_of_masks, first_rows
from fedara_core.wire import Header, Upload

_TINY = 1e-30  # weighs nothing beside any other norm


@dataclass(frozen=True, kw_only=True)
class HetLora(Method):
    """penalty: lambda, the weight of the tail's norm; 0 leaves all of rank self-pruning out.

    gamma: share of its triplets that a client keeps when it prunes (paper: 0.99); 1 leaves no tail.
    rounding: how gamma r_k becomes a whole number; halves go up.
    """

    combine: ClassVar = "masked"
    uses_client_lora_ranks: ClassVar[bool] = True
    coded: ClassVar = ("feedback",)

    penalty: float = 1e-3
    gamma: float = 0.99
    rounding: Literal["floor", "nearest"] = "floor"

    def __post_init__(self) -> None:
        require(self, "0 or above", "penalty")
        require(self, "above 0 and at most 1", "gamma")

    def init(self, start: Start) -> ServerState:
        ranks = torch.tensor(start.adapter.client_lora_ranks)  # int64
        return replace(super().init(start), extra={"client_lora_ranks": ranks})

    def download(self, model: AdaptedModel, state: ServerState, client: Client | None) -> Size:
        if client is None:
            return super().download(model, state, client)
        client_lora_rank = int(state.extra["client_lora_ranks"][client.client_id])
        size = super().download(model, truncated(state, self.form(state), client_lora_rank), client)
        client.notes["tail_norm"] = self._tail_norm(model).item()
        return size

    def local_step(self, client: Client, batch: Batch) -> None:
        client.backward(batch)
        if self.penalty:
            (self.penalty * self._tail_norm(client.model)).backward()  # type: ignore[no-untyped-call]
        client.step()

    def upload(self, client: Client, state: ServerState) -> Upload:
        model = client.model
        if not self.penalty or self._tail_norm(model).item() >= client.notes["tail_norm"]:
            return super().upload(client, state)
        num_live = [adapter.num_live for adapter in model.adapters.values()]
        kept = torch.cat([torch.arange(n) < self._kept(n) for n in num_live])
        return client.make_upload(model.index.take(client.sent_values, kept))

    def row_weight(self, state: ServerState, upload: Upload) -> float:
        sent = truncated(state, self.form(state), rows_sent(upload.header, state))
        return product_norm(upload.values, sent.index)

    def sent_bits(self, state: ServerState, header: Header) -> Tensor:
        sent = first_rows(state.rank_masks, rows_sent(header, state))
        return bits_of_masks(sent, state.rank_masks)

    def aggregate(self, state: ServerState, received: Received) -> ServerState:
        sent = {header.client_id: rows_sent(header, state) for header in received.headers}
        client_lora_ranks = state.extra["client_lora_ranks"].clone()
        client_lora_ranks[list(sent)] = torch.tensor(list(sent.values()))
        held = first_rows(state.rank_masks, max(sent.values()))
        unheld = state.index.per_value(~bits_of_masks(held, state.rank_masks), whole=False)
        mean = torch.where(unheld, state.sent, received.mean)
        after = next_state(
            state,
            received,
            vector=with_mean(state, mean),
            extra={"client_lora_ranks": client_lora_ranks},
        )
        rank_masks = first_rows(state.rank_masks, int(client_lora_ranks.max()))
        return relaid(after, self.form(after), rank_masks)

    def _kept(self, client_lora_rank: int) -> int:
        """Triplets that pruning leaves, and where the tail begins: gamma r_k, rounded."""
        half = 0.5 if self.rounding == "nearest" else 0.0
        return max(1, int(self.gamma * client_lora_rank + half))

    def _tail_norm(self, model: AdaptedModel) -> Tensor:
        """Sum over adapters of ||B_tail|| ||A_tail||; 0 where there is no tail."""
        norms = []
        for adapter in model.adapters.values():
            start = self._kept(adapter.num_live)
            norms.append(adapter.parts["A"][start:].norm() * adapter.parts["B"][start:].norm())
        return torch.stack(norms).sum()


def rows_sent(header: Header, state: ServerState) -> int:
    """Rows of each adapter in an upload: its length says it."""
    num_whole = state.index.num_sent - state.index.num_row_values
    row_width = sum(d_in + d_out for d_out, d_in in state.adapter.shapes.values())
    return (header.num_values - num_whole) // row_width


def product_norm(values: Tensor, index: Index) -> float:
    """S_k = sqrt(sum over adapters of ||B A||_F^2), from the Gram matrices of A and B.

    A float32, so that its products are exact (merge/sums.py). Where all clients' are zero, nobody
    has learned anything: then they count alike.
    """
    parts = index.parts(values.double())
    squares = [
        ((a @ a.T) * (b @ b.T)).sum()  # tr(A^T B^T B A)
        for a, b in zip(parts["A"].values(), parts["B"].values(), strict=True)
    ]
    return float(np.float32(torch.stack(squares).sum().sqrt())) or _TINY
