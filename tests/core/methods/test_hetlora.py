"""HetLoRA: truncation, zero-padding, weights by norm, rank self-pruning, and the bytes of it."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.run.clients import draw_cohort
from fedara_core.adapters import AdaptedModel, AdapterSpec, LowRank, inject
from fedara_core.errors import InputError
from fedara_core.method import Client, load_method
from fedara_core.methods.hetlora import HetLora
from fedara_core.state import ServerState, Start, truncated
from fedara_core.train import start_client
from fedara_core.values import make_index
from fedara_core.wire import Upload, make_upload
from support.pairs import model_parts, sent_pairs, with_random_rows
from support.rounds import (
    check_bytes_of_own_ranks,
    make_tiny_job,
    play_rounds,
    received,
    train_one_client,
)

ROW_FLOATS = 8 * (32 + 32) + 4 * (64 + 32)  # one row of every adapter of tiny.toml's model
NUM_HEAD = 4 * 32 + 4
HETLORA = "method.name=hetlora"
UNEQUAL = "adapter.client_lora_ranks=[{lora_rank=1, share=0.5}, {lora_rank=3, share=0.5}]"


SHAPES = {"a": (3, 5), "b": (4, 4)}


def small_model() -> AdaptedModel:
    """Adapters "a" (3 x 5) and "b" (4 x 4), and a head of three numbers."""
    model = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Linear(4, 4), "head": nn.Linear(2, 1)})
    return inject(model, ["a", "b"], ["head.weight", "head.bias"])


def small_state(client_lora_ranks: Sequence[int]) -> ServerState:
    """Three triplets in both adapters, all of them random."""
    model = small_model()
    adapter = AdapterSpec(
        lora_rank=3,
        lora_alpha=6.0,
        client_lora_ranks=tuple(client_lora_ranks),
        shapes=model.shapes,
    )
    start = Start(model=model, adapter=adapter, seed=0, num_rounds=4)
    return with_random_rows(HetLora().init(start), seed=5)


def small_upload(
    client_id: int, num_examples: int, client_lora_rank: int, norm: float | None = None
) -> Upload:
    """Random values, B scaled so that its changes have this norm."""
    values = torch.randn(
        client_lora_rank * (8 + 8) + 3, generator=torch.Generator().manual_seed(client_id)
    )
    if norm is not None:
        values[client_lora_rank * (5 + 4) : -3] *= norm / products(values, client_lora_rank)[1]
    return make_upload(
        client_id=client_id, num_examples=num_examples, train_loss=0.0, values=values
    )


def products(values: Tensor, client_lora_rank: int) -> tuple[list[np.ndarray], float]:
    """An upload's rows of "a" and "b", each (r_k, 8), and the norm of its dense changes."""
    pairs = sent_pairs(values, client_lora_rank, SHAPES).values()
    rows = [np.hstack([a, b.T]) for a, b in pairs]
    return rows, float(np.sqrt(sum(((b @ a) ** 2).sum() for a, b in pairs)))


def rows_of(state: ServerState, name: str) -> Tensor:
    """The rows [A_i, B_i] of an adapter (r_live, d_in + d_out)."""
    return torch.cat([state.parts[part][name] for part in "AB"], dim=1)


def aggregated(state: ServerState, uploads: Sequence[Upload]) -> ServerState:
    return HetLora().aggregate(state, received(HetLora(), state, uploads))


# ---- aggregation ----


def test_aggregation_by_hand() -> None:
    """Zero rows up to the cohort's largest r_k, weights ||B_k A_k||_F, the head by num_examples."""
    state = small_state([1, 2, 2])
    uploads = [small_upload(0, 3, 1), small_upload(1, 1, 2)]
    after = aggregated(state, uploads)
    (first, norm_0), (second, norm_1) = (
        products(uploads[0].values, 1),
        products(uploads[1].values, 2),
    )
    assert norm_0 != pytest.approx(norm_1, rel=0.1)
    for upload, norm in zip(uploads, (norm_0, norm_1), strict=True):
        assert HetLora().row_weight(state, upload) == pytest.approx(norm, rel=1e-6)
    for i, name in enumerate("ab"):
        padded = np.vstack([first[i], np.zeros((1, 8))])
        mean = (norm_0 * padded + norm_1 * second[i]) / (norm_0 + norm_1)
        np.testing.assert_allclose(rows_of(after, name), mean, atol=1e-6)
        assert after.rank_masks[name].tolist() == [True, True, False]  # no client has three
    head = torch.cat([after.whole["head.bias"], after.whole["head.weight"].reshape(-1)])
    expected = 0.75 * uploads[0].values[-3:] + 0.25 * uploads[1].values[-3:]
    torch.testing.assert_close(head, expected, rtol=0, atol=1e-6)
    assert after.extra["client_lora_ranks"].tolist() == [1, 2, 2]


def test_rows_that_no_client_of_the_cohort_holds() -> None:
    """They stay while a client elsewhere has them, and go when the last one gives them up."""
    state = small_state([1, 2, 3])
    after = aggregated(state, [small_upload(0, 1, 1), small_upload(1, 1, 2)])
    for name in "ab":
        assert torch.equal(rows_of(after, name)[2], rows_of(state, name)[2])
        assert not torch.equal(rows_of(after, name)[1], rows_of(state, name)[1])
        assert after.rank_masks[name].all()
    last = aggregated(after, [small_upload(2, 1, 2)])
    assert last.extra["client_lora_ranks"].tolist() == [1, 2, 2]
    for name in "ab":
        assert last.rank_masks[name].tolist() == [True, True, False]
        assert rows_of(last, name).shape == (2, 8)
        assert rows_of(last, name).all()


def test_equal_capacities_and_no_penalty_is_weighted_lora() -> None:
    """LoRA's own uploads, averaged with S_k / sum S instead of p_k; no client changes its rank."""
    job, lora = make_tiny_job(HETLORA, "method.penalty=0.0"), make_tiny_job("method.name=lora")
    (played,) = play_rounds(job, num_rounds=1)
    cohort = draw_cohort(lora, 0)
    uploads = [train_one_client(lora, lora.state, client_id) for client_id in cohort]
    sent = [sent_pairs(upload.values, 4, job.model.shapes) for upload in uploads]
    norms = [sum(((b @ a) ** 2).sum() for a, b in own.values()) ** 0.5 for own in sent]
    assert max(norms) > 1.05 * min(norms)
    for name in job.model.shapes:
        for i, part in enumerate("AB"):
            halves = [own[name][0] if i == 0 else own[name][1].T for own in sent]
            mean = sum(n * half for n, half in zip(norms, halves, strict=True)) / sum(norms)
            np.testing.assert_allclose(played.after.parts[part][name], mean, rtol=0, atol=1e-6)
    assert played.row["uplink_bytes"] == 5 * (24 + 4 * (4 * ROW_FLOATS + NUM_HEAD))
    last = play_rounds(job, played.after)[-1].after
    assert last.extra["client_lora_ranks"].tolist() == [4] * 8


def test_equal_norms_and_sizes_are_plain_lora() -> None:
    state = small_state([2, 2, 2])
    state = truncated(state, HetLora().form(state), 2)
    uploads = [small_upload(client_id, 7, 2, norm=10) for client_id in range(3)]
    ours, lora = aggregated(state, uploads), load_method("lora")()
    theirs = lora.aggregate(state, received(lora, state, uploads))
    for part, name in product("AB", "ab"):
        expected = theirs.parts[part][name]
        torch.testing.assert_close(ours.parts[part][name], expected, rtol=0, atol=1e-6)
    assert all(torch.equal(ours.whole[name], theirs.whole[name]) for name in theirs.whole)


def test_one_client_is_plain_lora() -> None:
    common = ("federation.num_clients=1", "federation.cohort=1", "federation.num_rounds=3")
    ours = play_rounds(make_tiny_job(HETLORA, "method.penalty=0.0", *common))
    theirs = play_rounds(make_tiny_job("method.name=lora", *common))
    for part, name in product("AB", theirs[-1].after.adapter.shapes):
        expected = theirs[-1].after.parts[part][name]
        torch.testing.assert_close(ours[-1].after.parts[part][name], expected, rtol=0, atol=1e-6)


# ---- truncation and bytes ----


def test_clients_train_their_first_rows() -> None:
    job = make_tiny_job(HETLORA, UNEQUAL)
    assert sorted(job.state.adapter.client_lora_ranks) == [1] * 4 + [3] * 4
    for client_id, client_lora_rank in enumerate(job.state.adapter.client_lora_ranks):
        client = Client(client_id=client_id, num_examples=1, model=job.model)
        size = job.method.download(job.model, job.state, client)
        assert size.num_bytes("fp32") == 24  # the seed gives the start
        own = model_parts(job.model)
        for part, name in product("AB", job.state.adapter.shapes):
            assert torch.equal(own[part][name], job.state.parts[part][name][:client_lora_rank])
        forms = {adapter.form for adapter in job.model.adapters.values()}
        assert forms == {LowRank(scale=1.0)}  # lora_alpha 4 / lora_rank 4, whatever r_k is
    job.method.download(job.model, job.state, None)
    assert {len(rows) for rows in model_parts(job.model)["A"].values()} == {4}


def test_bytes_of_a_run() -> None:
    """Up and down r_k rows, whether or not it is the client's first round; down none in round 0."""
    job = make_tiny_job(HETLORA, UNEQUAL, "method.penalty=0.0", "train.local_steps=2")
    rounds = play_rounds(job)
    check_bytes_of_own_ranks(job, rounds)
    assert rounds[-1].row["live_triplets"] == 3 * 12  # nobody has a fourth row


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
    form = LowRank(scale=2.0)
    index = make_index(form, SHAPES, {"a": 4, "b": 4}, {})
    parts = {
        "A": {"a": rows["a"][:, :5], "b": rows["b"][:, :4]},
        "B": {"a": rows["a"][:, 5:], "b": rows["b"][:, 4:]},
    }
    model.load(index.pack(parts, {}), index, form)
    assert HetLora()._tail_norm(model).item() == pytest.approx(5 * 10 + 2 * 1.5)
    assert HetLora(gamma=1.0)._tail_norm(model).item() == 0
    # gamma 0.5: rows 2 and 3 are the tail.
    both = (4 * 100**2 + 4.0) ** 0.5 * (4 * 100**2 + 2.25) ** 0.5
    assert HetLora(gamma=0.5)._tail_norm(model).item() == pytest.approx(50 + both)


def with_full_rows(state: ServerState) -> ServerState:
    """All rows 0.3, so that tails have a norm to lose."""
    vector = state.vector.clone()
    vector[: state.index.num_row_values] = 0.3
    return replace(state, vector=vector)


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
        after.append((model_parts(job.model), client.sent_values[-NUM_HEAD:]))
    assert torch.equal(after[0][1], after[1][1])  # the head
    for name, (d_out, d_in) in job.model.shapes.items():
        for part, width, other in (("A", d_in, d_out), ("B", d_out, d_in)):
            moved = after[0][0][part][name] - after[1][0][part][name]
            assert not moved[:3].any()
            expected = torch.full((width,), 0.25 * 0.3 * (other / width) ** 0.5)
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
    for upload in uploads:  # the weight is that of what is sent
        pairs = sent_pairs(upload.values, 1, job.model.shapes).values()
        norm = sum(((b @ a) ** 2).sum() for a, b in pairs) ** 0.5
        assert job.method.row_weight(state, upload) == pytest.approx(norm, rel=1e-6)
    after = job.method.aggregate(state, received(job.method, state, uploads))
    expected = [1 if client_id in cohort else ranks[client_id] for client_id in range(8)]
    assert after.extra["client_lora_ranks"].tolist() == expected
    # It is the smaller rank that is downloaded from now on; the capacities are what they were.
    (played,) = play_rounds(job, after, num_rounds=1)
    num_rows = sum(expected[client_id] for client_id in played.row["cohort"])
    assert played.row["downlink_bytes"] == 5 * (24 + 4 * NUM_HEAD) + 4 * num_rows * ROW_FLOATS
    assert after.adapter.client_lora_ranks == ranks


@pytest.mark.parametrize(
    ("rounding", "kept"), [("floor", {1: 1, 10: 9, 49: 48, 50: 49}), ("nearest", {10: 10, 49: 49})]
)
def test_rounding_decides_whether_small_ranks_prune(rounding: str, kept: dict[int, int]) -> None:
    """0.99 r to the nearest whole number is r below 50, so that such a client has no tail."""
    method = HetLora(gamma=0.99, rounding=rounding)
    assert {lora_rank: method._kept(lora_rank) for lora_rank in kept} == kept
    assert HetLora(gamma=0.99, rounding="nearest")._kept(51) == 50
    assert HetLora(gamma=0.5, rounding="nearest")._kept(1) == 1


def test_pruning_keeps_the_first_rows() -> None:
    """And only where the tail's norm is below the downloaded one, not where it equals it."""
    job = make_tiny_job(HETLORA)
    client = Client(client_id=2, num_examples=1, model=job.model, losses=[torch.zeros(())])
    job.method.download(job.model, job.state, client)
    assert len(job.method.upload(client, job.state).values) == 4 * ROW_FLOATS + NUM_HEAD
    client.notes["tail_norm"] = 0.1
    values = job.method.upload(client, job.state).values
    parts = job.state.parts
    kept = torch.cat([rows[:3].reshape(-1) for part in "AB" for rows in parts[part].values()])
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
