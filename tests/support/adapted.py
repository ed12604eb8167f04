"""Small adapted models of tests, and rows written as one: [A_i, B_i], or [A_i, E_i, B_i]."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedara_core.adapters import AdaptedModel, AdapterForm
from fedara_core.values import Parts, Shape, Tensors, make_index


def join_rows(parts: Parts) -> Tensors:
    """Each adapter's live rows (r_live, width), their parts side by side."""
    names = next(iter(parts.values()), {})
    return {name: torch.cat([own[name] for own in parts.values()], dim=1) for name in names}


def split_rows(
    rows: Mapping[str, Tensor], form: AdapterForm, shapes: Mapping[str, Shape]
) -> dict[str, Tensors]:
    """Inverse of `join_rows`."""
    parts: dict[str, Tensors] = {}
    for name, own in rows.items():
        widths = form.widths(shapes[name])
        pieces = torch.split(own, list(widths.values()), dim=1)
        for part, piece in zip(widths, pieces, strict=True):
            parts.setdefault(part, {})[name] = piece
    return parts


def load_rows(
    model: AdaptedModel, rows: Mapping[str, Tensor], form: AdapterForm, *, keep_dead: bool = False
) -> None:
    """Put rows (r_live, width) into the adapters; whole parameters stay as they are."""
    whole = {name: p.detach().clone() for name, p in model.whole_parameters.items()}
    num_live = {name: len(own) for name, own in rows.items()}
    whole_shapes = {name: tuple(tensor.shape) for name, tensor in whole.items()}
    index = make_index(form, model.shapes, num_live, whole_shapes)
    vector = index.pack(split_rows(rows, form, model.shapes), whole)
    model.load(vector, index, form, keep_dead=keep_dead)
