"""FedSmoothLoRA: "Toward Smoother and Faster Convergence in Federated Low-Rank Adaptation",
arXiv 2605.29460.

The server merges each round's mean change into the base weight, as FLoRA does, so that rounds add
up to more than rank r. A client does not start the next round from nothing, but from where it was,
and along its own gradient. W is the server's model, B_s A_s the change that the last round merged
into it, B_c A_c what the client had uploaded in its own last round, SVD_r the best pair of rank r:
1. Round matching: M = zeta (B_c A_c - B_s A_s); 0 for a client that comes for the first time.
2. Gradient alignment: U S V^T = svd of the loss's gradient by the weight W + scale M;
    A_g = l V[:, :r]^T, B_g = l U[:, r:2r], l = d_out^(1/4) / sqrt(gamma) (LoRA-GA's start,
    arXiv 2407.05000).
3. Start: W_k = W - scale B_g A_g + scale B A with B A = SVD_r(B_g A_g + M), sqrt(S) on both sides;
    the weight is shifted, so that the client starts from W + scale M but for what SVD_r leaves out.
4. The client trains A and B, keeps and uploads B_c A_c = SVD_r(B A - B_g A_g).
5. Server: B_s A_s = SVD_r(sum_k p_k B_c A_c);  W <- W + scale B_s A_s.
zeta falls from zeta to min_zeta over the rounds as half a cosine (the paper: constant for IID data,
this decay for others).
Up: r (d_in + d_out) floats per adapter, and the head.
Down: r (d_in + d_out) floats per adapter, the last round's change, and the head. A client that
    missed more rounds gets their changes, too; where the dense change is less, it gets that,
    d_in d_out. In round 0 nothing, as the start is free.
Shapes: A (r, d_in), B (d_out, r), row i = [A[i], B[:, i]]; a client keeps A and B^T of all adapters
    as one vector; delta (d_out, d_in) is W - W0 without the last round's change.
Deviation: the gradient is of the round's first batch, on which the client then also trains (the
    authors take as many batches as give 32 to 512 examples); its cost is not in the FLOPs. scale is
    lora_alpha / lora_rank (theirs: lora_alpha / sqrt(r), of rsLoRA). SVDs are exact (theirs may be
    randomised). A client that comes late has M = 0 (theirs: -zeta B_s A_s, as if it had uploaded
    zero); one that missed rounds matches what it uploaded last. Layers with fewer than 2 r singular
    vectors take their last r as B_g. What a client has to catch up on, and the dense limit, are
    ours. The head trains and is averaged. Without a local step, which no run has, a client uploads
    B_c A_c = 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedara_core.adapters import AdaptedModel
from fedara_core.errors import require
from fedara_core.factors import put_product, signed_svd, truncated_product
from fedara_core.merge.received import Received
from fedara_core.method import Batch, Client, Size, missed_values
from fedara_core.redistribute import Redistributing
from fedara_core.state import ServerState, Start, added_delta, with_added_delta, with_zero_delta
from fedara_core.wire import Upload

Pair = tuple[Tensor, Tensor]  # A (r, d_in), B^T (r, d_out)


@dataclass(frozen=True, kw_only=True)
class FedSmoothLora(Redistributing):
    """zeta: weight of round matching in round 0; min_zeta: at the end (both 1: constant, the
    paper's choice for IID data). gamma: the larger, the shorter A_g and B_g."""

    uses_client_lora_ranks: ClassVar[bool] = False
    stateful: ClassVar[bool] = True

    zeta: float = 1.0
    min_zeta: float = 0.0
    gamma: float = 64.0

    def __post_init__(self) -> None:
        require(self, "0 or above", "zeta", "min_zeta")
        require(self, "above 0", "gamma")

    def init(self, start: Start) -> ServerState:
        return with_zero_delta(super().init(start))

    def zeta_at(self, state: ServerState) -> float:
        """zeta of the state's round."""
        fall = (1 + math.cos(math.pi * state.round_index / state.num_rounds)) / 2  # 1 to 0
        return self.min_zeta + (self.zeta - self.min_zeta) * fall

    def download(self, model: AdaptedModel, state: ServerState, client: Client | None) -> Size:
        if client is None:
            return super().download(model, state, client)
        client.notes["scale"] = state.adapter.scale
        client.notes["matching"] = self._matching(state, client)
        return super().download(model, merged(state), client)

    def downlink(self, state: ServerState, client_id: int) -> Size:
        num_whole_values = state.index.num_sent - state.index.num_row_values
        return Size(num_values=num_whole_values, num_exact=missed_values(state, client_id))

    def _matching(self, state: ServerState, client: Client) -> dict[str, Pair]:
        """Rows A (2 r, d_in) and B^T (2 r, d_out) of M by adapter; none if there is nothing to
        match."""
        if "pair" not in client.kept:
            return {}
        own, last, zeta = state.index.parts(client.kept["pair"]), state.parts, self.zeta_at(state)
        return {
            name: (
                torch.cat([own["A"][name], a]),
                zeta * torch.cat([own["B"][name], -last["B"][name]]),
            )
            for name, a in last["A"].items()
        }

    def local_step(self, client: Client, batch: Batch) -> None:
        if "gradient_pairs" not in client.notes:
            client.notes["gradient_pairs"] = start(client, batch, self.gamma)
        super().local_step(client, batch)

    def upload(self, client: Client, state: ServerState) -> Upload:
        values = client.sent_values
        parts = state.index.parts(values)
        for name, (a_g, b_g) in client.notes.get("gradient_pairs", {}).items():
            a, b = parts["A"][name], parts["B"][name]
            put_product(a, b, torch.cat([b, -b_g]), torch.cat([a, a_g]))
        client.kept["pair"] = values[: state.index.num_row_values].clone()
        return client.make_upload(values)

    def aggregate(self, state: ServerState, received: Received) -> ServerState:
        after = super().aggregate(state, received)
        return with_added_delta(after, [(state.parts, 1.0)], state.adapter.lora_rank)


def merged(state: ServerState) -> ServerState:
    """The same function with the last round's change in the weight, and B = 0."""
    vector = state.vector.clone()
    vector[state.index.runs["B"]] = 0
    return replace(state, vector=vector, fixed=added_delta(state, [(state.parts, 1.0)]))


def start(client: Client, batch: Batch, gamma: float) -> dict[str, Pair]:
    """Give a client that has downloaded its first A and B and its shifted weights.

    Returns A_g and B_g^T by adapter.
    """
    scale, matching = client.notes["scale"], client.notes["matching"]
    weights = {name: adapter.weight.detach() for name, adapter in client.model.adapters.items()}
    for name, adapter in client.model.adapters.items():
        matched = weights[name].clone()
        if name in matching:
            matched += scale * product(matching[name]).to(matched.device)
        adapter.fixed["weight"] = matched.requires_grad_()
    client.backward(batch)  # B = 0, so A adds nothing
    client.losses.pop()
    gradient_pairs: dict[str, Pair] = {}
    parts = client.model.index.parts(client.vector)
    for name, adapter in client.model.adapters.items():
        gradient = adapter.fixed["weight"].grad
        assert gradient is not None
        pair = gradient_pairs[name] = gradient_pair(gradient.cpu(), adapter.num_live, gamma)
        adapter.fixed["weight"] = weights[name] - scale * product(pair).to(weights[name].device)
        if name in matching:
            pair = balanced([pair, matching[name]], adapter.num_live)
        for part, rows in zip("AB", pair, strict=True):
            parts[part][name].copy_(rows)
    return gradient_pairs


def product(pair: Pair) -> Tensor:
    """B A (d_out, d_in)."""
    a, b = pair
    return b.T @ a


def gradient_pair(gradient: Tensor, lora_rank: int, gamma: float) -> Pair:
    """A_g, B_g^T of a layer's gradient (d_out, d_in)."""
    u, _, vt = signed_svd(gradient, 2 * lora_rank)
    length = gradient.shape[0] ** 0.25 / gamma**0.5
    return (length * vt[:lora_rank]).float(), (length * u[:, -lora_rank:].T).float()


def balanced(terms: Sequence[Pair], lora_rank: int) -> Pair:
    """The best pair of this rank for the terms' sum, with sqrt(S) on both sides."""
    right, left = (torch.cat(rows) for rows in zip(*terms, strict=True))
    u, s, vt = truncated_product(left.T, right, lora_rank)
    root = s.sqrt()
    return (root[:, None] * vt).float(), (u * root).T.float()
