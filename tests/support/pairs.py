"""LoRA's pairs A (r, d_in), B (d_out, r), read without the index's help where they are sent."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedara_core.adapters import AdaptedModel
from fedara_core.state import ServerState
from fedara_core.values import Parts, Shape, Tensors


def sent_pairs(
    values: Tensor, lora_rank: int, shapes: Mapping[str, Shape]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The pairs of an upload in float64: it holds all A, then all B transposed, then the rest."""
    sizes = [lora_rank * d_in for _, d_in in shapes.values()]
    sizes += [lora_rank * d_out for d_out, _ in shapes.values()]
    *flat, _ = np.split(values.double().numpy(), np.cumsum(sizes))
    rows = [each.reshape(lora_rank, -1) for each in flat]
    halves = zip(rows[: len(shapes)], rows[len(shapes) :], strict=True)
    return {name: (a, b.T) for name, (a, b) in zip(shapes, halves, strict=True)}


def pair(parts: Parts, name: str) -> tuple[np.ndarray, np.ndarray]:
    """One adapter's pair in float64."""
    return parts["A"][name].double().numpy(), parts["B"][name].double().numpy().T


def update(parts: Parts, name: str, scale: float) -> Tensor:
    """scale B A (d_out, d_in) of one adapter, in float64."""
    return scale * parts["B"][name].double().T @ parts["A"][name].double()


def model_parts(model: AdaptedModel) -> dict[str, Tensors]:
    """A copy of the rows that the model has."""
    return model.index.parts(model.vector.clone())


def with_random_rows(state: ServerState, seed: int) -> ServerState:
    """The state with normal rows; the whole parameters stay."""
    drawn = torch.randn(state.vector.shape, generator=torch.Generator().manual_seed(seed))
    whole = state.index.runs.get("", slice(0, 0))
    drawn[whole] = state.vector[whole]
    return replace(state, vector=drawn)
