"""Exact aggregation: the mean update by dense matrices, its best truncation, ranks that shrink."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.run.clients import draw_cohort
from fedara_core.adapters import AdapterSpec, inject
from fedara_core.errors import InputError
from fedara_core.merge.received import Received
from fedara_core.methods.fedara_exact import FedAraExact
from fedara_core.state import ServerState, Start, relaid
from fedara_core.values import Tensors
from fedara_core.wire import Upload, make_upload
from support.adapted import join_rows
from support.rounds import make_tiny_job, play_rounds, train_one_client

EXACT = ("method.name=fedara_exact", "train.local_steps=2")
NUM_HEAD = 4 * 32 + 4  # tiny.toml's model
TINY_BUDGET = [48, 48, 23, 13, 12, 12]  # a quarter of 12 x 4, as a cubic

SHAPES = {"down": (5, 9), "square": (6, 6), "up": (8, 7)}
SCALE = 8.0 / 4


def start(**settings: Any) -> tuple[FedAraExact, ServerState]:
    """Three layers of unlike shapes, lora_rank 4, a head of 3, and a budget of everything."""
    module = nn.Module()
    for name, (d_out, d_in) in SHAPES.items():
        setattr(module, name, nn.Linear(d_in, d_out))
    module.head = nn.Linear(3, 1, bias=False)
    model = inject(module, list(SHAPES), ["head.weight"])
    adapter = AdapterSpec(
        lora_rank=4, lora_alpha=8.0, client_lora_ranks=(4,) * 4, shapes=model.shapes
    )
    method = FedAraExact(**{"final_budget": 1.0, **settings})
    return method, method.init(Start(model=model, adapter=adapter, seed=0, num_rounds=10))


def upload_of(client_id: int, num_examples: int, rows: Tensors, head: float = 0.0) -> Upload:
    """Live rows as they are, A, E and B apart, in name order, and a head full of one value."""
    parts = {name: rows[name].split([SHAPES[name][1], 1, SHAPES[name][0]], dim=1) for name in rows}
    flat = [parts[name][part].reshape(-1) for part in range(3) for name in sorted(rows)]
    return make_upload(
        client_id=client_id,
        num_examples=num_examples,
        train_loss=0.0,
        values=torch.cat([*flat, torch.full((3,), head)]),
    )


def drawn_rows(seed: int, num_live: int = 4, num_used: int = 4) -> Tensors:
    """Gaussian rows (num_live, width), of which num_used have an E that is not zero."""
    torch.manual_seed(seed)
    rows = {n: torch.randn(num_live, d_in + 1 + d_out) for n, (d_out, d_in) in SHAPES.items()}
    for name, (_, d_in) in SHAPES.items():
        rows[name][num_used:, d_in] = 0
    return rows


def change(rows: Tensor, d_in: int) -> np.ndarray:
    """scale B diag(E) A of SVD rows (r, width), as a dense float64 matrix."""
    values = rows.double().numpy()
    a, e, b = values[:, :d_in], values[:, d_in], values[:, d_in + 1 :].T
    return SCALE * b @ np.diag(e) @ a


def mean_change(clients: list[tuple[int, Tensors]], name: str) -> np.ndarray:
    total = sum(n for n, _ in clients)
    d_in = SHAPES[name][1]
    return sum(n / total * change(rows[name], d_in) for n, rows in clients)


def uploads_of(clients: list[tuple[int, Tensors]]) -> Received:
    return Received.of(
        [upload_of(k, n, rows, head=float(k)) for k, (n, rows) in enumerate(clients)]
    )


def rows_of(state: ServerState) -> Tensors:
    """Live rows [A_i, E_i, B_i] (r_live, width) of every adapter, of a dead one none."""
    shapes = state.adapter.shapes.items()
    none = {name: torch.zeros(0, d_in + 1 + d_out) for name, (d_out, d_in) in shapes}
    rows = none | join_rows(state.parts)
    assert {name: len(own) for name, own in rows.items()} == state.live_triplets
    return rows


# ---- exactness ----


@pytest.mark.parametrize(("num_clients", "num_used"), [(1, 4), (2, 2), (4, 1)])
def test_the_mean_update_is_exact(num_clients: int, num_used: int) -> None:
    """While K r is at most lora_rank; the mean of the factors is far from it."""
    method, state = start()
    clients = [(2 * k + 1, drawn_rows(k, num_used=num_used)) for k in range(num_clients)]
    after = method.aggregate(state, uploads_of(clients))
    for name, (_, d_in) in SHAPES.items():
        exact = mean_change(clients, name)
        np.testing.assert_allclose(change(rows_of(after)[name], d_in), exact, atol=1e-5)
        total = sum(n for n, _ in clients)
        averaged = change(sum(n / total * rows[name] for n, rows in clients), d_in)
        assert num_clients == 1 or np.abs(averaged - exact).max() > 0.1
    assert after.live_triplets == {"down": 4, "square": 4, "up": 4}
    head = sum(n * k for k, (n, _) in enumerate(clients)) / sum(n for n, _ in clients)
    assert after.whole["head.weight"].reshape(-1).tolist() == pytest.approx([head] * 3)


def test_rows_are_a_singular_value_decomposition() -> None:
    method, state = start()
    clients = [(1, drawn_rows(7)), (4, drawn_rows(8)), (2, drawn_rows(9))]
    after = method.aggregate(state, uploads_of(clients))
    for name, (_, d_in) in SHAPES.items():
        rows = rows_of(after)[name].double()
        a, e, b = rows[:, :d_in], rows[:, d_in], rows[:, d_in + 1 :]
        torch.testing.assert_close(a @ a.T, torch.eye(4).double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(b @ b.T, torch.eye(4).double(), rtol=0, atol=1e-6)
        s = np.linalg.svd(mean_change(clients, name), compute_uv=False)
        np.testing.assert_allclose(SCALE * e.numpy(), s[:4], rtol=1e-5)
    assert after.vector.dtype == torch.float32


@pytest.mark.parametrize("budget", [1, 5, 9, 12])
def test_the_truncation_is_the_best_by_dense_svds(budget: int) -> None:
    """Of all matrices of rank 4 at most per layer and `budget` in total, the nearest ones."""
    method, state = start(final_budget=budget / 12, warmup_fraction=0.0, final_fraction=1.0)
    state = replace(state, round_index=5)
    clients = [(3, drawn_rows(1)), (1, drawn_rows(2)), (2, drawn_rows(3))]
    for rows in (rows for _, rows in clients):
        rows["up"][:, 7] *= 3  # singular values that are unlike between layers
        rows["down"][:, 9] /= 3
    after = method.aggregate(state, uploads_of(clients))

    decomposed = {name: np.linalg.svd(mean_change(clients, name)) for name in SHAPES}
    pooled = [(s, name, i) for name, svd in decomposed.items() for i, s in enumerate(svd[1][:4])]
    best = {(name, i) for _, name, i in sorted(pooled, reverse=True)[:budget]}
    num_kept = {name: sum(chosen == name for chosen, _ in best) for name in SHAPES}
    assert after.live_triplets == num_kept
    for name, (_, d_in) in SHAPES.items():
        u, s, vt = decomposed[name]
        r = num_kept[name]
        nearest = u[:, :r] @ np.diag(s[:r]) @ vt[:r]
        np.testing.assert_allclose(change(rows_of(after)[name], d_in), nearest, atol=1e-5)
    if budget == 9:
        assert sorted(num_kept.values()) != [3, 3, 3]


# ---- rank-deficient sums ----


def test_singular_values_of_zero_are_no_triplets() -> None:
    """Two clients that use the same two triplets: a sum of rank 2 in all but "up", of rank 1."""
    method, state = start()
    first, second = drawn_rows(1, num_used=2), drawn_rows(1, num_used=2)
    for name, (_, d_in) in SHAPES.items():
        second[name][:2, d_in] *= -0.5
    for rows in (first, second):
        rows["up"][1, 7] = 0
    clients = [(1, first), (1, second)]
    after = method.aggregate(state, uploads_of(clients))
    assert after.live_triplets == {"down": 2, "square": 2, "up": 1}
    for name, (_, d_in) in SHAPES.items():
        assert torch.isfinite(rows_of(after)[name]).all()
        exact = mean_change(clients, name)
        np.testing.assert_allclose(change(rows_of(after)[name], d_in), exact, atol=1e-5)
    again = method.aggregate(state, uploads_of(clients))
    assert again.digest() == after.digest()


def test_updates_that_cancel_leave_nothing() -> None:
    method, state = start()
    first, second = drawn_rows(1), drawn_rows(1)
    for name, (_, d_in) in SHAPES.items():
        second[name][:, d_in] *= -1
    untouched = drawn_rows(2, num_used=0)  # E = 0, as at the start
    for clients in ([(1, first), (1, second)], [(1, untouched), (2, untouched)]):
        after = method.aggregate(state, uploads_of(clients))
        for name, (_, d_in) in SHAPES.items():
            assert torch.isfinite(rows_of(after)[name]).all()
            assert np.abs(change(rows_of(after)[name], d_in)).max() < 1e-6
        assert sum(after.live_triplets.values()) == 0
    # And then there is nothing to add up.
    nothing = {name: torch.zeros(0, sum(shape) + 1) for name, shape in SHAPES.items()}
    after = method.aggregate(after, uploads_of([(1, nothing), (1, nothing)]))
    assert sum(after.live_triplets.values()) == 0
    assert after.parts == {}


def test_triplets_move_but_do_not_grow_in_number() -> None:
    """With two live triplets per layer three clients could fill all four places."""
    method, state = start()
    mask = torch.tensor([True, False, True, False])
    state = relaid(state, method.form(state), {name: mask for name in state.rank_masks})
    clients = [(1, drawn_rows(seed, num_live=2)) for seed in range(3)]
    for _, rows in clients:
        rows["down"][:, 9] *= 100
    after = method.aggregate(state, uploads_of(clients))
    assert sum(after.live_triplets.values()) == 6
    assert after.live_triplets["down"] == 4


# ---- whole runs ----


def test_one_client_moves_the_function_as_in_fedara() -> None:
    """One round of one client: the same W, by other factors; logits too."""
    common = ("federation.cohort=1", "train.lr=2e-2", "train.local_steps=4", "adapter.lora_alpha=8")
    theirs = make_tiny_job("method.name=fedara", "method.rank_allocation=false", *common)
    ours = make_tiny_job("method.name=fedara_exact", *common)
    (expected,), (played,) = play_rounds(theirs, num_rounds=1), play_rounds(ours, num_rounds=1)
    assert played.before.digest() == expected.before.digest()
    for name, (_, d_in) in ours.model.shapes.items():
        product = change(rows_of(expected.after)[name], d_in)
        assert np.abs(product).max() > 1e-3
        np.testing.assert_allclose(change(rows_of(played.after)[name], d_in), product, atol=1e-6)
    logits = []
    batch = ours.train.batch(torch.arange(8), ours.device)
    for job, after in ((theirs, expected.after), (ours, played.after)):
        job.method.download(job.model, after, None)
        job.model.module.eval()
        with torch.no_grad():
            logits.append(job.model.module(batch["input_ids"], batch["attention_mask"]))
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)


def test_bytes_and_masks_of_a_run() -> None:
    job = make_tiny_job(*EXACT)
    shapes = job.model.shapes
    for played in play_rounds(job):
        before, row = played.before, played.row
        floats = sum(n * (sum(shapes[name]) + 1) for name, n in before.live_triplets.items())
        size = 24 + 4 * (floats + NUM_HEAD)
        assert row["uplink_bytes"] == 5 * size
        down = size + 48 // 8 if row["round_index"] else 24  # the seed gives the start
        assert row["downlink_bytes"] == 5 * down
        assert row["live_triplets"] == TINY_BUDGET[row["round_index"]]
        for rows in rows_of(played.after).values():
            assert torch.isfinite(rows).all()
            assert rows.any(dim=1).all()
    assert len(set(played.after.live_triplets.values())) > 1


def test_every_round_is_the_best_truncation() -> None:
    """What a round loses is what the smallest singular values weigh; of real uploads."""
    job = make_tiny_job(*EXACT, "adapter.lora_alpha=8", "train.lr=2e-2")
    shapes = job.model.shapes
    for played in play_rounds(job, num_rounds=4)[1:]:
        before, after = played.before, played.after
        uploads = [train_one_client(job, before, k) for k in draw_cohort(job, before.round_index)]
        sent = [join_rows(before.index.parts(u.values)) for u in uploads]
        total, lost, left_out, pooled = sum(u.num_examples for u in uploads), 0.0, 0.0, []
        for name, (_, d_in) in shapes.items():
            if not before.live_triplets[name]:
                continue
            exact = sum(
                u.num_examples / total * change(rows[name], d_in)
                for u, rows in zip(uploads, sent, strict=True)
            )
            lost += np.square(exact - change(rows_of(after)[name], d_in)).sum()
            s = np.linalg.svd(exact, compute_uv=False)
            left_out += np.square(s[4:]).sum()
            pooled += list(np.square(s[:4]))
        left_out += sum(sorted(pooled)[: -TINY_BUDGET[before.round_index]])
        assert lost == pytest.approx(left_out, rel=1e-4, abs=1e-10)
        assert left_out > 1e-6


def test_e_has_a_learning_rate_of_its_own() -> None:
    method = FedAraExact(e_lr_factor=3.0)
    assert [method.lr_factor(part) for part in "AEB"] == [1.0, 3.0, 1.0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("final_budget", 1.5),
        ("warmup_fraction", -0.1),
        ("final_fraction", 1.1),
        ("init_std", 0.0),
        ("e_lr_factor", -1.0),
    ],
)
def test_settings_out_of_range_are_named(key: str, value: float) -> None:
    with pytest.raises(InputError) as error:
        FedAraExact(**{key: value})
    assert f"method.{key} = {value}" in str(error.value)
    assert "must be" in str(error.value)
