"""Bottleneck adapters under FedAvg (arXiv 1602.05629): "Parameter-Efficient Transfer Learning for
NLP" (Houlsby et al., arXiv 1902.00751) and MAD-X (Pfeiffer et al., arXiv 2005.00052).

Equations: y + Up act(Down y + bias) on the output y of the linear layer that ends a sub-layer;
    all three train and are averaged. No scale and no lora_rank enter.
Placement: "houlsby" after attention's output projection and after the feed-forward's, act = GELU;
    "pfeiffer" after the feed-forward's only, act = ReLU.
Start: as Houlsby's, Down and Up Gaussian of deviation 0.01 cut at two deviations, bias = 0: nearly
    the identity.
Up: b (2 d_out + 1) floats per adapter at those places, and the head.
Down: the same; in round 0 nothing, as the start is free.
Shapes: y (..., d_out), Down (b, d_out), bias (b,), Up (d_out, b); row i = [Down[i], bias[i],
    Up[:, i]]. A live row is a unit of the bottleneck, so live_triplets is b per adapter.
Deviation: Up has no bias of its own; layer norms stay frozen (Houlsby trains them); y is the
    projection's output as it comes, before dropout (Houlsby: behind it) and before the residual and
    the layer norm (so in Houlsby; Pfeiffer: behind them). b = 64 and the start are Houlsby's for
    both placements (Pfeiffer: b = 48).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedara_core.adapters import Adapter
from fedara_core.errors import InputError, require
from fedara_core.method import Method
from fedara_core.seeds import generator
from fedara_core.state import ServerState, Start
from fedara_core.values import Shape, Tensors


@dataclass(frozen=True, kw_only=True)
class FedAdapter(Method):
    """placement: after which sub-layers, see above. width: units b of a bottleneck (Houlsby: 64).

    init_std: deviation of Down and Up (Houlsby: 0.01).
    """

    # Endings of layer names, for BERT and its relatives, DistilBERT, Llama and its relatives.
    ATTENTION: ClassVar = ("attention.output.dense", "attention.out_lin", "self_attn.o_proj")
    FEED_FORWARD: ClassVar = ("output.dense", "ffn.lin2", "mlp.down_proj")

    coded: ClassVar = ("down", "feedback")
    plain_mean: ClassVar = True
    low_rank: ClassVar = False
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    width: int = 64
    init_std: float = 0.01

    def __post_init__(self) -> None:
        require(self, "above 0", "width", "init_std")

    def init(self, start: Start) -> ServerState:
        parts: dict[str, Tensors] = {"down": {}, "bias": {}, "up": {}}
        for index, name in enumerate(self.places(list(start.adapter.shapes))):
            d_out, _ = start.adapter.shapes[name]
            drawn = torch.empty(self.width, 2 * d_out + 1)
            cut, source = 2 * self.init_std, generator(start.seed, "init", index)
            nn.init.trunc_normal_(drawn, 0, self.init_std, -cut, cut, generator=source)
            down, bias, up = torch.split(drawn, [d_out, 1, d_out], dim=1)
            parts["down"][name], parts["up"][name] = down, up
            parts["bias"][name] = torch.zeros_like(bias)
        return start.state(self, parts)

    def places(self, names: Sequence[str]) -> list[str]:
        """Those of the layers `names` that get a bottleneck. Raises InputError."""
        attention = [name for name in names if ends(name, self.ATTENTION)]
        rest = [name for name in names if name not in attention]
        found = {"feed-forward": [name for name in rest if ends(name, self.FEED_FORWARD)]}
        if self.placement == "houlsby":
            found["attention"] = attention
        for kind, layers in found.items():
            if not layers:
                endings = self.ATTENTION if kind == "attention" else self.FEED_FORWARD
                raise InputError(
                    f"method.placement = {self.placement!r}: adapter.targets match no {kind} "
                    f"output layer; allowed: all-linear, or one that ends in {', '.join(endings)}"
                )
        return sorted(name for layers in found.values() for name in layers)

    def form(self, state: ServerState) -> "Bottleneck":
        return Bottleneck(activation="gelu" if self.placement == "houlsby" else "relu")


@dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """y + Up act(Down y + bias) on the layer's output y; rows [Down_i, bias_i, Up_i]."""

    activation: Literal["gelu", "relu"]
    frozen: tuple[str, ...] = ()
    local: tuple[str, ...] = ()

    def widths(self, shape: Shape) -> dict[str, int]:
        return {"down": shape[0], "bias": 1, "up": shape[0]}

    def forward(self, adapter: Adapter, x: Tensor) -> Tensor:
        act = functional.gelu if self.activation == "gelu" else functional.relu
        parts, y = adapter.parts, adapter.unchanged(x)  # (..., d_out)
        hidden = act(functional.linear(y, parts["down"], parts["bias"].squeeze(1)))  # (..., b)
        return y + functional.linear(hidden, parts["up"].T)

    def pair(self, adapter: Adapter) -> None:
        return None


def ends(name: str, endings: tuple[str, ...]) -> bool:
    """Whether a dotted name equals or ends with one of the dotted endings."""
    return any(f".{name}".endswith(f".{ending}") for ending in endings)
