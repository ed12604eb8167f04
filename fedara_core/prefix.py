"""The frozen prefix: layers below the lowest one that trains, run once for each text.

Where nothing trains and nothing is dropped out, a text gives the same hidden states in every pass.
They are kept, and later passes start above these layers. A text's states are computed for it alone,
so that their bits depend neither on its batch nor on what is kept.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedara_core.adapters import NOTHING_FIXED, AdaptedModel, Adapter, Fixed
from fedara_core.errors import InputError

_ERROR = 1e-4  # of the largest logit


class FrozenPrefix:
    """Hidden states (length, d) of texts after the first `depth` of the model's `layers`."""

    def __init__(self, model: AdaptedModel, max_bytes: int) -> None:
        """model: one that reads packed texts. max_bytes: of the kept states; those that were not
        used for the longest time go. Raises InputError if the model can not start in its middle."""
        self.layers = layer_stack(model.module)
        self.depth = 0
        self._model, self._max_bytes = model, max_bytes
        self._kept: OrderedDict[int, Tensor] = OrderedDict()
        self._num_bytes = 0
        self._fixed: Fixed = NOTHING_FIXED  # with which they were computed
        self._served: Tensor | None = None  # what the prefix gives, where it does not run
        self._stops = False  # whether a forward pass ends after the prefix
        self._gives_tuples = False
        for number, layer in enumerate(self.layers):
            layer.forward = partial(self._run, number, layer.forward)
        self._check()
        model.above_prefix = self.logits

    def logits(self, input_ids: Tensor, attention_mask: Tensor, texts: Tensor) -> Tensor:
        """Logits (n, num_classes) of a batch (n, length). texts (n,): each one's own number."""
        if self.settle() == 0:
            return self._model.module(input_ids, attention_mask)  # type: ignore[no-any-return]
        numbers = texts.tolist()
        for row, number in enumerate(numbers):
            if number not in self._kept:
                length = int(attention_mask[row].sum())
                one = slice(row, row + 1)
                states = self._states(input_ids[one, :length], attention_mask[one, :length])
                self._kept[number] = states
                self._num_bytes += states.nbytes
            self._kept.move_to_end(number)
        states = torch.cat([self._kept[number] for number in numbers])  # (T, d)
        while self._num_bytes > self._max_bytes:
            self._num_bytes -= self._kept.popitem(last=False)[1].nbytes
        return self._above(states, input_ids, attention_mask)

    def settle(self) -> int:
        """Find out what is frozen now, and forget the states of other layers and of other weights;
        returns the depth."""
        depth = frozen_depth(self._model, self.layers)
        if depth != self.depth or self._model.fixed is not self._fixed:
            self._kept.clear()
            self._num_bytes = 0
            self.depth, self._fixed = depth, self._model.fixed
        return depth

    @torch.no_grad()
    def _states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """States (length, d) of one text, (1, length), in the precision of the products."""
        module, device = self._model.module, input_ids.device.type
        in_training = module.training
        self._stops = True
        module.eval()
        try:
            module(input_ids, attention_mask)
        except _ReachedError as reached:
            low = torch.is_autocast_enabled(device)
            return reached.states[0].to(torch.get_autocast_dtype(device) if low else torch.float32)
        finally:
            self._stops = False
            module.train(in_training)
        raise AssertionError("no layer of the prefix ran")

    def _above(self, states: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits from the states (T, d) of a batch."""
        self._served = states[None].float()
        try:
            return self._model.module(input_ids, attention_mask)  # type: ignore[no-any-return]
        finally:
            self._served = None

    def _run(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of a layer's forward pass."""
        if self._served is not None and number < self.depth:
            before = args[0] if args else kwargs["hidden_states"]
            states = self._served if number == self.depth - 1 else before
            return (states,) if self._gives_tuples else states
        out = forward(*args, **kwargs)
        self._gives_tuples = isinstance(out, tuple)
        if self._stops and number == self.depth - 1:
            raise _ReachedError(out[0] if self._gives_tuples else out)
        return out

    @torch.no_grad()
    def _check(self) -> None:
        """Raise InputError unless all layers' states give the logits that the layers give."""
        device = next(self._model.module.parameters()).device
        ids = torch.arange(7, device=device)[None]
        mask = torch.ones_like(ids)
        in_training = self._model.module.training
        self._model.module.eval()
        plain = self._model.module(ids, mask)
        self.depth = len(self.layers)
        try:
            ours = self._above(self._states(ids, mask), ids, mask)
            alike = bool((ours - plain).abs().max() <= _ERROR * plain.abs().max())
        except Exception:  # each architecture has its own
            alike = False
        self.depth = 0
        self._model.module.train(in_training)
        if not alike:
            raise InputError(
                "train.frozen_prefix = 'cache': the model's layers are more than a stack of "
                f"{len(self.layers)}, it can not start in their middle; allowed: recompute"
            )


class _ReachedError(Exception):
    """Ends a forward pass after the prefix."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states  # (1, T, d)


def layer_stack(module: nn.Module) -> list[nn.Module]:
    """The model's layers: its largest list of modules of one kind."""
    stacks = [list(found) for found in module.modules() if isinstance(found, nn.ModuleList)]
    alike = [stack for stack in stacks if len({type(layer) for layer in stack}) == 1]
    return max(alike, key=lambda stack: sum(map(_num_parameters, stack)), default=[])


def frozen_depth(model: AdaptedModel, layers: Sequence[nn.Module]) -> int:
    """How many of the model's first layers lie below all that trains."""
    inside = {id(module) for layer in layers for module in layer.modules()}
    above = False
    for module in model.module.modules():  # in the order in which a model is written down
        above = above or (id(module) in inside)
        if not above and _trains(module):
            return 0
    return next((i for i, layer in enumerate(layers) if _any_trains(layer)), len(layers))


def _any_trains(layer: nn.Module) -> bool:
    return any(map(_trains, layer.modules()))


def _trains(module: nn.Module) -> bool:
    """Whether a module, its inner ones aside, has live rows or parameters that train."""
    if isinstance(module, Adapter) and module.form is not None:
        return True
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
