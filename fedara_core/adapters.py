"""Adapters: frozen linear layers with trainable rows, and the one vector in which these lie.

Shapes: d_out, d_in of the wrapped layer; r live rows. One row is one triplet. A form divides a row
into parts (LoRA's A and B) and says which of them do not train. An adapter may also hold tensors
that are no rows and never train, such as a change of W0 from earlier rounds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedara_core.errors import InputError
from fedara_core.lowrank import low_rank_linear
from fedara_core.values import EMPTY, Index, Parted, Shape

Fixed = Mapping[str, Mapping[str, Tensor]]  # part -> adapter name -> tensor that does not train
NOTHING_FIXED: Fixed = {}


class AdapterForm(Parted, Protocol):
    """How rows become a change of a linear layer. A form is a value: two equal forms act alike."""

    def forward(self, adapter: "Adapter", x: Tensor) -> Tensor:
        """The layer's output (..., d_out) for x (..., d_in), base layer included."""

    def pair(self, adapter: "Adapter") -> tuple[Tensor, Tensor] | None:
        """A (r, d_in), B (d_out, r) if the layer is weight + scale B A; None if it is not."""

    def __hash__(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """W0 + scale * B A with rows [A_i, B_i], or W0 + scale * B diag(E) A with rows [A_i, E_i, B_i].

    The first is LoRA's form (arXiv 2106.09685, eq. 3), the second AdaLoRA's and FedARA's. Parts:
    A (r, d_in), E (r, 1), B^T (r, d_out). In training A reads through the adapter's dropout.
    """

    scale: float
    singular: bool = False
    frozen: tuple[str, ...] = ()
    local: tuple[str, ...] = ()

    def widths(self, shape: Shape) -> dict[str, int]:
        d_out, d_in = shape
        return {"A": d_in, "E": 1, "B": d_out} if self.singular else {"A": d_in, "B": d_out}

    def forward(self, adapter: "Adapter", x: Tensor) -> Tensor:
        a, b = adapter.parts["A"], adapter.parts["B"]
        if self.singular:
            b = b * adapter.parts["E"]
        if adapter.fuses:
            weight, bias = adapter.weight_for(x), adapter.base.bias
            return low_rank_linear(x, weight, bias, a, b, self.scale)
        change = functional.linear(functional.linear(adapter.dropout(x), a), b.T) * self.scale
        return adapter.unchanged(x) + change

    def pair(self, adapter: "Adapter") -> tuple[Tensor, Tensor] | None:
        b = adapter.parts["B"].detach().T  # (d_out, r)
        if self.singular:
            b = b * adapter.parts["E"].detach().T  # (1, r)
        return adapter.parts["A"].detach(), b


class Adapter(nn.Module):
    """One wrapped linear layer. Without live rows its forward pass is the plain layer's.

    dropout: of the input of a low-rank branch, in training, as PEFT's lora_dropout; W0 reads the
    input itself. fused: whether a form of low rank has products and a backward pass of its own.
    """

    def __init__(
        self, name: str, base: nn.Linear, *, dropout: float = 0.0, fused: bool = False
    ) -> None:
        super().__init__()
        self.name = name
        self.base = base
        self.dropout = nn.Dropout(dropout)
        self.fused = fused
        self._cast: tuple[Tensor, int, Tensor] | None = None  # a weight, its version, and its cast
        self.parts = nn.ParameterDict()  # part -> (r, width), views of the model's vector
        self.fixed: dict[str, Tensor] = {}
        self.form: AdapterForm | None = None
        self.num_live = 0

    @property
    def shape(self) -> Shape:
        return self.base.out_features, self.base.in_features

    @property
    def weight(self) -> Tensor:
        """The weight that rows change (d_out, d_in): W0, or what `fixed` has in its place."""
        return self.fixed.get("weight", self.base.weight)

    @property
    def fuses(self) -> bool:
        """Whether products of low rank are fused now: x is read as it is, and the weight frozen."""
        drops = self.training and self.dropout.p > 0
        return self.fused and not drops and not self.weight.requires_grad

    def weight_for(self, x: Tensor) -> Tensor:
        """`weight` in the dtype of a product with x; it is cast once as long as it is frozen."""
        weight, device = self.weight, x.device.type
        low = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if low else x.dtype
        if weight.dtype == dtype or weight.requires_grad:
            return weight
        known = self._cast
        if known is None or known[0] is not weight or known[1] != weight._version:
            self._cast = known = (weight, weight._version, weight.detach().to(dtype))
        return known[2]

    def unchanged(self, x: Tensor) -> Tensor:
        """The layer's output without its rows."""
        return functional.linear(x, self.weight_for(x), self.base.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.unchanged(x) if self.form is None else self.form.forward(self, x)


class AdaptedModel:
    """A frozen model with adapters; all that trains of it lies in one vector.

    module: the model itself; adapters: its adapters by name, in name order, the one order in which
    they are ever walked; vector (index.size,) float32: adapters' parts and whole parameters are
    views of it; gradient (index.num_trained,): their gradients are views of it; fixed: the tensors
    that it was given besides the vector; above_prefix: gives the logits where layers are not run
    (fedara_core/prefix.py).
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        found = [(name, m) for name, m in module.named_modules() if isinstance(m, Adapter)]
        self.adapters: dict[str, Adapter] = dict(sorted(found, key=lambda item: item[0]))
        self._base = dict(sorted(module.named_parameters()))  # before any row is there
        self.index = EMPTY
        self.vector = torch.zeros(0)
        self.gradient = torch.zeros(0)
        self._layout: tuple[Index, AdapterForm, bool] | None = None
        self.fixed = NOTHING_FIXED
        self.above_prefix: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits (n, num_classes) of a batch: input_ids, attention_mask (n, length), texts (n,)."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if self.above_prefix is None:
            return self.module(ids, mask)  # type: ignore[no-any-return]
        return self.above_prefix(ids, mask, batch["texts"])

    @property
    def whole_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that train outside the adapters, by name: the head's, and more where a
        method says so."""
        return {name: p for name, p in self._base.items() if p.requires_grad}

    @property
    def shapes(self) -> dict[str, Shape]:
        """(d_out, d_in) by adapter, in name order."""
        return {name: adapter.shape for name, adapter in self.adapters.items()}

    def freeze_head(self) -> None:
        """Leave the head as it is: it does not train, and so does not travel."""
        for parameter in self.whole_parameters.values():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def load(
        self,
        vector: Tensor,
        index: Index,
        form: AdapterForm,
        *,
        fixed: Fixed = NOTHING_FIXED,
        keep_dead: bool = False,
    ) -> None:
        """Put a vector (index.size,) into the model.

        fixed: tensors that do not train; "delta" (d_out, d_in) among them is added to W0.
        keep_dead: leave an adapter without live rows in the forward and backward pass, as one row
        of zeros outside the vector: the cost of an adapter that is masked but not removed.
        """
        if self._layout != (index, form, keep_dead):
            self._lay_out(index, form, keep_dead)
        if fixed is not self.fixed:  # a change of W0 is added once a round, not once a client
            self._fix(fixed)
        self.vector.copy_(vector)

    def _lay_out(self, index: Index, form: AdapterForm, keep_dead: bool) -> None:
        """Make parts and whole parameters views of a new vector."""
        device = next(iter(self._base.values())).device
        self.vector = torch.zeros(index.size, device=device)
        self.gradient = torch.zeros(index.num_trained, device=device)
        for adapter in self.adapters.values():
            adapter.parts.clear()
            adapter.form, adapter.num_live = None, 0
        for piece in index.pieces:
            trains = piece.start < index.num_trained
            if piece.part:
                parameter = nn.Parameter(piece.of(self.vector), requires_grad=trains)
                adapter = self.adapters[piece.name]
                adapter.parts[piece.part] = parameter
                adapter.form, adapter.num_live = form, piece.shape[0]
            else:
                parameter = self._base[piece.name]
                parameter.data = piece.of(self.vector)
            if trains:
                parameter.grad = piece.of(self.gradient)
        for adapter in self.adapters.values() if keep_dead else ():
            if adapter.form is None:
                adapter.form = form
                for part, width in form.widths(adapter.shape).items():
                    adapter.parts[part] = nn.Parameter(torch.zeros(1, width, device=device))
        self.index, self._layout = index, (index, form, keep_dead)

    def _fix(self, fixed: Fixed) -> None:
        """Give each adapter its tensors that do not train."""
        for name, adapter in self.adapters.items():
            own = {part: tensors[name] for part, tensors in fixed.items() if name in tensors}
            adapter.fixed = {part: t.to(adapter.base.weight.device) for part, t in own.items()}
            if "delta" in adapter.fixed:
                delta = adapter.fixed.pop("delta")
                adapter.fixed["weight"] = adapter.base.weight.detach() + delta
        self.fixed = fixed


def inject(
    module: nn.Module,
    targets: str | Sequence[str],
    head: Sequence[str],
    *,
    dropout: float = 0.0,
    fused: bool = False,
) -> AdaptedModel:
    """Freeze a model, then wrap each nn.Linear that `targets` match; the head's parameters train.

    Args:
        module: changed in place.
        targets: "all-linear", or names: a layer matches if its dotted name equals a target or ends
            with "." + target.
        head: names of the parameters of the classification head; always live, never wrapped.
        dropout, fused: see Adapter.

    Raises:
        InputError: a target that matches no layer.
    """
    in_head = {name.rpartition(".")[0] for name in head}
    linear = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and name not in in_head
    }
    wanted = [targets] if isinstance(targets, str) else list(targets)
    chosen: set[str] = set()
    for target in wanted:
        found = {
            name
            for name in linear
            if target == "all-linear" or name == target or name.endswith("." + target)
        }
        if not found:
            raise _no_layer(target, module, linear)
        chosen |= found
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in head)
    for name in chosen:
        adapter = Adapter(name, linear[name], dropout=dropout, fused=fused)
        module.set_submodule(name, adapter)
    return AdaptedModel(module)


def _no_layer(target: str, module: nn.Module, linear: Mapping[str, nn.Module]) -> InputError:
    """The error of a target that matches none of the linear layers."""
    endings = sorted({name.rpartition(".")[2] for name in linear})
    if endings:
        return InputError(
            f"adapter.targets: {target!r} matches no linear layer; "
            f"allowed: all-linear, or endings of layer names such as {', '.join(endings)}"
        )
    kinds = sorted({type(m).__name__ for m in module.modules() if [*m.parameters(recurse=False)]})
    return InputError(
        f"adapter.targets: {target!r} matches no linear layer: but for its head, the model has no "
        f"nn.Linear, only {', '.join(kinds)}; allowed: models with linear layers"
    )


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """What the methods of a comparison share. scale = lora_alpha / lora_rank, for good.

    client_lora_ranks: the lora_rank that each client can afford, by client_id; at most lora_rank.
    """

    lora_rank: int
    lora_alpha: float
    client_lora_ranks: tuple[int, ...]
    shapes: Mapping[str, Shape]  # adapter name -> (d_out, d_in), in name order

    def __post_init__(self) -> None:
        for name, shape in self.shapes.items():
            if self.lora_rank > min(shape):
                raise InputError(
                    f"adapter.lora_rank = {self.lora_rank} is larger than layer {name} "
                    f"({shape[0]} x {shape[1]}); allowed: 1 to {min(shape)}"
                )

    @property
    def scale(self) -> float:
        return self.lora_alpha / self.lora_rank
