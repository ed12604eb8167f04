"""Ravan: "Multi-Head Low-Rank Adaptation for Federated Fine-Tuning", arXiv 2506.05568.

Equations: W = W0 + scale sum_i s_i B_i H_i A_i over h heads. The bases B_i and A_i are frozen and
    the same everywhere; H_i and the number s_i train. A client uploads s_i H_i, in which the update
    is linear, so H_i <- sum_k p_k s_ki H_ki is exactly the mean of the clients' updates.
    h heads of rank r reach rank h r with h r^2 floats; one head would reach sqrt(h) r with them.
Start: H_i = 0 and s_i = 1. "orthogonal" (the paper's Gram-Schmidt): all rows of all A_i are
    orthonormal, and all columns of all B_i; "normal": normal draws, of such deviations that they
    are nearly so.
Up: h r^2 floats per adapter, and the head.
Down: the same; in round 0 nothing, as the start is free. Each client draws A_i and B_i from the
    seed, and each round starts from s_i = 1.
Shapes: A_i (r, d_in), B_i (d_out, r), H_i (r, r), s_i a number; row i = [H_i, s_i]. Rows are no
    triplets here: a live row is a head, so live_triplets is h per adapter.
Deviation: built from the paper's rule; its code is not public. scale = lora_alpha / lora_rank is
    the suite's (1 in the paper's equation). Weights are num_examples. Lengths of the bases, and
    that s_i starts again from 1 in each round, are ours. Every client trains all heads: the paper's
    choice of some of them for weak clients, by a score, is left out. The classifier trains and is
    averaged.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from fedara_core.adapters import Adapter
from fedara_core.errors import InputError, require
from fedara_core.method import Client, Method
from fedara_core.seeds import generator
from fedara_core.state import ServerState, Start
from fedara_core.values import Shape, Tensors
from fedara_core.wire import Upload


@dataclass(frozen=True, kw_only=True)
class Ravan(Method):
    """num_heads: h (the paper varies it). bases: how A_i and B_i are drawn, see above.

    train_scales: whether s_i trains (the paper: true; false is its ablation).
    """

    coded: ClassVar = ("down", "feedback")
    plain_mean: ClassVar[bool] = True

    num_heads: int = 4
    bases: Literal["orthogonal", "normal"] = "orthogonal"
    train_scales: bool = True

    def __post_init__(self) -> None:
        require(self, "above 0", "num_heads")

    def init(self, start: Start) -> ServerState:
        lora_rank = start.adapter.lora_rank
        parts: dict[str, Tensors] = {"H": {}, "s": {}}
        fixed: dict[str, Tensors] = {"A": {}, "B": {}}
        for index, (name, (d_out, d_in)) in enumerate(start.adapter.shapes.items()):
            num_directions = self.num_heads * lora_rank
            if self.bases == "orthogonal" and num_directions > min(d_out, d_in):
                raise InputError(
                    f"method.num_heads = {self.num_heads} of adapter.lora_rank = {lora_rank} are "
                    f"{num_directions} orthogonal directions, and layer {name} is {d_out} x "
                    f"{d_in}; allowed: fewer, or method.bases = 'normal'"
                )
            draw = generator(start.seed, "bases", index)
            fixed["A"][name] = self._basis(d_in, num_directions, draw).T.contiguous()
            fixed["B"][name] = self._basis(d_out, num_directions, draw)
            parts["H"][name] = torch.zeros(self.num_heads, lora_rank**2)
            parts["s"][name] = torch.ones(self.num_heads, 1)
        return replace(start.state(self, parts), fixed=fixed)

    def _basis(self, size: int, num_directions: int, draw: torch.Generator) -> Tensor:
        """Directions of all heads, side by side (size, h r)."""
        basis = torch.empty(size, num_directions).normal_(0, size**-0.5, generator=draw)
        if self.bases == "orthogonal":
            q, r = torch.linalg.qr(basis.double())
            basis = (q * r.diagonal().sign()).float()  # the signs that Gram and Schmidt give
        return basis

    def form(self, state: ServerState) -> "Heads":
        scales: tuple[str, ...] = ("s",)
        return Heads(
            scale=state.adapter.scale,
            lora_rank=state.adapter.lora_rank,
            local=scales if self.train_scales else (),
            frozen=() if self.train_scales else scales,
        )

    def upload(self, client: Client, state: ServerState) -> Upload:
        values, runs = client.sent_values, state.index.runs
        scales = client.model.vector[runs["s"]].cpu()  # (all heads,)
        values[runs["H"]].view(len(scales), -1).mul_(scales[:, None])
        return client.make_upload(values)


@dataclass(frozen=True, kw_only=True)
class Heads:
    """W0 + scale sum_i s_i B_i H_i A_i with rows [H_i, s_i]; all A_i (h r, d_in), one below the
    other, and all B_i (d_out, h r) are the adapter's `fixed`."""

    scale: float
    lora_rank: int
    frozen: tuple[str, ...] = ()
    local: tuple[str, ...] = ()

    def widths(self, shape: Shape) -> dict[str, int]:
        return {"H": self.lora_rank**2, "s": 1}

    def forward(self, adapter: Adapter, x: Tensor) -> Tensor:
        hidden = functional.linear(adapter.dropout(x), adapter.fixed["A"])  # (..., h r)
        hidden = hidden.reshape(*x.shape[:-1], -1, self.lora_rank)  # (..., h, r)
        hidden = torch.einsum("...hj,hij->...hi", hidden, self._cores(adapter))
        change = functional.linear(hidden.flatten(-2), adapter.fixed["B"]) * self.scale
        return adapter.unchanged(x) + change

    def pair(self, adapter: Adapter) -> tuple[Tensor, Tensor]:
        cores = torch.block_diag(*self._cores(adapter).detach())  # type: ignore[no-untyped-call]
        return adapter.fixed["A"], adapter.fixed["B"] @ cores

    def _cores(self, adapter: Adapter) -> Tensor:
        """s_i H_i (h, r, r)."""
        heads = adapter.parts["H"].view(-1, self.lora_rank, self.lora_rank)
        return torch.mul(adapter.parts["s"][:, :, None], heads)
