"""HetLoRA: truncation, zero-padding, weights by norm, rank self-pruning, and the bytes of it."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.run.clients import draw_cohort
from fedara_core.adapters import (
    AdapterConfig,
    LowRank,
    adapter_shapes,
    inject,
    named_adapters,
    read_rows,
)
from fedara_core.errors import InputError
from fedara_core.method import Client, ServerState, live_values, load_method
from fedara_core.methods.hetlora import HetLora
from fedara_core.train import start_client
from fedara_core.wire import Upload
from support.rounds import make_tiny_job, play_rounds, train_one_client

ROW_FLOATS = 8 * (32 + 32) + 4 * (64 + 32)  # one row of every adapter of tiny.toml's model
NUM_HEAD = 4 * 32 + 4
HETLORA = "method.name=hetlora"
UNEQUAL = "adapter.client_lora_ranks=[{lora_rank=1, share=0.5}, {lora_rank=3, share=0.5}]"


def small_model() -> nn.Module:
    """Adapters "a" (3 x 5) and "b" (4 x 4), and a head of three numbers."""
    model = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Linear(4, 4), "head": nn.Linear(2, 1)})
    inject(model, ["a", "b"], ["head.weight", "head.bias"])
    return model


def small_state(client_lora_ranks: Sequence[int]) -> ServerState:
    """Three triplets in both adapters, all of them random."""
    model = small_model()
    adapter = AdapterConfig.of(
        model, lora_rank=3, lora_alpha=6.0, client_lora_ranks=client_lora_ranks
    )
    state = HetLora().init(model, adapter, seed=0, num_rounds=4)
    generator = torch.Generator().manual_seed(5)
    rows = {name: torch.randn(rows.shape, generator=generator) for name, rows in state.rows.items()}
    return replace(state, rows=rows)


def small_upload(client_id: int, num_examples: int, client_lora_rank: int) -> Upload:
    values = torch.randn(
        client_lora_rank * (8 + 8) + 3, generator=torch.Generator().manual_seed(client_id)
    )
    return Upload(
        client_id=client_id,
        num_examples=num_examples,
        train_loss=0.0,
        values=values,
        bits=torch.zeros(0, dtype=torch.bool),
    )


def products(values: Tensor, client_lora_rank: int) -> tuple[list[np.ndarray], float]:
    """An upload's rows of "a" and "b", each (r_k, 8), and the norm of its dense changes."""
    a, b = values[: 16 * client_lora_rank].double().numpy().reshape(2, client_lora_rank, 8)
    dense = [a[:, 5:].T @ a[:, :5], b[:, 4:].T @ b[:, :4]]
    return [a, b], float(np.sqrt(sum((matrix**2).sum() for matrix in dense)))


# ---- aggregation ----


def test_aggregation_by_hand() -> None:
    """Zero rows up to the cohort's largest r_k, weights ||B_k A_k||_F, the head by num_examples."""
    state = small_state([1, 2, 2])
    uploads = [small_upload(0, 3, 1), small_upload(1, 1, 2)]
    after = HetLora().aggregate(state, uploads)
    (first, norm_0), (second, norm_1) = (
        products(uploads[0].values, 1),
        products(uploads[1].values, 2),
    )
    assert norm_0 != pytest.approx(norm_1, rel=0.1)
    for i, name in enumerate("ab"):
        padded = np.vstack([first[i], np.zeros((1, 8))])
        mean = (norm_0 * padded + norm_1 * second[i]) / (norm_0 + norm_1)
        np.testing.assert_allclose(after.rows[name][:2], mean, atol=1e-6)
        assert after.rank_masks[name].tolist() == [True, True, False]  # no client has three
        assert not after.rows[name][2].any()
    head = torch.cat([after.whole["head.bias"], after.whole["head.weight"].reshape(-1)])
    expected = 0.75 * uploads[0].values[-3:] + 0.25 * uploads[1].values[-3:]
    torch.testing.assert_close(head, expected, rtol=0, atol=1e-6)
    assert after.extra["client_lora_ranks"].tolist() == [1, 2, 2]


def test_rows_that_no_client_of_the_cohort_holds() -> None:
    """They stay while a client elsewhere has them, and go when the last one gives them up."""
    state = small_state([1, 2, 3])
    after = HetLora().aggregate(state, [small_upload(0, 1, 1), small_upload(1, 1, 2)])
    for name in "ab":
        assert torch.equal(after.rows[name][2], state.rows[name][2])
        assert not torch.equal(after.rows[name][1], state.rows[name][1])
        assert after.rank_masks[name].all()
    last = HetLora().aggregate(after, [small_upload(2, 1, 2)])
    assert last.extra["client_lora_ranks"].tolist() == [1, 2, 2]
    for name in "ab":
        assert last.rank_masks[name].tolist() == [True, True, False]
        assert not last.rows[name][2].any()
        assert last.rows[name][:2].all()


def test_equal_capacities_and_no_penalty_is_weighted_lora() -> None:
    """LoRA's own uploads, averaged with S_k / sum S instead of p_k; no client changes its rank."""
    job, lora = make_tiny_job(HETLORA, "method.penalty=0.0"), make_tiny_job("method.name=lora")
    (played,) = play_rounds(job, num_rounds=1)
    cohort = draw_cohort(lora, 0)
    uploads = [train_one_client(lora, lora.state, client_id) for client_id in cohort]
    norms, rows = [], []
    for upload in uploads:
        start, squares, own = 0, 0.0, {}
        for name, (d_out, d_in) in adapter_shapes(job.model).items():
            own[name] = upload.values[start : start + 4 * (d_in + d_out)].double().reshape(4, -1)
            start += own[name].numel()
            squares += float((own[name][:, d_in:].T @ own[name][:, :d_in]).square().sum())
        norms.append(squares**0.5)
        rows.append(own)
    assert max(norms) > 1.05 * min(norms)
    for name, actual in played.after.rows.items():
        mean = sum(n * own[name] for n, own in zip(norms, rows, strict=True)) / sum(norms)
        torch.testing.assert_close(actual.double(), mean, rtol=0, atol=1e-6)
    assert played.row["uplink_bytes"] == 5 * (24 + 4 * (4 * ROW_FLOATS + NUM_HEAD))
    last = play_rounds(job, played.after)[-1].after
    assert last.extra["client_lora_ranks"].tolist() == [4] * 8


def test_equal_norms_and_sizes_are_plain_lora() -> None:
    state = small_state([2, 2, 2])
    state = replace(
        state,
        rows={name: rows[:2] for name, rows in state.rows.items()},
        rank_masks={name: mask[:2] for name, mask in state.rank_masks.items()},
    )
    uploads = []
    for client_id in range(3):
        upload = small_upload(client_id, 7, 2)
        values = upload.values.clone()
        _, norm = products(values, 2)
        for columns, start in ((slice(5, 8), 0), (slice(4, 8), 16)):  # B of "a", B of "b"
            values[start : start + 16].view(2, 8)[:, columns] *= 10 / norm
        uploads.append(replace(upload, values=values))
    ours = HetLora().aggregate(state, uploads)
    theirs = load_method("lora")().aggregate(state, uploads)
    for name in "ab":
        torch.testing.assert_close(ours.rows[name], theirs.rows[name], rtol=0, atol=1e-6)
    assert all(torch.equal(ours.whole[name], theirs.whole[name]) for name in theirs.whole)


def test_one_client_is_plain_lora() -> None:
    common = ("federation.num_clients=1", "federation.cohort=1", "federation.num_rounds=3")
    ours = play_rounds(make_tiny_job(HETLORA, "method.penalty=0.0", *common))
    theirs = play_rounds(make_tiny_job("method.name=lora", *common))
    for name, rows in theirs[-1].after.rows.items():
        torch.testing.assert_close(ours[-1].after.rows[name], rows, rtol=0, atol=1e-6)


# ---- truncation and bytes ----


def test_clients_train_their_first_rows() -> None:
    job = make_tiny_job(HETLORA, UNEQUAL)
    assert sorted(job.state.adapter.client_lora_ranks) == [1] * 4 + [3] * 4
    for client_id, client_lora_rank in enumerate(job.state.adapter.client_lora_ranks):
        client = Client(client_id=client_id, num_examples=1, model=job.model)
        num_bytes = job.method.download(job.model, job.state, client)
        assert num_bytes == 24 + 4 * (client_lora_rank * ROW_FLOATS + NUM_HEAD)
        for name, rows in read_rows(job.model).items():
            assert torch.equal(rows, job.state.rows[name][:client_lora_rank])
        forms = {adapter.form for _, adapter in named_adapters(job.model)}
        assert forms == {LowRank(scale=1.0)}  # lora_alpha 4 / lora_rank 4, whatever r_k is
    job.method.download(job.model, job.state, None)
    assert {len(rows) for rows in read_rows(job.model).values()} == {4}


def test_bytes_of_a_run() -> None:
    """Up and down r_k rows, in a client's first round and in later ones."""
    job = make_tiny_job(HETLORA, UNEQUAL, "method.penalty=0.0", "train.local_steps=2")
    ranks = job.state.adapter.client_lora_ranks
    for played in play_rounds(job):
        num_rows = sum(ranks[client_id] for client_id in played.row["cohort"])
        expected = 5 * (24 + 4 * NUM_HEAD) + 4 * num_rows * ROW_FLOATS
        assert played.row["uplink_bytes"] == played.row["downlink_bytes"] == expected
    assert played.row["live_triplets"] == 3 * 12  # nobody has a fourth row


def test_client_ranks_are_part_of_the_runs_identity() -> None:
    assert make_tiny_job(HETLORA, UNEQUAL).config.run_id != make_tiny_job(HETLORA).config.run_id


# ---- rank self-pruning ----


@pytest.mark.parametrize(
    ("gamma", "client_lora_rank", "kept"),
    [(0.99, 4, 3), (0.99, 200, 198), (0.5, 4, 2), (0.5, 5, 2), (1.0, 4, 4), (0.99, 1, 1)],
)
def test_pruning_keeps_floor_gamma_r(gamma: float, client_lora_rank: int, kept: int) -> None:
    assert HetLora(gamma=gamma)._kept(client_lora_rank) == kept


def test_tail_norm_by_hand() -> None:
    model = small_model()
    rows = {name: torch.zeros(4, 8) for name in "ab"}
    rows["a"][3] = torch.tensor([3.0, 0.0, 0.0, 4.0, 0.0, 0.0, 6.0, 8.0])  # ||A|| 5, ||B|| 10
    rows["b"][2] = 100.0  # no tail
    rows["b"][3] = torch.tensor([2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.5])
    for name, adapter in named_adapters(model):
        adapter.write(rows[name], LowRank(scale=2.0))
    assert HetLora()._tail_norm(model).item() == pytest.approx(5 * 10 + 2 * 1.5)
    assert HetLora(gamma=1.0)._tail_norm(model).item() == 0
    # gamma 0.5: rows 2 and 3 are the tail.
    both = (4 * 100**2 + 4.0) ** 0.5 * (4 * 100**2 + 2.25) ** 0.5
    assert HetLora(gamma=0.5)._tail_norm(model).item() == pytest.approx(50 + both)


def with_full_rows(state: ServerState) -> ServerState:
    """All rows 0.3, so that tails have a norm to lose."""
    return replace(state, rows={k: torch.full_like(rows, 0.3) for k, rows in state.rows.items()})


def test_the_penalty_moves_tails_alone() -> None:
    """One SGD step with and without it: lambda ||B|| A / ||A|| and its mirror, on the last row."""
    after = []
    for penalty in (0.0, 0.25):
        job = make_tiny_job(
            *(HETLORA, f"method.penalty={penalty}", "train.optimizer=sgd", "train.lr=1.0"),
            *("train.max_grad_norm=none", "model.dropout=0.0"),
        )
        state = with_full_rows(job.state)
        client = Client(client_id=0, num_examples=8, model=job.model)
        job.method.download(job.model, state, client)
        start_client(client, job.method, job.training, state)
        job.method.local_step(client, job.train.batch(torch.arange(8), job.device))
        after.append((read_rows(job.model), live_values(job.model, state)[-NUM_HEAD:]))
    assert torch.equal(after[0][1], after[1][1])  # the head
    for name, (d_out, d_in) in adapter_shapes(job.model).items():
        moved = after[0][0][name] - after[1][0][name]
        assert not moved[:3].any()
        expected = torch.full((d_in + d_out,), 0.25 * 0.3)
        expected[:d_in] *= (d_out / d_in) ** 0.5
        expected[d_in:] *= (d_in / d_out) ** 0.5
        torch.testing.assert_close(moved[3], expected, rtol=1e-3, atol=1e-5)


def test_a_client_prunes_where_its_tail_shrank() -> None:
    job = make_tiny_job(HETLORA, "method.penalty=100.0", "method.gamma=0.5", UNEQUAL)
    state = with_full_rows(job.state)
    ranks = state.adapter.client_lora_ranks
    cohort = draw_cohort(job, 0)
    uploads = [train_one_client(job, state, client_id) for client_id in cohort]
    kept = [1 for _ in cohort]  # of 1 or of 3
    assert {ranks[client_id] for client_id in cohort} == {1, 3}
    assert [len(u.values) for u in uploads] == [k * ROW_FLOATS + NUM_HEAD for k in kept]
    after = job.method.aggregate(state, uploads)
    expected = [1 if client_id in cohort else ranks[client_id] for client_id in range(8)]
    assert after.extra["client_lora_ranks"].tolist() == expected
    # It is the smaller rank that is downloaded from now on; the capacities are what they were.
    (played,) = play_rounds(job, after, num_rounds=1)
    num_rows = sum(expected[client_id] for client_id in played.row["cohort"])
    assert played.row["downlink_bytes"] == 5 * (24 + 4 * NUM_HEAD) + 4 * num_rows * ROW_FLOATS
    assert after.adapter.client_lora_ranks == ranks


def test_pruning_keeps_the_first_rows() -> None:
    """And only where the tail's norm is below the downloaded one, not where it equals it."""
    job = make_tiny_job(HETLORA)
    client = Client(client_id=2, num_examples=1, model=job.model, losses=[torch.zeros(())])
    job.method.download(job.model, job.state, client)
    assert len(job.method.upload(client, job.state).values) == 4 * ROW_FLOATS + NUM_HEAD
    client.notes["tail_norm"] = 0.1
    values = job.method.upload(client, job.state).values
    kept = torch.cat([rows[:3].reshape(-1) for rows in job.state.rows.values()])
    assert torch.equal(values[:-NUM_HEAD], kept)


@pytest.mark.parametrize("setting", ["method.penalty=0.0", "method.gamma=1.0"])
def test_pruning_can_be_left_out(setting: str) -> None:
    job = make_tiny_job(HETLORA, "method.penalty=100.0", setting, "train.weight_decay=50.0")
    upload = train_one_client(job, with_full_rows(job.state), 2)
    assert len(upload.values) == 4 * ROW_FLOATS + NUM_HEAD


def test_nobody_prunes_in_the_first_round() -> None:
    """With B = 0 no norm can shrink."""
    (played,) = play_rounds(make_tiny_job(HETLORA, "method.penalty=100.0"), num_rounds=1)
    assert played.after.extra["client_lora_ranks"].tolist() == [4] * 8


# ---- settings ----


@pytest.mark.parametrize(
    ("key", "value"), [("penalty", -0.1), ("gamma", 0.0), ("gamma", 1.01), ("gamma", -1.0)]
)
def test_settings_out_of_range_are_named(key: str, value: float) -> None:
    with pytest.raises(InputError) as error:
        HetLora(**{key: value})
    assert f"method.{key} = {value} must be" in str(error.value)
