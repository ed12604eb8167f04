"""Low-rank factors: how they start, and exact sums and truncations of their products.

Shapes: A (r, d_in), B (d_out, r), E (r,). Rows hold B transposed: parts A (r, d_in), E (r, 1),
B (r, d_out).
"""

import torch
from torch import Tensor

from fedara_core.adapters import AdaptedModel, AdapterSpec
from fedara_core.seeds import generator
from fedara_core.values import Tensors


def lora_parts(adapter: AdapterSpec, seed: int) -> dict[str, Tensors]:
    """LoRA's start (arXiv 2106.09685, section 4.1): A uniform in +-1/sqrt(d_in), B = 0.

    The bound is Kaiming's with a = sqrt 5, as in the LoRA reference code.
    """
    parts: dict[str, Tensors] = {"A": {}, "B": {}}
    for index, (name, (d_out, d_in)) in enumerate(adapter.shapes.items()):
        bound, draw = d_in**-0.5, generator(seed, "init", index)
        parts["A"][name] = torch.empty(adapter.lora_rank, d_in).uniform_(
            -bound, bound, generator=draw
        )
        parts["B"][name] = torch.zeros(adapter.lora_rank, d_out)
    return parts


def svd_parts(adapter: AdapterSpec, seed: int, std: float) -> dict[str, Tensors]:
    """AdaLoRA's start (arXiv 2303.10512): A and B Gaussian of deviation `std`, E = 0."""
    parts: dict[str, Tensors] = {"A": {}, "E": {}, "B": {}}
    for index, (name, (d_out, d_in)) in enumerate(adapter.shapes.items()):
        drawn = torch.empty(adapter.lora_rank, d_in + 1 + d_out)
        drawn.normal_(0, std, generator=generator(seed, "init", index))
        a, e, b = torch.split(drawn, [d_in, 1, d_out], dim=1)
        parts["A"][name], parts["E"][name], parts["B"][name] = a, torch.zeros_like(e), b
    return parts


def signed_svd(matrix: Tensor, lora_rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first triplets of an SVD in float64: U (m, r), S (r,), V^T (r, n).

    Signs are fixed (the largest entry of each left vector is positive), so that they do not depend
    on the linear algebra library.
    """
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return _with_signs(u[:, :lora_rank], s[:lora_rank], vt[:lora_rank])


def _with_signs(u: Tensor, s: Tensor, vt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    largest = u.gather(0, u.abs().argmax(dim=0, keepdim=True))  # (1, r)
    signs = torch.where(largest < 0, -1.0, 1.0).double()
    return u * signs, s, vt * signs.T


def truncated_product(left: Tensor, right: Tensor, lora_rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of left (d_out, m) right (m, d_in), cut to lora_rank triplets, as `signed_svd` gives.

    Through QR of both and the SVD of the small core, so d_out x d_in is never formed for small m.
    """
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().T)
    u, s, vt = signed_svd(r_left @ r_right.T, lora_rank)
    return _with_signs(q_left @ u, s, vt @ q_right.T)


def put_product(a: Tensor, b: Tensor, left: Tensor, right: Tensor) -> None:
    """Make A (r, d_in), B^T (r, d_out) the best pair of left^T right, in place: A = V^T, B = U S.

    left (m, d_out), right (m, d_in). For m < r the other triplets keep their A, with B = 0, so that
    they can train.
    """
    u, s, vt = truncated_product(left.T, right, len(a))
    a[: len(s)] = vt.float()
    b.zero_()
    b[: len(s)] = (u * s).T.float()


def orthogonality_penalty(model: AdaptedModel) -> Tensor:
    """Sum over adapters of ||A A^T - I||_F^2 + ||B^T B - I||_F^2 (arXiv 2303.10512, eq. 4)."""
    penalties = [gap.square().sum() for gap in orthogonality_gaps(model)]
    return torch.stack(penalties).sum() if penalties else torch.zeros((), requires_grad=True)


def orthogonality_gaps(model: AdaptedModel) -> list[Tensor]:
    """A A^T - I and B^T B - I (r, r) of every adapter that has live triplets, in name order."""
    gaps = []
    for adapter in model.adapters.values():
        for part in ("A", "B") if adapter.num_live else ():
            factor = adapter.parts[part]  # (r, d_in) or (r, d_out)
            gaps.append(factor @ factor.T - torch.eye(len(factor), device=factor.device))
    return gaps
