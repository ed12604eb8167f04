"""FlexLoRA: the server's truncated SVD against numpy on dense matrices, and what travels."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import nn

from bench.models.encoders import build_model
from bench.run.clients import draw_cohort
from fedara_core.adapters import AdapterSpec, LowRank, inject
from fedara_core.merge.received import Received
from fedara_core.method import Client
from fedara_core.methods.flexlora import FlexLora
from fedara_core.state import ServerState, Start
from fedara_core.wire import Upload, make_upload
from support.pairs import model_parts, pair, sent_pairs, with_random_rows
from support.rounds import (
    check_bytes_of_own_ranks,
    make_tiny_job,
    play_rounds,
    received,
    train_one_client,
)

ROW_FLOATS = 8 * (32 + 32) + 4 * (64 + 32)  # one row of every adapter of tiny.toml's model
NUM_HEAD = 4 * 32 + 4
FLEXLORA = "method.name=flexlora"
UNEQUAL = "adapter.client_lora_ranks=[{lora_rank=1, share=0.5}, {lora_rank=4, share=0.5}]"
SHAPES = {"a": (3, 5), "b": (4, 4)}


def small_state(client_lora_ranks: Sequence[int]) -> ServerState:
    """Adapters "a" (3 x 5) and "b" (4 x 4), two random triplets each, scale 3; a head of three."""
    module = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Linear(4, 4), "head": nn.Linear(2, 1)})
    model = inject(module, ["a", "b"], ["head.weight", "head.bias"])
    adapter = AdapterSpec(
        lora_rank=2,
        lora_alpha=6.0,
        client_lora_ranks=tuple(client_lora_ranks),
        shapes=model.shapes,
    )
    start = Start(model=model, adapter=adapter, seed=0, num_rounds=4)
    return with_random_rows(FlexLora().init(start), seed=5)


def small_upload(client_id: int, num_examples: int, client_lora_rank: int) -> Upload:
    values = torch.randn(
        client_lora_rank * (8 + 8) + 3, generator=torch.Generator().manual_seed(client_id)
    )
    return make_upload(
        client_id=client_id, num_examples=num_examples, train_loss=0.0, values=values
    )


def mean_of_products(
    uploads: Sequence[Upload],
    client_lora_ranks: Sequence[int],
    shapes: Mapping[str, tuple[int, int]],
    scale: float,
) -> dict[str, np.ndarray]:
    """sum_k p_k scale B_k A_k of each adapter, dense (d_out, d_in)."""
    total = sum(upload.num_examples for upload in uploads)
    dense = {name: np.zeros(shape) for name, shape in shapes.items()}
    for upload in uploads:
        share = upload.num_examples / total
        pairs = sent_pairs(upload.values, client_lora_ranks[upload.client_id], shapes)
        for name, (a, b) in pairs.items():
            dense[name] += share * scale * b @ a
    return dense


def best(dense: np.ndarray, lora_rank: int) -> np.ndarray:
    """The best approximation of that rank (Eckart-Young)."""
    u, s, vt = np.linalg.svd(dense)
    return (u[:, :lora_rank] * s[:lora_rank]) @ vt[:lora_rank]


# ---- the server's SVD ----


@pytest.mark.parametrize("client_lora_ranks", [(2, 2, 2), (2, 1, 2), (1, 1, 1)])
def test_aggregate_is_the_truncated_svd_of_the_dense_sum(
    client_lora_ranks: tuple[int, ...],
) -> None:
    """Non-square and square layers, unequal capacities; also more stacked rows than d_out."""
    state = small_state(client_lora_ranks)
    uploads = [small_upload(k, 1 + 2 * k, client_lora_ranks[k]) for k in range(3)]
    after = FlexLora().aggregate(state, Received.of(uploads))
    dense = mean_of_products(uploads, client_lora_ranks, SHAPES, 3.0)
    for name in SHAPES:
        a, b = pair(after.parts, name)
        np.testing.assert_allclose(3.0 * b @ a, best(dense[name], 2), atol=1e-5)
        assert np.abs(best(dense[name], 2) - dense[name]).max() > 0.01  # it did truncate
        assert after.rank_masks[name].all()
    head = torch.cat([after.whole["head.bias"], after.whole["head.weight"].reshape(-1)])
    expected = sum((1 + 2 * k) / 9 * uploads[k].values[-3:] for k in range(3))
    torch.testing.assert_close(head, expected, rtol=0, atol=1e-6)


def test_all_of_s_is_on_one_side() -> None:
    """A has orthonormal rows and B the norms S / scale: not sqrt(S) on one side only."""
    ranks = (2, 2, 2)
    uploads = [small_upload(k, 1, 2) for k in range(3)]
    after = FlexLora().aggregate(small_state(ranks), Received.of(uploads))
    dense = mean_of_products(uploads, ranks, SHAPES, 3.0)
    for name in SHAPES:
        a, b = pair(after.parts, name)
        s = np.linalg.svd(dense[name], compute_uv=False)[:2]
        np.testing.assert_allclose(a @ a.T, np.eye(2), atol=1e-6)
        np.testing.assert_allclose(3.0 * np.linalg.norm(b, axis=0), s, rtol=1e-5)
        assert np.abs(s - np.sqrt(s)).min() > 0.01  # so that the bug would show


def test_triplets_that_the_sum_lacks_can_still_train() -> None:
    """One client with one triplet: the second keeps its A, and B = 0."""
    state = small_state([1])
    upload = small_upload(0, 2, 1)
    after = FlexLora().aggregate(state, Received.of([upload]))
    dense = mean_of_products([upload], [1], SHAPES, 3.0)
    for name in SHAPES:
        a, b = pair(after.parts, name)
        np.testing.assert_allclose(3.0 * b @ a, dense[name], atol=1e-5)
        assert torch.equal(after.parts["A"][name][1], state.parts["A"][name][1])
        assert not after.parts["B"][name][1].any()


def test_the_servers_model_is_that_truncation() -> None:
    """Evaluated against the plain model with W0 + the dense truncation, after two rounds."""
    job = make_tiny_job(FLEXLORA, UNEQUAL, "adapter.lora_alpha=6.0", "train.lr=2e-2")
    state = play_rounds(job, num_rounds=1)[-1].after
    cohort = draw_cohort(job, 1)
    uploads = [train_one_client(job, state, client_id) for client_id in cohort]
    after = job.method.aggregate(state, received(job.method, state, uploads))
    shapes = job.model.shapes
    dense = mean_of_products(uploads, state.adapter.client_lora_ranks, shapes, 6.0 / 4)
    plain = build_model(job.config.model, num_classes=4, seed=job.config.seed).model.eval()
    with torch.no_grad():
        for name, matrix in dense.items():
            plain.get_submodule(name).weight += torch.from_numpy(best(matrix, 4)).float()
        for name, tensor in after.whole.items():
            plain.get_parameter(name).copy_(tensor)
        job.method.download(job.model, after, None)
        module = job.model.module.eval()
        batch = job.evaluated.batch(torch.arange(20), job.device)
        ours, theirs = (m(batch["input_ids"], batch["attention_mask"]) for m in (module, plain))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_one_client_is_lora_for_a_round() -> None:
    """Other factors, the same product; from there on they train apart."""
    common = ("federation.num_clients=1", "federation.cohort=1", "train.lr=2e-2")
    (ours,) = play_rounds(make_tiny_job(FLEXLORA, *common), num_rounds=1)
    (theirs,) = play_rounds(make_tiny_job("method.name=lora", *common), num_rounds=1)
    assert ours.before.digest() == theirs.before.digest()
    for name in ours.after.adapter.shapes:
        a, b = pair(ours.after.parts, name)
        their_a, their_b = pair(theirs.after.parts, name)
        assert np.abs(their_b @ their_a).max() > 1e-3
        np.testing.assert_allclose(b @ a, their_b @ their_a, atol=1e-6)
    assert all(torch.equal(ours.after.whole[k], theirs.after.whole[k]) for k in ours.after.whole)


# ---- truncation and bytes ----


def test_clients_get_the_first_triplets() -> None:
    """The best approximation of their rank; with the scale of all."""
    job = make_tiny_job(FLEXLORA, UNEQUAL, "train.lr=2e-2")
    state = play_rounds(job, num_rounds=1)[-1].after
    assert sorted(state.adapter.client_lora_ranks) == [1] * 4 + [4] * 4
    for client_id, client_lora_rank in enumerate(state.adapter.client_lora_ranks):
        client = Client(client_id=client_id, num_examples=1, model=job.model)
        size = job.method.download(job.model, state, client)
        assert size.num_bytes("fp32") == 24 + 4 * (client_lora_rank * ROW_FLOATS + NUM_HEAD)
        own = model_parts(job.model)
        for name in state.adapter.shapes:
            for part in "AB":
                assert torch.equal(own[part][name], state.parts[part][name][:client_lora_rank])
            a, b = pair(own, name)
            full_a, full_b = pair(state.parts, name)
            np.testing.assert_allclose(b @ a, best(full_b @ full_a, client_lora_rank), atol=1e-6)
        assert {adapter.form for adapter in job.model.adapters.values()} == {LowRank(scale=1.0)}


def test_bytes_of_a_run() -> None:
    """Up and down r_k rows, whether or not it is the client's first round; down none in round 0."""
    job = make_tiny_job(FLEXLORA, UNEQUAL, "train.local_steps=2")
    check_bytes_of_own_ranks(job, play_rounds(job))


def test_client_ranks_are_part_of_the_runs_identity() -> None:
    assert make_tiny_job(FLEXLORA, UNEQUAL).config.run_id != make_tiny_job(FLEXLORA).config.run_id
