"""FeDeRA: "Efficient Fine-tuning of Language Models in Federated Learning Leveraging Weight
Decomposition", arXiv 2404.18848.

Start: from W0 = U S V^T come A0 = sqrt(S_r / scale) V_r^T and B0 = U_r sqrt(S_r / scale), so that
    scale B0 A0 is the best rank-r part of W0. It leaves the frozen weight, W0 <- W0 - scale B0 A0,
    and the function stays as it was.
Then LoRA under FedAvg: W = W0 + scale B A; A and B are averaged separately.
Up: r (d_in + d_out) floats per adapter, and the head.
Down: r (d_in + d_out) floats per adapter, and the head. At its first participation a client also
    gets A0 and B0, r (d_in + d_out) more, and forms the new W0 from them; in round 0 they are A and
    B themselves. Clients take no SVD: its signs and last bits differ between machines.
Shapes: W0, delta = -scale B0 A0 (d_out, d_in); A (r, d_in), B (d_out, r); row i = [A[i], B[:, i]].
Deviation: how S is shared between A and B, and where scale enters, could not be checked in the
    paper; here evenly, with scale divided out.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from fedara_core.adapters import AdapterConfig, Rows, named_adapters
from fedara_core.factors import join_pair, signed_svd, split_pair
from fedara_core.method import (
    Client,
    Method,
    ServerState,
    num_values,
    start_state,
)
from fedara_core.wire import message_bytes


@dataclass(frozen=True, kw_only=True)
class FeDeRA(Method):
    """No hyperparameters of its own: lora_rank, lora_alpha and targets are shared settings."""

    sends_trained: ClassVar[bool] = False  # A0 and B0 go down, too, uncoded

    def init(
        self, model: nn.Module, adapter: AdapterConfig, *, seed: int, num_rounds: int
    ) -> ServerState:
        rows: Rows = {}
        delta: Rows = {}
        for name, layer in named_adapters(model):
            u, s, vt = signed_svd(layer.base.weight.detach().cpu(), adapter.lora_rank)
            root = torch.sqrt(s / adapter.scale)  # (r,)
            rows[name] = join_pair(root[:, None] * vt, u * root).float()
            a, b = split_pair(rows[name].double(), layer.shape)
            delta[name] = -(adapter.scale * b @ a).float()  # (d_out, d_in)
        fixed = {"delta": delta}
        return start_state(model, adapter, rows, seed=seed, num_rounds=num_rounds, fixed=fixed)

    def download(self, model: nn.Module, state: ServerState, client: Client | None) -> int:
        super().download(model, state, client)
        num_floats = num_values(state, self.form(state))
        if client is not None and state.round_index and state.last_round[client.client_id] < 0:
            num_floats += sum(rows.numel() for rows in state.rows.values())  # B0 and A0
        return message_bytes(num_floats)
