"""Adapters: a frozen nn.Linear plus trainable rows, of which only the live ones exist.

Shapes: d_out, d_in of the wrapped layer; r live rows; a row's width depends on its form.
One row is one triplet, triplet axis first, so pruning, sending and receiving are row selection.
A form splits a row into parts (LoRA's A and B), and says which of them do not train. An adapter may
also hold tensors that are no rows and never train, such as a change of W0 from earlier rounds.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedara_core.errors import InputError

Rows = dict[str, Tensor]  # adapter name -> (r, width) float32
Masks = dict[str, Tensor]  # adapter name -> (r,) bool
Fixed = Mapping[str, Rows]  # part -> adapter name -> tensor that does not train
Shape = tuple[int, int]  # (d_out, d_in)


class Form(Protocol):
    """How rows become a change of a linear layer. A form is a value: two equal forms act alike."""

    @property
    def frozen(self) -> tuple[str, ...]:
        """The parts of a row that do not train."""

    def width(self, shape: Shape) -> int:
        """Floats in one row."""

    def split(self, rows: Tensor, shape: Shape) -> dict[str, Tensor]:
        """Rows (r, width) to named parts, each with r as its first dimension."""

    def forward(self, adapter: "Adapter", x: Tensor) -> Tensor:
        """The layer's output (..., d_out) for x (..., d_in), base layer included."""

    def __hash__(self) -> int: ...

    def pair(self, adapter: "Adapter") -> tuple[Tensor, Tensor] | None:
        """A (r, d_in), B (d_out, r) if the layer is weight + scale B A; None if it is not."""


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """W0 + scale * B A with rows [A_i, B_i], or W0 + scale * B diag(E) A with rows [A_i, E_i, B_i].

    The first is LoRA's form (arXiv 2106.09685, eq. 3), the second AdaLoRA's and FedARA's.
    """

    scale: float
    singular: bool = False
    frozen: tuple[str, ...] = ()

    def width(self, shape: Shape) -> int:
        return shape[0] + shape[1] + int(self.singular)

    def split(self, rows: Tensor, shape: Shape) -> dict[str, Tensor]:
        d_out, d_in = shape
        sizes = {"A": d_in, "E": 1, "B": d_out} if self.singular else {"A": d_in, "B": d_out}
        return dict(zip(sizes, rows.split_with_sizes(list(sizes.values()), dim=1), strict=True))

    def forward(self, adapter: "Adapter", x: Tensor) -> Tensor:
        parts = adapter.parts
        hidden = functional.linear(x, parts["A"])  # (..., r)
        if self.singular:
            hidden = hidden * parts["E"].squeeze(1)
        change = functional.linear(hidden, parts["B"].T) * self.scale
        return functional.linear(x, adapter.weight, adapter.base.bias) + change

    def pair(self, adapter: "Adapter") -> tuple[Tensor, Tensor] | None:
        b = adapter.parts["B"].detach().T  # (d_out, r)
        if self.singular:
            b = b * adapter.parts["E"].detach().T  # (1, r)
        return adapter.parts["A"].detach(), b


def columns(form: Form, shape: Shape, parts: Sequence[str] | None = None) -> Tensor:
    """Columns (n,) of a row that hold these parts (by default those that train), in row order."""
    return _columns(form, shape, None if parts is None else tuple(parts))


@lru_cache(maxsize=1024)
def _columns(form: Form, shape: Shape, parts: tuple[str, ...] | None) -> Tensor:
    places = form.split(torch.arange(form.width(shape))[None], shape)  # part -> (1, part's width)
    chosen = [part for part in places if part not in form.frozen] if parts is None else parts
    return torch.cat([place[0] for part, place in places.items() if part in chosen])


class Adapter(nn.Module):
    """One wrapped linear layer. Without live rows its forward pass is the plain layer's."""

    def __init__(self, name: str, base: nn.Linear) -> None:
        super().__init__()
        self.name = name
        self.base = base
        self.parts = nn.ParameterDict()
        self.fixed: dict[str, Tensor] = {}
        self.form: Form | None = None
        self.num_live = 0
        self.layout: Layout | None = None  # that of the write_rows which last wrote it

    @property
    def shape(self) -> Shape:
        return self.base.out_features, self.base.in_features

    @property
    def weight(self) -> Tensor:
        """The weight that rows change (d_out, d_in): W0, or what `fixed` has in its place."""
        return self.fixed.get("weight", self.base.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.form is None:
            return functional.linear(x, self.weight, self.base.bias)
        return self.form.forward(self, x)

    def write(
        self,
        rows: Tensor,
        form: Form,
        *,
        fixed: Mapping[str, Tensor] | None = None,
        keep_dead: bool = False,
    ) -> None:
        """Replace the live rows by `rows` (r, width), as fresh parameters without gradients.

        `fixed` holds tensors that do not train; "delta" (d_out, d_in) among them is added to W0.
        `keep_dead` leaves an adapter without rows in the forward and backward pass as one row of
        zeros, which never moves (each factor's gradient is a product of the others): the cost of an
        adapter that was masked but not removed.
        """
        device = self.base.weight.device
        if self.layout is not None:
            self.layout.written_by_itself = True
        self.layout = None
        self.num_live = rows.shape[0]
        self.parts.clear()
        self.fixed = {part: t.to(device).contiguous() for part, t in (fixed or {}).items()}
        if "delta" in self.fixed:
            self.fixed["weight"] = self.base.weight.detach() + self.fixed.pop("delta")
        self.form = form if self.num_live or keep_dead else None
        if self.form is None:
            return
        if not self.num_live:
            rows = rows.new_zeros(1, form.width(self.shape))
        for part, values in form.split(rows, self.shape).items():
            copy = values.to(device, copy=True).contiguous()
            self.parts[part] = nn.Parameter(copy, requires_grad=part not in form.frozen)

    def read(self) -> Tensor:
        """The live rows (r, width), on the CPU."""
        parts = [part.detach()[: self.num_live] for part in self.parts.values()]
        return torch.cat(parts, dim=1).cpu()


def inject(model: nn.Module, targets: str | Sequence[str], head: Sequence[str]) -> None:
    """Freeze `model`, then wrap each nn.Linear that `targets` match; the head's parameters train.

    Args:
        model: changed in place.
        targets: "all-linear", or names: a layer matches if its dotted name equals a target or ends
            with "." + target.
        head: names of the parameters of the classification head; always live, never wrapped.

    Raises:
        InputError: a target that matches no layer.
    """
    in_head = {name.rpartition(".")[0] for name in head}
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in in_head
    }
    wanted = ["all-linear"] if targets == "all-linear" else list(targets)
    if isinstance(targets, str) and targets != "all-linear":
        wanted = [targets]
    chosen: set[str] = set()
    for target in wanted:
        found = {
            name
            for name in linear
            if target == "all-linear" or name == target or name.endswith("." + target)
        }
        if not found:
            endings = sorted({name.rpartition(".")[2] for name in linear})
            raise InputError(
                f"adapter.targets: {target!r} matches no linear layer; "
                f"allowed: all-linear, or endings of layer names such as {', '.join(endings)}"
            )
        chosen |= found
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in head)
    for name in chosen:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Adapter(name, linear[name]))
    # Walking the modules costs more than a download; a list of pairs is no submodule.
    model.found_adapters = sorted_adapters(model)  # type: ignore[assignment]
    model.base_parameters = dict(sorted(model.named_parameters()))  # type: ignore[assignment]


def sorted_adapters(model: nn.Module) -> list[tuple[str, Adapter]]:
    """The adapters among a model's modules, in name order."""
    modules = model.named_modules()
    return sorted((name, module) for name, module in modules if isinstance(module, Adapter))


def named_adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Adapters in name order, the one order in which they are ever walked."""
    return iter(getattr(model, "found_adapters", None) or sorted_adapters(model))


def adapter_shapes(model: nn.Module) -> dict[str, Shape]:
    """(d_out, d_in) by adapter name, in name order."""
    return {name: adapter.shape for name, adapter in named_adapters(model)}


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
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

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        lora_rank: int,
        lora_alpha: float,
        client_lora_ranks: Sequence[int],
    ) -> "AdapterConfig":
        """The config for a model that `inject` has been over."""
        return cls(
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            client_lora_ranks=tuple(client_lora_ranks),
            shapes=adapter_shapes(model),
        )


class Layout:
    """The parameters that one `write_rows` made, for the next ones to write into.

    They lie in one piece of memory: as long as the same adapters have as many live rows of the same
    form, a download is one copy of that piece. In it adapters that are alike, neighbours and those
    at the same place of every layer, lie part by part, so that an upload takes one call a part for
    all of them. Parts become rows and rows parts on the CPU by NumPy, which takes a third of the
    time that torch does.
    """

    def __init__(self, adapters: Sequence[Adapter], key: tuple[object, ...], fixed: Fixed) -> None:
        self.adapters = adapters
        self.key = key
        self.fixed = fixed
        self.rows: Rows | None = None  # what `_source` is of
        self.rank_masks: Masks | None = None
        parts = [item for adapter in adapters for item in adapter.parts.items()]
        self._parameters = [parameter for _, parameter in parts]
        self._parts = {part for part, _ in parts}
        self._trained = {part for part, parameter in parts if parameter.requires_grad}
        device = adapters[0].base.weight.device if adapters else None
        size = sum(parameter.numel() + _LINE for parameter in self._parameters)
        self._memory = torch.zeros(size, device=device)
        self._near = self._memory.cpu()  # the memory itself, or as much beside it
        self._source: Tensor | None = None  # what a download copies into it
        # Of alike adapters part -> (layers, their rows in a layer, width), in `_near`.
        self._groups: list[dict[str, np.ndarray]] = []
        self._dead: list[np.ndarray] = []  # the same of those that have no live row
        self.written_by_itself = False  # an adapter, since
        layers = _layers(adapters)
        self._num_layers = len(layers)
        start = 0
        for alike in zip(*layers, strict=True):
            group = [adapter for neighbours in alike for adapter in neighbours]
            arrays = {}
            for part, parameter in group[0].parts.items():
                num_rows, width = parameter.shape
                end = start + len(group) * parameter.numel()
                values = self._memory[start:end].view(-1, width)
                for adapter, own in zip(group, torch.split(values, num_rows), strict=True):
                    adapter.parts[part].data = own.copy_(adapter.parts[part].data)
                arrays[part] = self._near[start:end].view(len(alike), -1, width).numpy()
                start = end + -end % _LINE
            if group[0].num_live:
                self._groups.append(arrays)
            else:
                self._dead += arrays.values()
        for adapter in adapters:
            adapter.layout = self

    def fits(self, key: tuple[object, ...], fixed: Fixed) -> bool:
        """Whether the adapters are still as this layout left them, and are to be so again."""
        return self.key == key and self.fixed is fixed and self.intact

    @property
    def intact(self) -> bool:
        """Whether nobody has written an adapter by itself since, or moved the model."""
        moved = self._parameters and self._parameters[0].data_ptr() != self._memory.data_ptr()
        return not moved and not self.written_by_itself

    def write(self, live: Sequence[Tensor]) -> None:
        """Give the parameters each adapter's live rows (r, width), and no gradients."""
        values = np.concatenate([_NO_VALUE, *(rows.numpy().reshape(-1) for rows in live)])
        for rows, place in self._places(values, self._parts):
            rows[:] = place
        for rows in self._dead:  # which a client that diverged has moved
            rows[:] = 0
        self._memory.copy_(self._near)
        if self._source is None:
            self._source = torch.empty_like(self._memory)
        self._source.copy_(self._memory)
        self._forget_gradients()

    def write_again(self) -> None:
        """Give the parameters what was last written, and no gradients."""
        assert self._source is not None
        self._memory.copy_(self._source)
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def read(self, parts: Sequence[str] | None, whole: Sequence[Tensor]) -> Tensor:
        """These parts (by default those that train) of the live rows, and then these parameters:
        (n,) on the CPU."""
        chosen = self._trained if parts is None else parts
        self._near.copy_(self._memory)
        size = sum(
            rows.size for group in self._groups for part, rows in group.items() if part in chosen
        )
        values = np.empty(size + sum(map(torch.numel, whole)), np.float32)
        for rows, place in self._places(values[:size], chosen):
            place[:] = rows
        for tensor in whole:
            values[size : size + tensor.numel()] = tensor.cpu().numpy().reshape(-1)
            size += tensor.numel()
        return torch.from_numpy(values)

    def _places(
        self, values: np.ndarray, chosen: Container[str]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Each chosen part of each group, in memory and in `values`, which are all chosen parts of
        the live rows in name order: views (layers, rows in a layer, width)."""
        layers = values.reshape(self._num_layers, -1)
        start = 0
        for group in self._groups:
            parts = [rows for part, rows in group.items() if part in chosen]
            num_rows = parts[0].shape[1] if parts else 0
            width = sum(rows.shape[2] for rows in parts)
            end = start + num_rows * width
            place = layers[:, start:end].reshape(self._num_layers, num_rows, width)
            column = 0
            for rows in parts:
                yield rows, place[:, :, column : column + rows.shape[2]]
                column += rows.shape[2]
            start = end
        assert start == layers.shape[1], "rows of another width than their form's"


def _layers(adapters: Sequence[Adapter]) -> list[list[list[Adapter]]]:
    """The adapters in name order, cut into as many layers as there are that are all alike, and each
    of these into neighbours that are alike."""
    groups = [list(alike) for _, alike in groupby(adapters, _likeness)]
    kinds = [(_likeness(group[0]), len(group)) for group in groups]
    for size in range(1, len(groups)):
        if len(groups) % size == 0 and kinds == kinds[:size] * (len(groups) // size):
            return [groups[start : start + size] for start in range(0, len(groups), size)]
    return [groups]


def _likeness(adapter: Adapter) -> tuple[Shape, int, bool]:
    """What neighbours share: shape, live rows, and whether they are in the forward pass."""
    return adapter.shape, adapter.num_live, adapter.form is not None


_LINE = 16  # float32 values of a cache line, where the parts of neighbours start


_NONE: Fixed = {}


def write_rows(
    model: nn.Module,
    rows: Rows,
    rank_masks: Masks,
    form: Form,
    *,
    fixed: Fixed | None = None,
    keep_dead: bool = False,
) -> None:
    """Give each adapter its live rows rows[name][rank_masks[name]]; an unnamed one gets none.

    Neither may be changed afterwards: another call with the same two copies what it copied before.
    """
    fixed = fixed or _NONE
    layout: Layout | None = getattr(model, "layout", None)
    if (
        layout is not None
        and layout.rows is rows
        and layout.rank_masks is rank_masks
        and layout.fits((form, keep_dead, layout.key[2]), fixed)
    ):
        layout.write_again()
        return
    adapters = list(named_adapters(model))
    if layout is not None and layout.rank_masks is rank_masks and layout.intact:
        num_live = {name: adapter.num_live for name, adapter in adapters}
    else:
        num_live = count_live(rank_masks)
    live = [
        _live(rows[name], rank_masks[name], num_live[name]) if name in rows else torch.zeros(0, 1)
        for name, _ in adapters
    ]
    key = (form, keep_dead, tuple(len(values) for values in live))
    if layout is None or not layout.fits(key, fixed):
        for (name, adapter), values in zip(adapters, live, strict=True):
            own = {part: tensors[name] for part, tensors in fixed.items() if name in tensors}
            adapter.write(values, form, fixed=own, keep_dead=keep_dead and name in rows)
        layout = Layout([adapter for _, adapter in adapters], key, fixed)
        model.layout = layout  # type: ignore[assignment]
        return
    layout.write(live)
    layout.rows, layout.rank_masks = rows, rank_masks


def _live(rows: Tensor, rank_mask: Tensor, num_live: int) -> Tensor:
    return rows if num_live == rank_mask.numel() else rows[rank_mask]


def count_live(rank_masks: Masks) -> dict[str, int]:
    """Live rows by adapter, in name order. All at once: one by one takes several times as long."""
    names = sorted(rank_masks)
    masks = [rank_masks[name] for name in names]
    before = np.cumsum(torch.cat([_NO_ROW, *masks]).numpy())  # before each row and in all
    ends = [0, *accumulate(map(torch.numel, masks))]
    return dict(zip(names, np.diff(before[ends]).tolist(), strict=True))


_NO_ROW = torch.zeros(1, dtype=torch.bool)
_NO_VALUE = np.zeros(0, np.float32)


def read_rows(model: nn.Module) -> Rows:
    """The live rows (r_live, width) of each adapter that has any, in name order."""
    return {name: adapter.read() for name, adapter in named_adapters(model) if adapter.num_live}
