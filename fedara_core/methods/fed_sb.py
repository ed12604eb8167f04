"""Fed-SB: "A Silver Bullet for Extreme Communication Efficiency and Performance in (Private)
Federated LoRA Fine-Tuning", arXiv 2502.15436; it brings LoRA-SB (arXiv 2411.19557) to clients.

Equations: W = W0 + scale B R A; A and B are frozen and the same everywhere, only R trains. The
    update is linear in R, so mean(R) is exactly the mean of the clients' updates.
Start: the opening round, the first one that has an upload, takes the mean gradient G of the clients
    at W0. The first step of full fine-tuning by Adam is D = -start_lr sign(G); of its SVD U S V^T
    come B = U_r, A = V_r^T and R = S_r / scale, so that scale B R A is D's best rank-r part.
Up: in the opening round d_out d_in floats per adapter, later r^2; and the head.
Down: r^2 floats per adapter, and the head. At its first participation after the opening round a
    client also gets A and B, r (d_in + d_out) more. In the opening round nothing.
Shapes: G, D (d_out, d_in); A (r, d_in), B (d_out, r), R (r, r); row i = R[i]. Rows are no triplets
    here: a live row is a row of R, so live_triplets is r per adapter, and 1 in the opening round.
Deviation: the head trains in the opening round as in all others, and G is a mean over the round's
    batches, along the head's way (the authors' code: some hundred examples of all clients together,
    before any training). Means are weighted by num_examples (their code takes plain ones: mean =
    "plain"). R has scale divided out (in their code lora_alpha = r, so that scale is 1).
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from fedara_core.adapters import Adapter, AdapterForm
from fedara_core.errors import require
from fedara_core.factors import signed_svd
from fedara_core.merge.received import Received
from fedara_core.method import Batch, Client, Method, Size, next_state, with_mean
from fedara_core.state import ServerState, Start, with_parts
from fedara_core.values import Shape, Tensors
from fedara_core.wire import Upload


@dataclass(frozen=True, kw_only=True)
class FedSb(Method):
    """mean: weights of the clients, their num_examples or (the authors' code) all alike. start_lr:
    the learning rate of the first step, which R starts from (their code: that of training divided
    by the steps of its warm-up, about 1e-7).
    """

    coded: ClassVar = ("down", "feedback")
    version: ClassVar[int] = 2

    mean: Literal["weighted", "plain"] = "weighted"
    start_lr: float = 1e-7

    def __post_init__(self) -> None:
        require(self, "above 0", "start_lr")

    def init(self, start: Start) -> ServerState:
        shapes = start.adapter.shapes.items()
        return start.state(self, {"G": {name: torch.zeros(1, m * n) for name, (m, n) in shapes}})

    def form(self, state: ServerState) -> AdapterForm:
        if state.is_start:
            return Opening()
        return Core(scale=state.adapter.scale, lora_rank=state.adapter.lora_rank)

    def downlink(self, state: ServerState, client_id: int) -> Size:
        size = super().downlink(state, client_id)
        if state.last_round[client_id] > state.extra["opening_round"]:
            return size
        fixed = [t for tensors in state.fixed.values() for t in tensors.values()]
        return replace(size, num_exact=sum(map(Tensor.numel, fixed)))

    def local_step(self, client: Client, batch: Batch) -> None:
        client.backward(batch)
        if "G" in client.model.index.runs:
            own = client.gradient[client.model.index.runs["G"]]
            client.notes["G"] = client.notes.get("G", 0) + own
            own.zero_()  # W stays, and does not count where the head's gradient is clipped
        client.step()

    def upload(self, client: Client, state: ServerState) -> Upload:
        values = client.sent_values
        if "G" in client.notes:
            values[state.index.runs["G"]] = (client.notes["G"] / len(client.losses)).cpu()
        num_examples = client.num_examples if self.mean == "weighted" else 1
        return replace(client, num_examples=num_examples).make_upload(values)

    def aggregate(self, state: ServerState, received: Received) -> ServerState:
        after = next_state(state, received, vector=with_mean(state, received.mean))
        return self._opened(after) if state.is_start else after

    def _opened(self, state: ServerState) -> ServerState:
        """The state with A, B and R from the mean gradient that is in its rows."""
        lora_rank = state.adapter.lora_rank
        core: Tensors = {}
        fixed: dict[str, Tensors] = {"A": {}, "B": {}}
        for name, gradient in state.parts["G"].items():
            first_step = -self.start_lr * gradient.reshape(state.adapter.shapes[name]).sign()
            u, s, vt = signed_svd(first_step, lora_rank)
            core[name] = (s / state.adapter.scale).diag().float()
            # Contiguous, as a checkpoint gives them back: strides can change the last bits.
            fixed["A"][name] = vt.float().contiguous()  # (r, d_in)
            fixed["B"][name] = u.float().contiguous()  # (d_out, r)
        opened = replace(
            state,
            rank_masks={name: torch.ones(lora_rank, dtype=torch.bool) for name in core},
            fixed=fixed,
            extra={**state.extra, "opening_round": torch.tensor(state.round_index - 1)},
        )
        return with_parts(opened, self.form(opened), {"R": core}, state.whole)


@dataclass(frozen=True, kw_only=True)
class Opening:
    """W0 + G with one row, G (1, d_out d_in), which stays zero: its gradient is that of W."""

    frozen: tuple[str, ...] = ()
    local: tuple[str, ...] = ()

    def widths(self, shape: Shape) -> dict[str, int]:
        return {"G": shape[0] * shape[1]}

    def forward(self, adapter: Adapter, x: Tensor) -> Tensor:
        weight = adapter.base.weight + adapter.parts["G"].view(adapter.shape)
        return functional.linear(x, weight, adapter.base.bias)

    def pair(self, adapter: Adapter) -> None:
        return None


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
