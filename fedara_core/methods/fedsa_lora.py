"""FedSA-LoRA: "Selective Aggregation for Low-Rank Adaptation in Federated Learning",
arXiv 2410.01463.

Equations: W_k = W0 + scale B_k A; clients train both; A <- sum_k p_k A_k is shared, B_k stays at
    its client from round to round, from B_k = 0.
Up: r d_in floats per adapter, and the head.
Down: the same; in round 0 nothing, as the start is free.
Shapes: A (r, d_in), B (d_out, r); row i = [A[i], B[:, i]]; a client keeps B^T of all
    adapters as one vector.
Deviation: the head is shared and averaged, so that heads are alike in all methods; the authors'
    code keeps it at the client. Clients may miss rounds: one that never took part has B_k = 0. The
    authors judge each client on its own split of the test data. Here `accuracy` is that of the
    personal models on the common split, each example judged by one client; `client_accuracy_mean`
    is nearer to theirs: each client on test examples drawn by its own mix of labels.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedara_core.adapters import AdaptedModel, LowRank
from fedara_core.method import Client, Method, Size
from fedara_core.state import ServerState
from fedara_core.wire import Upload


@dataclass(frozen=True, kw_only=True)
class FedSaLora(Method):
    """No hyperparameters of its own. B is zero in the server's state for good."""

    stateful: ClassVar[bool] = True
    personal: ClassVar[bool] = True
    coded: ClassVar = ("down", "feedback")
    plain_mean: ClassVar = True

    def form(self, state: ServerState) -> LowRank:
        return LowRank(scale=state.adapter.scale, local=("B",))

    def download(self, model: AdaptedModel, state: ServerState, client: Client | None) -> Size:
        size = super().download(model, state, client)
        if client is not None and "B" in client.kept:
            model.vector[state.index.runs["B"]] = client.kept["B"].to(model.vector.device)
        return size

    def upload(self, client: Client, state: ServerState) -> Upload:
        client.kept["B"] = client.vector[state.index.runs["B"]].to("cpu", copy=True)
        return super().upload(client, state)
