"""FedEx-LoRA: the residual makes FedIT's average exact, the right way round, at its price."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import nn

from bench.models.encoders import build_model
from bench.run.clients import draw_cohort
from fedara_core.adapters import AdapterSpec, inject
from fedara_core.merge.received import Received
from fedara_core.method import load_method
from fedara_core.methods.fedex_lora import FedExLora
from fedara_core.state import ServerState, Start
from fedara_core.wire import Upload, make_upload
from support.rounds import make_tiny_job, play_rounds, train_one_client

ROW_FLOATS = 8 * (32 + 32) + 4 * (64 + 32)  # one row of every adapter of tiny.toml's model
DENSE = 8 * 32 * 32 + 4 * 64 * 32
NUM_HEAD = 4 * 32 + 4
FEDEX = "method.name=fedex_lora"
SHAPES = {"a": (3, 5), "b": (4, 4)}


def small_state() -> ServerState:
    """Adapters "a" (3 x 5) and "b" (4 x 4), two triplets each, scale 3; a head of three."""
    layers = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Linear(4, 4), "head": nn.Linear(2, 1)})
    model = inject(layers, ["a", "b"], ["head.weight", "head.bias"])
    adapter = AdapterSpec(
        lora_rank=2, lora_alpha=6.0, client_lora_ranks=(2,) * 5, shapes=model.shapes
    )
    return FedExLora().init(Start(model=model, adapter=adapter, seed=0, num_rounds=4))


def upload_of(client_id: int, num_examples: int, values: torch.Tensor) -> Upload:
    return make_upload(
        client_id=client_id, num_examples=num_examples, train_loss=0.0, values=values
    )


def small_upload(client_id: int, num_examples: int, draw: int = 0) -> Upload:
    generator = torch.Generator().manual_seed(100 * draw + client_id)
    return upload_of(client_id, num_examples, torch.randn(2 * 16 + 3, generator=generator))


def products(
    upload: Upload, shapes: Mapping[str, tuple[int, int]], lora_rank: int
) -> dict[str, np.ndarray]:
    """B_k A_k of each adapter, dense (d_out, d_in); the upload has all A, then all B^T."""
    widths = [d_in for _, d_in in shapes.values()] + [d_out for d_out, _ in shapes.values()]
    ends = np.cumsum([lora_rank * width for width in widths])
    *factors, _ = np.split(upload.values.double().numpy(), ends)
    rows = [own.reshape(lora_rank, width) for own, width in zip(factors, widths, strict=True)]
    a, b = rows[: len(shapes)], rows[len(shapes) :]
    return {name: b[i].T @ a[i] for i, name in enumerate(shapes)}


def mean_of_products(state: ServerState, uploads: Sequence[Upload]) -> dict[str, np.ndarray]:
    """sum_k p_k scale B_k A_k of each adapter."""
    total, adapter = sum(upload.num_examples for upload in uploads), state.adapter
    dense = {name: np.zeros(shape) for name, shape in adapter.shapes.items()}
    for upload in uploads:
        for name, product in products(upload, adapter.shapes, adapter.lora_rank).items():
            dense[name] += upload.num_examples / total * adapter.scale * product
    return dense


def change(state: ServerState, name: str) -> np.ndarray:
    """What the state's model adds to W0: delta + scale B A."""
    a, b = (state.parts[part][name].double().numpy() for part in "AB")
    delta = state.fixed["delta"][name].double().numpy()
    return delta + state.adapter.scale * b.T @ a


# ---- aggregation ----


def test_the_model_is_the_exact_mean_of_the_clients() -> None:
    """mean_k of W0 + delta + scale B_k A_k, over two rounds, on a non-square and a square layer."""
    state = small_state()
    for draw, clients in enumerate([(0, 1, 2), (1, 3)]):
        uploads = [small_upload(k, 1 + 3 * k, draw) for k in clients]
        expected = mean_of_products(state, uploads)
        before, state = state, FedExLora().aggregate(state, Received.of(uploads))
        for name in SHAPES:
            mean = before.fixed["delta"][name].double().numpy() + expected[name]
            np.testing.assert_allclose(change(state, name), mean, atol=1e-5)
            assert state.fixed["delta"][name].dtype == torch.float32
            residual = (state.fixed["delta"][name] - before.fixed["delta"][name]).numpy()
            assert np.abs(residual).max() > 0.5  # the plain average would be off
            if name == "b":
                assert np.abs(residual - residual.T).max() > 0.5
    assert state.extra["stacked_rows"].tolist() == [3 * 2, 2 * 2, 0, 0]


def test_the_residual_is_not_transposed() -> None:
    """Square layer "b"; client 0: B = 2 e_0, A = 2 e_1; client 1: zeros. Means e_0, e_1.

    mean(B A) - mean(B) mean(A) = 2 e_0 e_1^T - e_0 e_1^T, times scale 3.
    """
    values = torch.zeros(35)  # A of "a" (2, 5) and "b" (2, 4), B^T of them (2, 3), (2, 4), head
    values[10 + 1] = values[10 + 8 + 6] = 2.0
    uploads = [upload_of(0, 1, values), upload_of(1, 1, torch.zeros(35))]
    after = FedExLora().aggregate(small_state(), Received.of(uploads))
    expected = torch.zeros(4, 4)
    expected[0, 1] = 3.0
    assert torch.equal(after.fixed["delta"]["b"], expected)
    assert not after.fixed["delta"]["a"].any()


def test_the_averages_are_fedits() -> None:
    state, uploads = small_state(), [small_upload(k, 1 + k) for k in range(3)]
    ours = FedExLora().aggregate(state, Received.of(uploads))
    theirs = load_method("lora")().aggregate(state, Received.of(uploads))
    assert ours.index == theirs.index
    assert torch.equal(ours.vector, theirs.vector)


def test_the_residual_has_the_factors_that_are_counted() -> None:
    """[B_k] (d_out, K r) times [p_k (A_k - mean A)] (K r, d_in), so K r (d_in + d_out) floats."""
    state, uploads = small_state(), [small_upload(k, 1 + k) for k in range(2)]
    after = FedExLora().aggregate(state, Received.of(uploads))
    mean_a = after.parts["A"]["a"].double()
    sent = [state.index.parts(upload.values.double()) for upload in uploads]
    left = torch.cat([own["B"]["a"].T for own in sent], dim=1)
    right = torch.cat([p / 3 * (own["A"]["a"] - mean_a) for p, own in enumerate(sent, 1)])
    assert left.shape[1] == right.shape[0] == after.extra["stacked_rows"][0] == 4
    residual = after.fixed["delta"]["a"].double()
    torch.testing.assert_close(3.0 * left @ right, residual, rtol=0, atol=1e-5)


def test_the_servers_model_computes_the_mean() -> None:
    """The plain model with W0 + delta + mean_k scale B_k A_k gives the same logits."""
    job = make_tiny_job(FEDEX, "adapter.lora_alpha=6.0", "train.lr=2e-2")
    state = play_rounds(job, num_rounds=1)[-1].after
    uploads = [train_one_client(job, state, client_id) for client_id in draw_cohort(job, 1)]
    after = job.method.aggregate(state, Received.of(uploads))
    plain = build_model(job.config.model, num_classes=4, seed=job.config.seed).model.eval()
    batch = job.evaluated.batch(torch.arange(20), job.device)
    with torch.no_grad():
        for name, mean in mean_of_products(state, uploads).items():
            plain.get_submodule(name).weight += state.fixed["delta"][name]
            plain.get_submodule(name).weight += torch.from_numpy(mean).float()
        for name, tensor in after.whole.items():
            plain.get_parameter(name).copy_(tensor)
        job.method.download(job.model, after, None)
        job.model.module.eval()
        ours, theirs = (
            m(batch["input_ids"], batch["attention_mask"]) for m in (job.model.module, plain)
        )
    assert max(t.abs().max() for t in after.fixed["delta"].values()) > 1e-4
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_one_client_is_lora() -> None:
    """Bit for bit: there is no residual. The bytes of its factors are counted all the same."""
    common = ("federation.num_clients=1", "federation.cohort=1", "adapter.lora_alpha=6.0")
    ours = play_rounds(make_tiny_job(FEDEX, *common))[-1]
    theirs = play_rounds(make_tiny_job("method.name=lora", *common))[-1]
    assert all(not delta.any() for delta in ours.after.fixed["delta"].values())
    assert ours.after.index == theirs.after.index
    assert torch.equal(ours.after.vector, theirs.after.vector)
    assert ours.row["accuracy"] == theirs.row["accuracy"]
    assert ours.row["uplink_bytes"] == theirs.row["uplink_bytes"]


# ---- bytes ----


@pytest.mark.parametrize("cohort", [1, 2, 3])
def test_bytes_of_a_run(cohort: int) -> None:
    """Up the pair; down the averaged pair and the residuals since the client's last round."""
    job = make_tiny_job(
        *(FEDEX, f"federation.cohort={cohort}", "federation.num_clients=4"),
        *("train.local_steps=1", "adapter.lora_rank=2"),
    )
    shapes, took_part = job.model.shapes, {}
    kinds = set()
    for round_index, played in enumerate(play_rounds(job)):
        down = 0
        for client_id in played.row["cohort"]:
            num_rows = (round_index - took_part.get(client_id, 0)) * cohort * 2
            missed = sum(min(num_rows * (m + n), m * n) for m, n in shapes.values())
            down += 24 + 4 * (2 * ROW_FLOATS + missed + NUM_HEAD if round_index else 0)
            kinds.add((client_id in took_part, missed > 0))
            took_part[client_id] = round_index
        assert played.row["uplink_bytes"] == cohort * (24 + 4 * (2 * ROW_FLOATS + NUM_HEAD))
        assert played.row["downlink_bytes"] == down
    assert {(False, False), (False, True), (True, True)} <= kinds


def test_bytes_where_all_take_part() -> None:
    """r rows of the average and K r of the last residual; with eight clients the dense change."""
    for num_clients, residual in ((3, 3 * 4 * ROW_FLOATS), (8, DENSE)):
        job = make_tiny_job(
            *(FEDEX, f"federation.num_clients={num_clients}", f"federation.cohort={num_clients}"),
            *("train.local_steps=1", "federation.num_rounds=3"),
        )
        first = 24 + 4 * (4 * ROW_FLOATS + NUM_HEAD)
        expected = [num_clients * 24] + [num_clients * (first + 4 * residual)] * 2
        assert [played.row["downlink_bytes"] for played in play_rounds(job)] == expected
