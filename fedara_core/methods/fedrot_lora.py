"""FedRot-LoRA: "Mitigating Rotational Misalignment in Federated LoRA", arXiv 2602.23638.

Equations: W = W0 + scale B A. For any orthogonal R, (B R)(R^T A) = B A: clients with the same
    change may have unlike factors, and then their means are another change. So before it uploads, a
    client turns its factors towards those that it downloaded: in odd rounds (from 0) by the R that
    minimises ||R^T A_k - A||, in even ones by the R that minimises ||B_k R - B|| (orthogonal
    Procrustes):
    U S V^T = svd(A_k A^T) or svd(B_k^T B),  R = U V^T;  it uploads B_k R and R^T A_k.
    Not in round 0, as all clients start from the same A, and B = 0. Then A and B are averaged
    separately, as in FedIT (arXiv 2305.05644).
Softened by lambda: R' is the orthogonal matrix next to (1 - lambda) I + lambda R.
Up: r (d_in + d_out) floats per adapter, and the head.
Down: the same; in round 0 nothing, as the start is free.
Shapes: A, A_k (r, d_in), B, B_k (d_out, r), R (r, r); row i = [A[i], B[:, i]].
Deviation: means are weighted by num_examples. The head trains and is averaged; it is not turned.
    R may mirror, as in the authors' code without lambda; where lambda is below 1, a mirror image
    gives way to the best proper rotation, as there. The SVD is in float64 (theirs: float32).
    A client that missed rounds turns towards what it downloads now, as every client does.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedara_core.errors import require
from fedara_core.method import Client, Method
from fedara_core.state import ServerState
from fedara_core.wire import Upload


@dataclass(frozen=True, kw_only=True)
class FedRotLora(Method):
    """strength: lambda, how far a client turns its factors; 0 leaves R = I, which is FedIT."""

    coded: ClassVar = ("down", "feedback")
    plain_mean: ClassVar[bool] = True

    strength: float = 1.0

    def __post_init__(self) -> None:
        require(self, "in [0, 1]", "strength")

    def upload(self, client: Client, state: ServerState) -> Upload:
        values = client.sent_values
        if state.round_index:
            aligned = "A" if state.round_index % 2 else "B"
            parts = state.index.parts(values)
            for name, reference in state.parts[aligned].items():
                turn = rotation(parts[aligned][name], reference, self.strength)
                for rows in (parts["A"][name], parts["B"][name]):
                    rows.copy_(turn.T @ rows.double())
        return client.make_upload(values)


def rotation(rows: Tensor, reference: Tensor, strength: float = 1.0) -> Tensor:
    """R (r, r) in float64, for which R^T rows comes next to the reference; both (r, d)."""
    cross = rows.double() @ reference.double().T  # (r, r)
    if strength == 1:
        return nearest_orthogonal(cross)
    eye = torch.eye(len(cross), dtype=cross.dtype)
    return nearest_orthogonal((1 - strength) * eye + strength * nearest_orthogonal(cross, True))


def nearest_orthogonal(matrix: Tensor, proper: bool = False) -> Tensor:
    """The orthogonal matrix next to one (r, r), or the rotation where it has to be a proper one."""
    u, _, vt = torch.linalg.svd(matrix)
    if proper and torch.linalg.det(u @ vt) < 0:
        vt[-1] = -vt[-1]  # of the smallest singular value, where it costs least
    nearest: Tensor = u @ vt
    return nearest
