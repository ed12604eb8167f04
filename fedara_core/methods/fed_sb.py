"""Fed-SB: "A Silver Bullet for Extreme Communication Efficiency and Performance in (Private)
Federated LoRA Fine-Tuning", arXiv 2502.15436; it brings LoRA-SB (arXiv 2411.19557) to clients.

Equations: W = W0 + scale B R A; A and B are frozen and the same everywhere, only R trains. The
    update is linear in R, so mean(R) is exactly the mean of the clients' updates.
Start: R = 0; B = U_r and A = V_r^T of W0 = U S V^T, so both are orthonormal.
Up: r^2 floats per adapter, and the head.
Down: r^2 floats per adapter, and the head. At its first participation a client also gets A and B,
    r (d_in + d_out) more.
Shapes: A (r, d_in), B (d_out, r), R (r, r); row i = R[i]. Rows are no triplets here: a live row is
    a row of R, so live_triplets is r per adapter.
Deviation: the start. The paper takes A, B and the first R from the SVD of the first step of full
    fine-tuning, averaged over clients; that needs data before round 0.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fedara_core.adapters import AdaptedModel, Adapter
from fedara_core.factors import signed_svd
from fedara_core.method import Client, Method, Size
from fedara_core.state import ServerState, Start
from fedara_core.values import Shape, Tensors


@dataclass(frozen=True, kw_only=True)
class FedSb(Method):
    """No hyperparameters of its own: lora_rank, lora_alpha and targets are shared settings."""

    coded: ClassVar = ("down", "feedback")

    def init(self, start: Start) -> ServerState:
        lora_rank = start.adapter.lora_rank
        core: Tensors = {}
        fixed: dict[str, Tensors] = {"A": {}, "B": {}}
        for name, layer in start.model.adapters.items():
            u, _, vt = signed_svd(layer.base.weight.detach().cpu(), lora_rank)
            core[name] = torch.zeros(lora_rank, lora_rank)
            # Contiguous, as a checkpoint gives them back: strides can change the last bits.
            fixed["A"][name] = vt.float().contiguous()  # (r, d_in)
            fixed["B"][name] = u.float().contiguous()  # (d_out, r)
        return replace(start.state(self, {"R": core}), fixed=fixed)

    def form(self, state: ServerState) -> "Core":
        return Core(scale=state.adapter.scale, lora_rank=state.adapter.lora_rank)

    def download(self, model: AdaptedModel, state: ServerState, client: Client | None) -> Size:
        size = super().download(model, state, client)
        if client is not None and state.first_time(client.client_id):
            fixed = [t for tensors in state.fixed.values() for t in tensors.values()]
            return replace(size, num_exact=sum(map(Tensor.numel, fixed)))
        return size


@dataclass(frozen=True, kw_only=True)
class Core:
    """W0 + scale B R A with rows R[i]; A (r, d_in) and B (d_out, r) are the adapter's `fixed`."""

    scale: float
    lora_rank: int
    frozen: tuple[str, ...] = ()
    local: tuple[str, ...] = ()

    def widths(self, shape: Shape) -> dict[str, int]:
        return {"R": self.lora_rank}

    def forward(self, adapter: Adapter, x: Tensor) -> Tensor:
        hidden = functional.linear(adapter.dropout(x), adapter.fixed["A"])  # (..., r)
        hidden = functional.linear(hidden, adapter.parts["R"])  # (..., r)
        change = functional.linear(hidden, adapter.fixed["B"]) * self.scale
        return adapter.unchanged(x) + change

    def pair(self, adapter: Adapter) -> tuple[Tensor, Tensor]:
        return adapter.fixed["A"], adapter.fixed["B"] @ adapter.parts["R"].detach()
