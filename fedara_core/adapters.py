"""Adapters: a frozen nn.Linear plus trainable rows, of which only the live ones exist.

Shapes: d_out, d_in of the wrapped layer; r live rows; a row's width depends on its form.
One row is one triplet, triplet axis first, so pruning, sending and receiving are row selection.
A form splits a row into parts (LoRA's A and B), and says which of them do not train. An adapter may
also hold tensors that are no rows and never train, such as a change of W0 from earlier rounds.
"""

from collections.abc import Iterator, Mapping, Sequence
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


@dataclass(frozen=True, kw_only=True)
class _Neighbours:
    """Adapters that follow each other, of one shape and with as many live rows each.

    parts: part -> (all their rows, width), in the layout's memory.
    """

    place: slice  # among the layout's adapters
    form: Form
    shape: Shape
    parts: Mapping[str, Tensor]

    def chosen(self, parts: tuple[str, ...] | None) -> list[Tensor]:
        """These parts (by default those that train), in row order."""
        return [
            tensor
            for part, tensor in self.parts.items()
            if (part not in self.form.frozen if parts is None else part in parts)
        ]


class Layout:
    """The parameters that one `write_rows` made, for the next ones to write into.

    They lie in one piece of memory: as long as the same adapters have as many live rows of the same
    form, a download is one copy of that piece. In it neighbours lie part by part, so that an upload
    takes one call for all of them.
    """

    def __init__(self, adapters: Sequence[Adapter], key: tuple[object, ...], fixed: Fixed) -> None:
        self.adapters = adapters
        self.key = key
        self.fixed = fixed
        self.rows: Rows | None = None  # what `_source` is of
        self.rank_masks: Masks | None = None
        self._parameters = [p for adapter in adapters for p in adapter.parts.values()]
        self._chosen: dict[object, tuple[list[list[Tensor]], list[tuple[int, int]]]] = {}
        device = adapters[0].base.weight.device if adapters else None
        size = sum(parameter.numel() + _LINE for parameter in self._parameters)
        self._memory = torch.zeros(size, device=device)
        self._source: Tensor | None = None  # what a download copies into it
        self._sources: list[dict[str, Tensor]] = []  # each group's parts in it
        self._groups: list[_Neighbours] = []
        self.written_by_itself = False  # an adapter, since
        start = first = 0
        for (shape, num_live, _), alike in groupby(adapters, _likeness):
            group = list(alike)
            parts = {}
            for part, parameter in group[0].parts.items():
                num_rows, width = parameter.shape
                end = start + len(group) * parameter.numel()
                parts[part] = self._memory[start:end].view(-1, width)
                for adapter, own in zip(group, torch.split(parts[part], num_rows), strict=True):
                    adapter.parts[part].data = own.copy_(adapter.parts[part].data)
                start = end + -end % _LINE
            place, form = slice(first, first + len(group)), group[0].form
            first = place.stop
            if form is not None and num_live:  # without live rows zeros stay zeros
                self._groups.append(_Neighbours(place=place, form=form, shape=shape, parts=parts))
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
        """Take each adapter's live rows (r, width) as the parameters' values."""
        if self._source is None:
            self._source = torch.zeros_like(self._memory)
            self._sources = [
                {part: self._in_source(tensor) for part, tensor in group.parts.items()}
                for group in self._groups
            ]
        for group, sources in zip(self._groups, self._sources, strict=True):
            own = live[group.place]
            rows = own[0] if len(own) == 1 else torch.cat(list(own))
            there = rows.to(self._memory.device)  # all of a group's rows in one go
            for part, values in group.form.split(there, group.shape).items():
                sources[part].copy_(values)

    def _in_source(self, tensor: Tensor) -> Tensor:
        """What a download copies into this part of the memory."""
        assert self._source is not None
        place = tensor.shape, tensor.stride(), tensor.storage_offset()
        return self._source.as_strided(*place)

    def copy_in(self) -> None:
        """Give the parameters the values last written, and no gradients."""
        assert self._source is not None
        self._memory.copy_(self._source)
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def copy_out(self, parts: Sequence[str] | None, whole: Sequence[Tensor]) -> Tensor:
        """These parts (by default those that train) of the live rows, and then these parameters:
        (n,) on the CPU."""
        key = None if parts is None else tuple(parts)
        if key not in self._chosen:
            chosen = [tensors for group in self._groups if (tensors := group.chosen(key))]
            shapes = [(len(t[0]), sum(part.shape[1] for part in t)) for t in chosen]
            self._chosen[key] = chosen, shapes
        chosen, shapes = self._chosen[key]
        sizes = [rows * width for rows, width in shapes]
        end = sum(sizes)
        values = torch.empty(end + sum(map(torch.numel, whole)), device=self._memory.device)
        blocks = values[:end].split_with_sizes(sizes)
        for tensors, shape, block in zip(chosen, shapes, blocks, strict=True):
            torch.cat(tensors, dim=1, out=block.view(shape))
        for tensor in whole:
            values[end : end + tensor.numel()] = tensor.reshape(-1)
            end += tensor.numel()
        return values.cpu()


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
        layout.copy_in()
        return
    adapters = list(named_adapters(model))
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
    layout.copy_in()


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


def read_rows(model: nn.Module) -> Rows:
    """The live rows (r_live, width) of each adapter that has any, in name order."""
    return {name: adapter.read() for name, adapter in named_adapters(model) if adapter.num_live}
