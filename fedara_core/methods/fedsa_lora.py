"""FedSA-LoRA: "Selective Aggregation for Low-Rank Adaptation in Federated Learning",
arXiv 2410.01463.

Equations: W_k = W0 + scale B_k A; clients train both; A <- sum_k p_k A_k is shared, B_k stays at
    its client from round to round, from B_k = 0.
Up: r d_in floats per adapter, and the head.
Down: the same.
Shapes: A (r, d_in), B (d_out, r); row i = [A[i], B[:, i]]; a client keeps B^T (r, d_out).
Deviation: the head is shared and averaged, so that heads are alike in all methods; the authors'
    code keeps it at the client. Clients may miss rounds: one that never took part has B_k = 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedara_core.adapters import read_rows, write_rows
from fedara_core.factors import join_pair, split_pair
from fedara_core.method import (
    Client,
    Method,
    ServerState,
    live_values,
    make_upload,
    next_state,
    num_values,
    split_values,
    weighted_mean,
    write_whole,
)
from fedara_core.wire import Upload, message_bytes


@dataclass(frozen=True, kw_only=True)
class FedSaLora(Method):
    """No hyperparameters of its own. B is zero in the server's rows for good."""

    stateful: ClassVar[bool] = True
    own_rows: ClassVar[bool] = True

    def download(self, model: nn.Module, state: ServerState, client: Client | None) -> int:
        form, rows = self.form(state), dict(state.rows)
        for name, own in (client.kept if client else {}).items():
            a, _ = split_pair(rows[name], state.adapter.shapes[name])
            rows[name] = join_pair(a, own.T)
        write_rows(model, rows, state.rank_masks, form)
        write_whole(model, state.whole)
        return message_bytes(num_values(state, form, parts=("A",)))

    def upload(self, client: Client, state: ServerState) -> Upload:
        for name, rows in read_rows(client.model).items():
            _, b = split_pair(rows, state.adapter.shapes[name])
            client.kept[name] = b.T.clone()  # a view would keep A as well
        return make_upload(client, live_values(client.model, state, parts=("A",)))

    def aggregate(self, state: ServerState, uploads: Sequence[Upload]) -> ServerState:
        mean = weighted_mean(uploads)
        rows, whole, _ = split_values(mean, state, self.form(state), parts=("A",))
        return next_state(state, uploads, rows=rows, whole=whole)
