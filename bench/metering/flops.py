"""FLOPs of local training, counted from shapes and live triplets, with no clock.

A multiplication and its addition are two FLOPs: an (m, k) by (k, n) matmul has 2 m n k. Counted, as
torch's FlopCounterMode does: every matmul of linear layers, adapters and attention. Left out, as
there: embeddings, norms, activations, softmax, the optimiser. Left out too: what a method does
besides the loss on a batch, such as a penalty on its factors (matmuls of r x d, once a step).

The backward pass of a matmul is one more matmul of the same size for each operand that needs a
gradient. An operand needs one if it depends on something that trains, so nothing below the lowest
adapter with a live triplet has a backward pass. Attention is two matmuls forward and four backward
on every device; kernels that compute its scores anew in the backward pass do more.

How: the model without its adapters runs forward once for each of six small batch shapes, and a tape
notes its matmuls and on which parameters and adapters each operand depends. A wrapped layer is put
on tape by itself on the meta device, whatever the form of its rows, once for each number of live
rows; a low-rank change as its paper's plain products, whatever kernel runs them. All counts are
polynomials, of degree 1 in the number of examples n and of degree 2 in their padded length, so that
six shapes give every other one. Texts that follow one another without padding cost less by the part
of degree 1 in their length.
"""

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fedara_core.adapters import AdaptedModel, Adapter, AdapterForm
from fedara_core.prefix import layer_stack
from fedara_core.values import Shape

_NUM_EXAMPLES = (2, 3)  # the grid of shapes; in steps of 1, for `_at`
_LENGTHS = (4, 5, 6)
_OFF_GRID = (5, 9)  # a shape that must lie on the polynomial
_ATEN = torch.ops.aten
_MATMULS = frozenset([_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm])

Counts = tuple[int, int]  # FLOPs of the forward pass, of the backward pass
_Grid = Sequence[Sequence[Counts]]  # by _NUM_EXAMPLES, by _LENGTHS


class Uncountable(ValueError):
    """A model whose FLOPs can not be counted this way; its records have none."""


class BatchShape(NamedTuple):
    """num_tokens: those that layers other than attention see; num_examples * length with padding.

    Attention pads to `length` in any case.
    """

    num_examples: int
    length: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What a local step costs as long as the same parameters train.

    lowest: the first parameter or adapter, in the order of the forward pass, that trains: the
    backward pass ends there; None if nothing trains. num_layers: calls of wrapped linear layers in
    a forward pass; num_backward_layers: how many of them the backward pass reaches.
    """

    lowest: str | None
    num_layers: int
    num_backward_layers: int
    grid: _Grid
    prefix_grid: _Grid  # of the layers that do not run in a step

    def flops(self, num_examples: int, length: int, num_tokens: int | None = None) -> int:
        """FLOPs of one batch, forward and backward. num_tokens: see BatchShape; None: with padding
        to `length`."""
        shape = BatchShape(num_examples, length, num_tokens or num_examples * length)
        return self._at(0, shape) + self._at(1, shape)

    def forward_flops(self, num_examples: int, length: int) -> int:
        """FLOPs of one batch's forward pass, with padding to `length`."""
        return self._at(0, BatchShape(num_examples, length, num_examples * length))

    def total(self, shapes: Iterable[BatchShape]) -> int:
        """FLOPs of the local steps on such batches."""
        return sum(self.flops(*shape) for shape in shapes)

    def prefix_total(self, shapes: Iterable[BatchShape]) -> int:
        """FLOPs of the layers that do not run in a step, on such batches."""
        return sum(self._at(0, shape, self.prefix_grid) for shape in shapes)

    def _at(self, part: int, shape: BatchShape, grid: _Grid | None = None) -> int:
        """Newton's interpolation on the grid, exact in integers; less what padding would cost."""
        i, j = shape.num_examples - _NUM_EXAMPLES[0], shape.length - _LENGTHS[0]
        rows, per_token = [], []
        for counts in self.grid if grid is None else grid:
            f0, f1, f2 = (count[part] for count in counts)
            square = (f2 - 2 * f1 + f0) // 2  # attention's, of length^2
            rows.append(f0 + j * (f1 - f0) + j * (j - 1) * square)
            per_token.append(f1 - f0 - square * (_LENGTHS[0] + _LENGTHS[1]))
        padding = shape.num_examples * shape.length - shape.num_tokens
        of_padding = padding * (per_token[1] - per_token[0])
        return rows[0] + i * (rows[1] - rows[0]) - of_padding


class StepFlops:
    """Counts the local steps of one model, whatever the method and its rank_masks."""

    def __init__(self, model: AdaptedModel) -> None:
        """Trace a model that `inject` has been over: seven forward passes of a few tokens, once.
        The model is not changed, and no generator moves. Raises Uncountable."""
        self._adapters = list(model.adapters.values())
        inside = {id(p) for adapter in self._adapters for p in adapter.parameters()}
        whole = {name: p for name, p in model.module.named_parameters() if id(p) not in inside}
        self._whole = list(whole.values())
        self._names = [*model.adapters, *whole]  # of the sources, in the order of bits
        self._layers: dict[tuple[_Layer, bool], tuple[Counts, Counts]] = {}
        self._costs: dict[tuple[Any, ...], StepCost] = {}
        bits = {id(p): 1 << i for i, p in enumerate(self._whole, len(model.adapters))}
        bare = _without_adapters(model)
        record = partial(_record, bare, bits, len(self._names))
        self._tapes = [[record(n, length) for length in _LENGTHS] for n in _NUM_EXAMPLES]
        self._check(record(*_OFF_GRID))

    def now(self, depth: int = 0) -> StepCost:
        """The cost of a local step on the model as it stands, such as after a download. depth: how
        many layers do not run in it, since their outputs are kept."""
        layers = [_layer(adapter) for adapter in self._adapters]
        trains = [layer.trains for layer in layers] + [p.requires_grad for p in self._whole]
        live = sum(1 << i for i, trained in enumerate(trains) if trained)
        key = (live, depth, *layers)
        if key not in self._costs:
            self._costs[key] = self._cost(live, layers, depth)
        return self._costs[key]

    def _cost(self, live: int, layers: Sequence["_Layer"], depth: int = 0) -> StepCost:
        whole = [[self._count(tape, live, layers) for tape in tapes] for tapes in self._tapes]
        below = [[self._count(tape, live, layers, depth) for tape in ts] for ts in self._tapes]
        grid = [
            [(all_f - f, all_b - b) for (all_f, all_b), (f, b) in zip(*rows, strict=True)]
            for rows in zip(whole, below, strict=True)
        ]
        tape = self._tapes[0][0]
        order = [source for source in tape.order if live & source]
        reached = [c for c in tape.calls if live & (c.depends | c.source) and tape.reaches & c.bit]
        return StepCost(
            lowest=self._names[order[0].bit_length() - 1] if order else None,
            num_layers=len(tape.calls),
            num_backward_layers=len(reached),
            grid=grid,
            prefix_grid=below,
        )

    def _count(
        self, tape: "_Tape", live: int, layers: Sequence["_Layer"], depth: int | None = None
    ) -> Counts:
        """FLOPs of one traced shape if the sources `live` train. depth: of so many layers alone,
        which have no backward pass."""
        matmuls, calls = tape.matmuls, tape.calls
        if depth is not None:
            first, last = (tape.ends[0], tape.ends[depth]) if depth else ((0, 0), (0, 0))
            matmuls, calls = matmuls[first[0] : last[0]], calls[first[1] : last[1]]
        forward = backward = 0
        for matmul in matmuls:
            forward += matmul.flops
            backward += matmul.backward(live, tape.reaches)
        for call in calls:
            one, two = self._layer_counts(call.adapter, layers, bool(live & call.depends))
            more = call.num_rows - 1  # both counts are linear in the rows of x
            forward += one[0] + more * (two[0] - one[0])
            if tape.reaches & call.bit:
                backward += one[1] + more * (two[1] - one[1])
        return forward, backward

    def _layer_counts(
        self, index: int, layers: Sequence["_Layer"], input_needs_gradient: bool
    ) -> tuple[Counts, Counts]:
        """FLOPs of one wrapped layer for x of one row and of two rows."""
        key = (layers[index], input_needs_gradient)
        if key not in self._layers:
            layer = _on_meta(self._adapters[index])
            one, two = (_measure(layer, num_rows, input_needs_gradient) for num_rows in (1, 2))
            self._layers[key] = (one, two)
        return self._layers[key]

    def _check(self, tape: "_Tape") -> None:
        """Raise Uncountable if a shape off the grid is not on the polynomial."""
        layers = [_layer(adapter) for adapter in self._adapters]
        for live in (0, (1 << len(self._names)) - 1):
            expected = self._cost(live, layers).flops(*_OFF_GRID)
            counted = sum(self._count(tape, live, layers))
            if counted != expected:
                raise Uncountable(
                    f"its FLOPs are no polynomial of the batch's shape: {counted} for {_OFF_GRID}, "
                    f"not {expected}"
                )


class _Layer(NamedTuple):
    """All that the FLOPs of a wrapped layer depend on, but for x."""

    form: AdapterForm | None
    shape: Shape
    base: tuple[bool, bool]  # whether weight and bias train
    parts: tuple[tuple[str, torch.Size, bool], ...]  # name, shape, whether it trains
    fixed: tuple[tuple[str, torch.Size], ...]

    @property
    def trains(self) -> bool:
        return any(self.base) or any(trains for _, _, trains in self.parts)


def _layer(adapter: Adapter) -> _Layer:
    weight, bias = adapter.base.weight, adapter.base.bias
    return _Layer(
        form=adapter.form,
        shape=adapter.shape,
        base=(weight.requires_grad, bias is not None and bias.requires_grad),
        parts=tuple((name, p.shape, p.requires_grad) for name, p in adapter.parts.items()),
        fixed=tuple((name, tensor.shape) for name, tensor in adapter.fixed.items()),
    )


def _on_meta(adapter: Adapter) -> Adapter:
    """A copy that has shapes and no data."""
    memo: dict[int, Any] = {}
    for p in adapter.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    for tensor in adapter.fixed.values():
        memo[id(tensor)] = torch.empty_like(tensor, device="meta")
    layer = copy.deepcopy(adapter, memo)
    layer.fused = False
    return layer


def _measure(layer: Adapter, num_rows: int, input_needs_gradient: bool) -> Counts:
    """FLOPs of the layer for x (num_rows, d_in), both counts."""
    tape = _Tape({id(p): 1 for p in layer.parameters() if p.requires_grad}, 1)
    x = torch.empty(num_rows, layer.shape[1], device="meta")
    if input_needs_gradient:
        tape.write(x, 1)
    with torch.no_grad(), tape:
        reaches = tape.bits(layer(x))
    forward = sum(matmul.flops for matmul in tape.matmuls)
    return forward, sum(matmul.backward(1, reaches) for matmul in tape.matmuls)


class _Matmul(NamedTuple):
    flops: int
    operands: tuple[int, int]  # bits of the sources that each depends on
    bit: int

    def backward(self, live: int, reaches: int) -> int:
        """FLOPs of its backward pass if the sources `live` train: a matmul for each gradient."""
        if not reaches & self.bit:
            return 0
        return self.flops * sum(bool(live & mask) for mask in self.operands)


class _Call(NamedTuple):
    """One call of a wrapped layer on x (num_rows, d_in)."""

    adapter: int
    num_rows: int
    depends: int  # bits of the sources that x depends on
    source: int
    bit: int


class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A forward pass: its matmuls, its calls of wrapped layers, and what depends on what.

    Sources (adapters, and parameters outside of them) have a bit each, matmuls and calls as well.
    A tensor's bits say on which of them it depends; `reaches` are those of the model's output.
    """

    def __init__(self, sources: Mapping[int, int], num_sources: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.matmuls: list[_Matmul] = []
        self.calls: list[_Call] = []
        self.order: dict[int, None] = {}  # bits of sources, by first use
        self.ends: list[tuple[int, int]] = []  # matmuls and calls before the layers, after each
        self.reaches = 0
        self._sources = sources  # id of a parameter -> its bit
        self._bits: dict[int, int] = {}  # id of a tensor -> its bits
        self._kept: list[Tensor] = []  # so that no id is used twice
        self._new_bits = (1 << i for i in itertools.count(num_sources))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        bits = 0
        for tensor in inputs:
            bits |= self.bits(tensor)
        if func.overloadpacket in flop_registry:
            if func.overloadpacket not in _MATMULS:
                raise Uncountable(f"there is no rule for the backward pass of {func}")
            flops = flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
            left, right = (self.bits(tensor) for tensor in inputs[-2:])
            self.matmuls.append(_Matmul(flops, (left, right), next(self._new_bits)))
            bits |= self.matmuls[-1].bit
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.write(tensor, bits)
        return out

    def note_place(self, *_: Any) -> None:
        """Note how far the tape is where a layer begins or ends; a hook of both kinds."""
        self.ends.append((len(self.matmuls), len(self.calls)))

    def call(self, adapter: int, x: Tensor, out: Tensor) -> None:
        """Note the call of a wrapped layer on x, with this output."""
        source, num_rows = 1 << adapter, x.numel() // x.shape[-1]
        self.order.setdefault(source)
        self.calls.append(_Call(adapter, num_rows, self.bits(x), source, next(self._new_bits)))
        self.write(out, self.bits(x) | source | self.calls[-1].bit)

    def bits(self, tensor: Tensor) -> int:
        source = self._sources.get(id(tensor))
        if source is None:
            return self._bits.get(id(tensor), 0)
        self.order.setdefault(source)
        return source

    def write(self, tensor: Tensor, bits: int) -> None:
        self._bits[id(tensor)] = self._bits.get(id(tensor), 0) | bits  # what is written in place
        self._kept.append(tensor)


class _Bare(nn.Module):
    """Stands for the wrapped layer with this index: notes its call and gives its output's shape."""

    def __init__(self, index: int, num_outputs: int) -> None:
        super().__init__()
        self.index, self.num_outputs = index, num_outputs
        self.tape: _Tape | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.tape is not None
        out = x.new_zeros(*x.shape[:-1], self.num_outputs)
        self.tape.call(self.index, x, out)
        return out


def _without_adapters(model: AdaptedModel) -> nn.Module:
    """A copy that shares its tensors with the model and has stand-ins for the wrapped layers."""
    module = model.module
    shared = [*module.parameters(), *module.buffers()]
    shared += [tensor for adapter in model.adapters.values() for tensor in adapter.fixed.values()]
    bare = copy.deepcopy(module, {id(tensor): tensor for tensor in shared}).eval()
    for index, (name, adapter) in enumerate(model.adapters.items()):
        parent, _, child = name.rpartition(".")
        setattr(bare.get_submodule(parent), child, _Bare(index, adapter.shape[0]))
    return bare


def _record(
    bare: nn.Module, sources: Mapping[int, int], num_sources: int, num_examples: int, length: int
) -> _Tape:
    """One forward pass. Attention runs as plain matmuls, so that it counts the same everywhere."""
    tape = _Tape(sources, num_sources)
    for module in bare.modules():
        if isinstance(module, _Bare):
            module.tape = tape
    layers = layer_stack(bare)
    hooks = [layer.register_forward_pre_hook(tape.note_place) for layer in layers[:1]]
    hooks += [layer.register_forward_hook(tape.note_place) for layer in layers]
    device = next(bare.parameters()).device
    ids = torch.ones(num_examples, length, dtype=torch.int64, device=device)
    with sdpa_kernel([SDPBackend.MATH]), torch.no_grad(), tape:
        tape.reaches = tape.bits(bare(ids, torch.ones_like(ids)))
    for hook in hooks:
        hook.remove()
    return tape
