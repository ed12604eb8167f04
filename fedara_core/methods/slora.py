"""SLoRA: "Federated Parameter Efficient Fine-Tuning of Language Models", arXiv 2308.06522.

Stage 1, rounds 0 .. R1 - 1: sparse fine-tuning. A random weight_mask per layer, drawn from the
    seed and fixed, says which weights train; only their changes travel (no indices).
Stage 2, the rest: LoRA that starts from the SVD of the accumulated change Delta = U S V^T:
    A = sqrt(S_r / scale) V_r^T, B = U_r sqrt(S_r / scale), so that scale B A is Delta's best
    rank-r approximation. W0 stays W0.
Up: stage 1 density d_in d_out floats per adapter, stage 2 r (d_in + d_out); and the head. Stage 1
    counts in every total.
Down: the same; in round 0 nothing, as the start is free.
Shapes: Delta (d_out, d_in), its values one row (1, nnz); A (r, d_in), B (d_out, r).
Deviation: R1 is a fraction of all rounds (the paper stops stage 1 by a budget of its own); the
    paper leaves open how S is shared between A and B, here evenly.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fedara_core.adapters import Adapter, AdapterForm, LowRank
from fedara_core.errors import require
from fedara_core.factors import signed_svd
from fedara_core.merge.received import Received
from fedara_core.method import Method, next_state, with_mean
from fedara_core.seeds import generator
from fedara_core.state import ServerState, Start, with_parts
from fedara_core.values import Shape, Tensors


@dataclass(frozen=True, kw_only=True)
class SLora(Method):
    """density: share of each target weight that stage 1 trains; 0 leaves stage 1 out.

    stage1_fraction: share of the rounds that stage 1 takes; at least one, if another one is left.
    stage1_lr_factor: factor on the learning rate of the sparse weights.
    """

    coded: ClassVar = ("down", "feedback")

    density: float = 0.01
    stage1_fraction: float = 0.2
    stage1_lr_factor: float = 1.0

    def __post_init__(self) -> None:
        require(self, "in [0, 1)", "density", "stage1_fraction")
        require(self, "above 0", "stage1_lr_factor")

    def stage1_rounds(self, num_rounds: int) -> int:
        if self.density == 0 or self.stage1_fraction == 0:
            return 0
        return min(num_rounds - 1, max(1, round(self.stage1_fraction * num_rounds)))

    def init(self, start: Start) -> ServerState:
        if not self.stage1_rounds(start.num_rounds):
            return super().init(start)
        shapes = start.adapter.shapes.items()
        delta = {name: torch.zeros(1, num_sparse(shape, self.density)) for name, shape in shapes}
        return start.state(self, {"delta": delta})

    def in_stage1(self, state: ServerState) -> bool:
        """Whether the sparse weights train: until a round from R1 - 1 on has had an upload."""
        return int(state.last_round.max()) < self.stage1_rounds(state.num_rounds) - 1

    def form(self, state: ServerState) -> AdapterForm:
        if self.in_stage1(state):
            return Sparse(seed=state.seed, density=self.density)
        return LowRank(scale=state.adapter.scale)

    def lr_factor(self, part: str) -> float:
        return self.stage1_lr_factor if part == "delta" else 1.0

    def aggregate(self, state: ServerState, received: Received) -> ServerState:
        after = next_state(state, received, vector=with_mean(state, received.mean))
        if not self.in_stage1(state) or self.in_stage1(after):
            return after
        parts: dict[str, Tensors] = {"A": {}, "B": {}}
        for name in after.rank_masks:
            parts["A"][name], parts["B"][name] = self._factor(name, after)
        rank_masks = {n: torch.ones(len(a), dtype=torch.bool) for n, a in parts["A"].items()}
        stage2 = replace(after, rank_masks=rank_masks)
        return with_parts(stage2, self.form(stage2), parts, after.whole)

    def _factor(self, name: str, state: ServerState) -> tuple[Tensor, Tensor]:
        """A (r, d_in), B^T (r, d_out) from the stage-1 values of one adapter."""
        shape = state.adapter.shapes[name]
        delta = torch.zeros(shape[0] * shape[1])
        index = weight_mask(state.seed, self.density, name, shape)
        delta[index] = state.parts["delta"][name][0]
        u, s, vt = signed_svd(delta.reshape(shape), state.adapter.lora_rank)
        root = (s / state.adapter.scale).sqrt()  # (r,)
        return (root[:, None] * vt).float(), (u * root).T.float()


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """W0 + Delta, Delta zero outside the weight_mask; one row holds the values inside."""

    seed: int
    density: float
    frozen: tuple[str, ...] = ()
    local: tuple[str, ...] = ()

    def widths(self, shape: Shape) -> dict[str, int]:
        return {"delta": num_sparse(shape, self.density)}

    def forward(self, adapter: Adapter, x: Tensor) -> Tensor:
        base = adapter.base
        index = _index_on(base.weight.device, self.seed, self.density, adapter.name, adapter.shape)
        weight = base.weight.reshape(-1).index_add(0, index, adapter.parts["delta"][0])
        return functional.linear(x, weight.reshape(adapter.shape), base.bias)

    def pair(self, adapter: Adapter) -> None:
        return None


def num_sparse(shape: Shape, density: float) -> int:
    """Trained weights of a layer in stage 1: density d_out d_in, at least one."""
    return max(1, round(density * shape[0] * shape[1]))


@cache
def weight_mask(seed: int, density: float, name: str, shape: Shape) -> Tensor:
    """Sorted flat indices (nnz,) of the weights that stage 1 trains, from the seed alone."""
    drawn = torch.randperm(shape[0] * shape[1], generator=generator(seed, f"weight_mask:{name}"))
    return drawn[: num_sparse(shape, density)].sort().values


@cache
def _index_on(device: torch.device, seed: int, density: float, name: str, shape: Shape) -> Tensor:
    """The weight_mask on a device; copied there once, not in every forward pass."""
    return weight_mask(seed, density, name, shape).to(device)
