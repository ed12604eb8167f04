"""FeDeRA: "Efficient Fine-tuning of Language Models in Federated Learning Leveraging Weight
Decomposition", arXiv 2404.18848.

Start: from W0 = U S V^T come A0 = sqrt(S_r / scale) V_r^T and B0 = U_r sqrt(S_r / scale), so that
    scale B0 A0 is the best rank-r part of W0. It leaves the frozen weight, W0 <- W0 - scale B0 A0,
    and the function stays as it was.
Then LoRA under FedAvg: W = W0 + scale B A; A and B are averaged separately.
Up: r (d_in + d_out) floats per adapter, and the head.
Down: r (d_in + d_out) floats per adapter, and the head. At its first participation a client also
    gets A0 and B0, r (d_in + d_out) more, and forms the new W0 from them; in round 0 it gets them
    alone, as A and B. Clients take no SVD: its signs and last bits differ between machines.
Shapes: W0, delta = -scale B0 A0 (d_out, d_in); A (r, d_in), B (d_out, r); row i = [A[i], B[:, i]].
Deviation: how S is shared between A and B, and where scale enters, could not be checked in the
    paper; here evenly, with scale divided out.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedara_core.adapters import AdaptedModel
from fedara_core.factors import signed_svd
from fedara_core.method import Client, Method, Size
from fedara_core.state import ServerState, Start
from fedara_core.values import Tensors


@dataclass(frozen=True, kw_only=True)
class FeDeRA(Method):
    """No hyperparameters of its own: lora_rank, lora_alpha and targets are shared settings."""

    coded: ClassVar = ("down", "feedback")
    plain_mean: ClassVar = True

    def init(self, start: Start) -> ServerState:
        adapter = start.adapter
        parts: dict[str, Tensors] = {"A": {}, "B": {}}
        delta: Tensors = {}
        for name, layer in start.model.adapters.items():
            u, s, vt = signed_svd(layer.base.weight.detach().cpu(), adapter.lora_rank)
            root = torch.sqrt(s / adapter.scale)  # (r,)
            a, b = (root[:, None] * vt).float(), (u * root).float().T
            parts["A"][name], parts["B"][name] = a, b
            delta[name] = -(adapter.scale * b.double().T @ a.double()).float()  # (d_out, d_in)
        return replace(start.state(self, parts), fixed={"delta": delta})

    def download(self, model: AdaptedModel, state: ServerState, client: Client | None) -> Size:
        size = super().download(model, state, client)
        if client is not None and state.first_time(client.client_id):
            return replace(size, num_exact=state.index.num_row_values)  # A0 and B0
        return size
