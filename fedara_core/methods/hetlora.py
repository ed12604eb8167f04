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
Down: r_k (d_in + d_out) floats per adapter, and the head.
Shapes: A (r, d_in), B (d_out, r); row i = [A[i], B[:, i]].
Deviation: the head is averaged by num_examples, as in all methods here. The paper writes one layer;
    over all adapters S_k is the norm of all B_k A_k together and the tail's norm a sum, so that a
    client has one weight and one r_k. r_k stays at 1 or above. Rows that no client of the cohort
    holds keep their values, since a row of zeros could never train again, and are pruned once they
    are beyond every client's r_k. The default of `penalty` is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedara_core.adapters import AdapterConfig, Form, Rows, named_adapters
from fedara_core.errors import InputError, require_not_negative
from fedara_core.factors import lora_rows, split_pair
from fedara_core.method import (
    Batch,
    Client,
    Method,
    ServerState,
    first_rows,
    mean_whole,
    next_state,
    num_values,
    split_values,
    start_state,
)
from fedara_core.wire import Upload

_TINY = 1e-150  # weighs nothing beside any other norm


@dataclass(frozen=True, kw_only=True)
class HetLora(Method):
    """penalty: lambda, the weight of the tail's norm; 0 leaves all of rank self-pruning out.

    gamma: share of its triplets that a client keeps when it prunes (paper: 0.99); 1 leaves no tail.
    """

    uses_client_lora_ranks: ClassVar[bool] = True
    needs_factors: ClassVar[bool] = True
    own_rows: ClassVar[bool] = True
    penalty: float = 1e-3
    gamma: float = 0.99

    def __post_init__(self) -> None:
        require_not_negative(self, "penalty")
        if not 0 < self.gamma <= 1:
            raise InputError(f"method.gamma = {self.gamma} must be above 0 and at most 1")

    def init(
        self, model: nn.Module, adapter: AdapterConfig, *, seed: int, num_rounds: int
    ) -> ServerState:
        rows = lora_rows(adapter, seed)
        extra = {"client_lora_ranks": torch.tensor(adapter.client_lora_ranks)}  # int64
        return start_state(model, adapter, rows, seed=seed, num_rounds=num_rounds, extra=extra)

    def download(self, model: nn.Module, state: ServerState, client: Client | None) -> int:
        if client is None:
            return super().download(model, state, client)
        client_lora_rank = int(state.extra["client_lora_ranks"][client.client_id])
        truncated = replace(state, rank_masks=first_rows(state.rank_masks, client_lora_rank))
        num_bytes = super().download(model, truncated, client)
        client.notes["tail_norm"] = self._tail_norm(model).item()
        return num_bytes

    def local_step(self, client: Client, batch: Batch) -> None:
        client.backward(batch)
        if self.penalty:
            (self.penalty * self._tail_norm(client.model)).backward()  # type: ignore[no-untyped-call]
        client.step()

    def upload(self, client: Client, state: ServerState) -> Upload:
        if self.penalty and self._tail_norm(client.model).item() < client.notes["tail_norm"]:
            for _, adapter in named_adapters(client.model):
                adapter.write(adapter.read()[: self._kept(adapter.num_live)], self.form(state))
        return super().upload(client, state)

    def aggregate(self, state: ServerState, uploads: Sequence[Upload]) -> ServerState:
        form = self.form(state)
        client_lora_ranks = state.extra["client_lora_ranks"].clone()
        sums = {name: torch.zeros_like(old).double() for name, old in state.rows.items()}
        total = 0.0
        for upload in uploads:
            sent = rows_sent(upload, state, form)
            client_lora_ranks[upload.client_id] = sent
            rank_masks = first_rows(state.rank_masks, sent)
            trained, _, _ = split_values(upload.values, state, form, rank_masks=rank_masks)
            own = {name: rows[:sent].double() for name, rows in trained.items()}
            # Nobody has learned anything where all are zero: then they count alike.
            norm = product_norm(own, state.adapter) or _TINY
            total += norm
            for name, rows in own.items():
                sums[name][:sent] += norm * rows  # further down this client adds zeros
        held = int(client_lora_ranks[[upload.client_id for upload in uploads]].max())
        rank_masks = first_rows(state.rank_masks, int(client_lora_ranks.max()))
        new_rows = {}
        for name, old in state.rows.items():
            new_rows[name] = torch.cat([(sums[name][:held] / total).float(), old[held:]])
            new_rows[name][~rank_masks[name]] = 0
        return next_state(
            state,
            uploads,
            rows=new_rows,
            rank_masks=rank_masks,
            whole=mean_whole(uploads, state),
            extra={"client_lora_ranks": client_lora_ranks},
        )

    def _kept(self, client_lora_rank: int) -> int:
        """Triplets that pruning leaves, and where the tail begins: floor(gamma r_k)."""
        return max(1, int(self.gamma * client_lora_rank))

    def _tail_norm(self, model: nn.Module) -> Tensor:
        """Sum over adapters of ||B_tail|| ||A_tail||; 0 where there is no tail."""
        norms = []
        for _, adapter in named_adapters(model):
            start = self._kept(adapter.num_live)
            norms.append(adapter.parts["A"][start:].norm() * adapter.parts["B"][start:].norm())
        return torch.stack(norms).sum()


def rows_sent(upload: Upload, state: ServerState, form: Form) -> int:
    """Rows of each adapter in an upload: its length says it."""
    num_whole = num_values(state, form, rank_masks={})
    row_width = sum(form.width(shape) for shape in state.adapter.shapes.values())
    return (len(upload.values) - num_whole) // row_width


def product_norm(rows: Rows, adapter: AdapterConfig) -> float:
    """S_k = sqrt(sum over adapters of ||B A||_F^2), from the Gram matrices of A and B."""
    pairs = [split_pair(rows[name], shape) for name, shape in adapter.shapes.items()]
    squares = [((a @ a.T) * (b.T @ b)).sum() for a, b in pairs]  # tr(A^T B^T B A)
    return float(torch.stack(squares).sum().sqrt())
