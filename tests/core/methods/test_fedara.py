"""FedARA's equations against hand-computed cases: budgets, scores, votes, bytes and switches."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from bench.run.clients import draw_cohort
from fedara_core.adapters import AdaptedModel, AdapterSpec, LowRank, inject
from fedara_core.comm.base import Communicator
from fedara_core.errors import InputError
from fedara_core.factors import orthogonality_penalty
from fedara_core.importance import (
    IMPORTANCES,
    ImportanceMeter,
    cubic_budget,
    relative_costs,
    top_k,
)
from fedara_core.merge.received import Received
from fedara_core.method import Client
from fedara_core.methods.fedara import FedAra
from fedara_core.state import ServerState, with_parts
from fedara_core.train import start_client
from fedara_core.values import EMPTY, Masks, bits_of_masks, masks_of_bits
from fedara_core.wire import Upload, make_upload
from support.adapted import join_rows, load_rows, split_rows
from support.in_turn import in_turn
from support.rounds import make_tiny_job, play_rounds, train_one_client

NUM_HEAD = 4 * 32 + 4  # tiny.toml's model
SHORT = ("train.local_steps=2",)


# ---- the budget ----


def test_cubic_budget_by_hand() -> None:
    values = [
        cubic_budget(t, first=100, last=20, num_rounds=10, warmup=2, final=2) for t in range(10)
    ]
    # 20 + 80 (5/6)^3 = 66.3, (4/6)^3 = 43.7, (3/6)^3 = 30, (2/6)^3 = 22.96, (1/6)^3 = 20.4
    assert values == [100, 100, 100, 66, 44, 30, 23, 20, 20, 20]


def test_cubic_budget_without_last_rounds_ends_above_the_last_budget() -> None:
    values = [cubic_budget(t, first=64, last=0, num_rounds=5, warmup=1, final=0) for t in range(5)]
    assert values == [64, 64, 27, 8, 1]


@pytest.mark.parametrize(
    ("num_rounds", "warmup", "final", "expected"),
    [
        (1, 1, 0, [48]),
        (2, 1, 1, [48, 48]),  # the warm-up wins
        (3, 1, 1, [48, 48, 12]),
        (3, 2, 2, [48, 48, 48]),
        (4, 1, 4, [48, 48, 12, 12]),
        (3, 0, 3, [48, 12, 12]),
    ],
)
def test_cubic_budget_of_few_rounds(
    num_rounds: int, warmup: int, final: int, expected: list[int]
) -> None:
    assert expected == [
        cubic_budget(t, first=48, last=12, num_rounds=num_rounds, warmup=warmup, final=final)
        for t in range(num_rounds)
    ]


# 12 adapters x 4 triplets, a quarter of them last; one round warms up, the last two are final.
TINY_BUDGET = [48, 48, 23, 13, 12, 12]


def test_the_methods_budget_by_hand() -> None:
    job = make_tiny_job()
    assert isinstance(job.method, FedAra)
    assert [job.method.budget(replace(job.state, round_index=t)) for t in range(6)] == TINY_BUDGET
    # b0 stays what it was when triplets are gone.
    thinner = {name: torch.zeros_like(mask) for name, mask in job.state.rank_masks.items()}
    assert job.method.budget(replace(job.state, rank_masks=thinner, round_index=3)) == 13
    off = replace(job.method, rank_allocation=False)
    assert [off.budget(replace(job.state, round_index=t)) for t in range(6)] == [48] * 6


# ---- top-k ----


def chosen(masks: Masks) -> dict[str, list[int]]:
    return {name: mask.int().tolist() for name, mask in masks.items()}


def test_top_k_runs_over_all_adapters_in_name_order() -> None:
    masks = {"b": torch.tensor([True, False, True]), "a": torch.tensor([True, True, True])}
    bits = top_k(torch.tensor([2.0, 8.0, 3.0, 9.0, 1.0]), 3)
    assert bits.int().tolist() == [0, 1, 1, 1, 0]
    kept = masks_of_bits(bits, masks)
    assert chosen(kept) == {"a": [0, 1, 1], "b": [1, 0, 0]}
    assert list(kept) == ["a", "b"]
    assert torch.equal(bits_of_masks(kept, masks), bits)


def test_ties_go_to_the_lower_index() -> None:
    scores = torch.tensor([5.0, 0.0, 5.0, 5.0, 5.0, 7.0])
    assert top_k(scores, 3).int().tolist() == [1, 0, 1, 0, 0, 1]
    bits = top_k(torch.zeros(1000), 501)
    assert bits[:501].all()
    assert not bits[501:].any()


def test_top_k_of_none_and_of_all() -> None:
    scores = torch.tensor([1.0, 2.0, 0.0])
    assert top_k(scores, 0).int().tolist() == [0, 0, 0]
    for k in (3, 4, 100):
        assert top_k(scores, k).int().tolist() == [1, 1, 1]
    assert top_k(torch.zeros(0), 2).tolist() == []


# ---- importance ----

#               A0   A1    E     B0   B1
ROWS = [[1.0, -2.0, 3.0, 0.5, 1.0], [0.0, 4.0, -0.5, 2.0, 0.0]]
GRADS = [[0.5, 0.25, -1.0, 2.0, -1.0], [3.0, -0.5, 2.0, 0.5, 7.0]]


SINGULAR = LowRank(scale=1.0, singular=True)


def two_by_two() -> AdaptedModel:
    model = inject(nn.ModuleDict({"layer": nn.Linear(2, 2)}), "all-linear", ())
    load_rows(model, {"layer": torch.tensor(ROWS)}, SINGULAR)
    return model


def set_grads(model: AdaptedModel, factor: float) -> None:
    grads = split_rows({"layer": factor * torch.tensor(GRADS)}, SINGULAR, model.shapes)
    model.gradient.copy_(model.index.pack(grads, {}))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # E + mean A + mean B of |w g|: 3 + (.5 + .5)/2 + (1 + 1)/2; 1 + (0 + 2)/2 + (1 + 0)/2;
        # both steps together count three times the first.
        ("sensitivity", [3 * 4.5, 3 * 2.5]),
        # of |g|: 1 + (.5 + .25)/2 + (2 + 1)/2; 2 + (3 + .5)/2 + (.5 + 7)/2
        ("gradient", [3 * 2.875, 3 * 7.5]),
        ("magnitude", [3.0, 0.5]),
        # |A| |E| |B|: sqrt(5) 3 sqrt(1.25); 4 x 0.5 x 2
        ("norm", [7.5, 4.0]),
    ],
)
def test_scores_of_two_steps_by_hand(kind: Any, expected: list[float]) -> None:
    model = two_by_two()
    meter = ImportanceMeter(kind)
    for factor in (1.0, -2.0):
        set_grads(model, factor)
        meter.observe(model)
    assert meter.scores(model).tolist() == pytest.approx(expected, rel=1e-6)


def test_norm_is_that_of_the_product() -> None:
    model = two_by_two()
    parts = model.adapters["layer"].parts
    for i, score in enumerate(ImportanceMeter("norm").scores(model)):
        product = torch.outer(parts["B"][i], parts["A"][i]) * parts["E"][i]
        assert float(score) == pytest.approx(product.norm().item(), rel=1e-6)


def test_smoothed_scores_of_three_steps_by_hand() -> None:
    model = two_by_two()
    meter = ImportanceMeter("smoothed")
    smooth = [[0.0] * 5, [0.0] * 5]
    unsure = [[0.0] * 5, [0.0] * 5]
    for factor in (1.0, 3.0, 0.5):
        set_grads(model, factor)
        meter.observe(model)
        for i in range(2):
            for j in range(5):
                now = abs(ROWS[i][j] * GRADS[i][j] * factor)
                smooth[i][j] = 0.85 * smooth[i][j] + 0.15 * now
                unsure[i][j] = 0.85 * unsure[i][j] + 0.15 * abs(now - smooth[i][j])
    expected = []
    for i in range(2):
        a0, a1, e, b0, b1 = (s * u for s, u in zip(smooth[i], unsure[i], strict=True))
        expected.append(e + (a0 + a1) / 2 + (b0 + b1) / 2)
    assert meter.scores(model).tolist() == pytest.approx(expected, rel=1e-5)
    # Row 0's E alone: smoothed sensitivity 0.45, 1.7325, 1.697625.
    assert smooth[0][2] == pytest.approx(1.697625)


def test_lora_pairs_have_no_e() -> None:
    model = inject(nn.ModuleDict({"layer": nn.Linear(2, 2)}), "all-linear", ())
    load_rows(model, {"layer": torch.tensor([[1.0, -2.0, 0.5, 1.0]])}, LowRank(scale=1.0))
    model.gradient.copy_(torch.tensor([0.5, 0.25, 2.0, -1.0]))
    meter = ImportanceMeter("sensitivity")
    meter.observe(model)
    assert meter.scores(model).tolist() == pytest.approx([1.5])


@pytest.mark.parametrize("kind", IMPORTANCES)
def test_scores_are_in_name_order_and_of_live_triplets_alone(kind: Any) -> None:
    """Whatever the order of the layers; an adapter that is dead but stays in has no score."""
    layers = {name: nn.Linear(2, 2) for name in ("c", "dead", "a")}
    model = inject(nn.ModuleDict(layers), "all-linear", ())
    rows = {"c": torch.tensor(ROWS), "a": torch.tensor(ROWS[:1]), "dead": torch.zeros(0, 5)}
    load_rows(model, rows, SINGULAR, keep_dead=True)
    grads = {"c": torch.tensor(GRADS), "a": torch.tensor(GRADS[:1])}
    model.gradient.copy_(model.index.pack(split_rows(grads, SINGULAR, model.shapes), {}))
    meter, one = ImportanceMeter(kind), ImportanceMeter(kind)
    meter.observe(model)
    alone = two_by_two()
    set_grads(alone, 1.0)
    one.observe(alone)
    first, second = one.scores(alone).tolist()
    assert first != second
    assert meter.scores(model).tolist() == [first, first, second]


def test_dead_adapters_are_not_scored() -> None:
    model = two_by_two()
    load_rows(model, {"layer": torch.zeros(0, 5)}, SINGULAR, keep_dead=True)
    for kind in IMPORTANCES:
        meter = ImportanceMeter(kind)  # type: ignore[arg-type]
        for part in model.adapters["layer"].parts.values():
            part.grad = torch.ones_like(part)
        meter.observe(model)
        assert meter.scores(model).tolist() == []


def test_orthogonality_penalty_by_hand() -> None:
    """||A A^T - I||^2 + ||B^T B - I||^2 for A = [[1, -2], [0, 4]], B^T = [[.5, 1], [2, 0]]."""
    # A A^T = [[5, -8], [-8, 16]]: 16 + 64 + 64 + 225; B^T B = [[1.25, 1], [1, 4]]: .0625 + 2 + 9
    assert orthogonality_penalty(two_by_two()).item() == pytest.approx(369 + 11.0625)


# ---- votes ----


def vote_state(dead: Sequence[int] = ()) -> ServerState:
    """Two adapters "a", "b" (3 x 3) of three triplets each, in a round whose budget is 3."""
    mask = torch.ones(6, dtype=torch.bool)
    mask[list(dead)] = False
    state = ServerState(
        adapter=AdapterSpec(
            lora_rank=3,
            lora_alpha=3.0,
            client_lora_ranks=(3,) * 40,
            shapes={"a": (3, 3), "b": (3, 3)},
        ),
        seed=0,
        num_rounds=10,
        vector=torch.zeros(0),
        index=EMPTY,
        rank_masks={"a": mask[:3], "b": mask[3:]},
        last_round=torch.full((40,), -1),
        round_index=2,
    )
    rows = {name: torch.zeros(n, 7) for name, n in state.live_triplets.items()}
    parts = split_rows(rows, SINGULAR, state.adapter.shapes)
    return with_parts(state, SINGULAR, parts, {"head": torch.zeros(2)})


def vote(
    client_id: int,
    num_examples: int,
    bits: Sequence[int],
    scores: Sequence[float] = (),
    value: float = 1.0,
) -> Upload:
    values = torch.cat([torch.full((7 * len(bits) + 2,), value), torch.tensor(scores)])
    return make_upload(
        client_id=client_id,
        num_examples=num_examples,
        train_loss=0.0,
        values=values,
        bits=torch.tensor(bits, dtype=torch.bool),
    )


def method(**settings: Any) -> FedAra:
    """Round 2 of 10 is in the last rounds already: the budget is half of the first."""
    return FedAra(warmup_fraction=0.0, final_fraction=1.0, final_budget=0.5, **settings)


def three_votes(scores: Sequence[float] = ()) -> Received:
    return Received.of(
        [
            vote(0, 1, [1, 0, 1, 0, 1, 0], scores, value=8.0),
            vote(1, 2, [1, 0, 1, 0, 0, 1], scores, value=4.0),
            vote(2, 5, [1, 1, 0, 0, 0, 1], scores, value=0.0),
        ]
    )


def test_vote_shares_by_hand() -> None:
    assert three_votes().share_of_bits().tolist() == [1.0, 5 / 8, 3 / 8, 0.0, 1 / 8, 7 / 8]


@pytest.mark.parametrize(
    ("threshold", "a", "b"),
    [
        (0.0, [1, 1, 1], [1, 1, 1]),
        (0.125, [1, 1, 1], [0, 1, 1]),
        (0.5, [1, 1, 0], [0, 0, 1]),
        (0.625, [1, 1, 0], [0, 0, 1]),  # a share at the threshold stays
        (0.626, [1, 0, 0], [0, 0, 1]),
        (1.0, [1, 0, 0], [0, 0, 0]),
    ],
)
def test_threshold_arbitration(threshold: float, a: list[int], b: list[int]) -> None:
    after = method(vote_threshold=threshold).aggregate(vote_state(), three_votes())
    assert chosen(after.rank_masks) == {"a": a, "b": b}
    # (1 x 8 + 2 x 4) / 8 = 2 where it lives; no row where it does not, no adapter without a row.
    assert {name: rows.tolist() for name, rows in join_rows(after.parts).items()} == {
        name: [[2.0] * 7] * sum(mask) for name, mask in {"a": a, "b": b}.items() if any(mask)
    }
    assert after.whole["head"].tolist() == [2.0, 2.0]


def test_votes_are_about_live_triplets_only() -> None:
    """With triplets 1 and 3 dead a vote has four bits, for 0, 2, 4 and 5."""
    votes = [vote(0, 3, [0, 1, 1, 0]), vote(1, 1, [1, 0, 1, 1])]
    after = method().aggregate(vote_state(dead=[1, 3]), Received.of(votes))
    assert chosen(after.rank_masks) == {"a": [0, 0, 1], "b": [0, 1, 0]}


@pytest.mark.parametrize("num_clients", [1, 3, 6, 10])
def test_a_unanimous_vote_is_a_share_of_one(num_clients: int) -> None:
    votes = [vote(k, 1, [1, 1, 1, 0, 0, 0]) for k in range(num_clients)]
    after = method(vote_threshold=1.0).aggregate(vote_state(), Received.of(votes))
    assert chosen(after.rank_masks) == {"a": [1, 1, 1], "b": [0, 0, 0]}


def test_half_of_the_examples_reach_a_threshold_of_half() -> None:
    """Whichever clients hold them."""
    for num_examples in ([1, 4, 2, 7], [1, 6, 2, 9], [1, 16, 2, 19], [3, 3, 5, 11]):
        *some, rest = num_examples
        assert sum(some) == rest
        votes = [vote(k, n, [1, 1, 1, 0, 0, 0]) for k, n in enumerate(some)]
        votes.append(vote(len(some), rest, [0, 0, 0, 1, 1, 1]))
        after = method(vote_threshold=0.5).aggregate(vote_state(), Received.of(votes))
        assert chosen(after.rank_masks) == {"a": [1, 1, 1], "b": [1, 1, 1]}, num_examples


def test_budget_arbitration_takes_the_largest_shares() -> None:
    votes = three_votes(scores=[0.0] * 6)
    after = method(arbitration="budget").aggregate(vote_state(), votes)
    assert chosen(after.rank_masks) == {"a": [1, 1, 0], "b": [0, 0, 1]}


def test_budget_ties_go_to_the_larger_mean_score() -> None:
    """Triplets 0, 2, 5 tie at a share of 1; the mean score counts examples: 2, 3, 1."""
    votes = [
        vote(0, 1, [1, 0, 1, 0, 0, 1], [8.0, 90.0, 0.0, 90.0, 90.0, 1.0]),
        vote(1, 3, [1, 0, 1, 0, 0, 1], [0.0, 90.0, 4.0, 90.0, 90.0, 1.0]),
    ]
    two = FedAra(warmup_fraction=0.0, final_fraction=1.0, final_budget=2 / 6, arbitration="budget")
    one = replace(two, final_budget=1 / 6)
    after = two.aggregate(vote_state(), Received.of(votes))
    assert chosen(after.rank_masks) == {"a": [1, 0, 1], "b": [0, 0, 0]}
    after = one.aggregate(vote_state(), Received.of(votes))
    assert chosen(after.rank_masks) == {"a": [0, 0, 1], "b": [0, 0, 0]}
    # The scores are no part of the model.
    assert join_rows(after.parts)["a"].tolist() == [[1.0] * 7]
    assert after.whole["head"].tolist() == [1.0, 1.0]


def test_budget_ties_of_score_go_to_the_lower_index() -> None:
    votes = [vote(k, 2, [0, 1, 1, 1, 1, 1], [9.0, 1.0, 1.0, 1.0, 1.0, 1.0]) for k in (0, 1)]
    after = method(arbitration="budget").aggregate(vote_state(), Received.of(votes))
    assert chosen(after.rank_masks) == {"a": [0, 1, 1], "b": [1, 0, 0]}


def test_no_vote_where_the_budget_is_met() -> None:
    state = vote_state(dead=[0, 1, 2])
    assert not method().votes(state)
    assert method().votes(vote_state(dead=[0, 1]))
    after = method().aggregate(state, Received.of([vote(0, 1, [0, 0, 0], value=5.0)]))
    assert chosen(after.rank_masks) == {"a": [0, 0, 0], "b": [1, 1, 1]}
    assert join_rows(after.parts)["b"].tolist() == [[5.0] * 7] * 3


# ---- whole runs ----


@pytest.mark.parametrize("arbitration", ["threshold", "budget"])
def test_bytes_and_masks_of_a_run(arbitration: str) -> None:
    """Both directions counted from the masks by hand, every round; what is pruned stays pruned."""
    job = make_tiny_job(f"method.arbitration={arbitration}", *SHORT)
    shapes = job.model.shapes
    voting = []
    for played in play_rounds(job):
        before, after, row = played.before, played.after, played.row
        live = {name: int(mask.sum()) for name, mask in before.rank_masks.items()}
        num_live = sum(live.values())
        rows = sum(n * (shapes[name][1] + 1 + shapes[name][0]) for name, n in live.items())
        size = 24 + 4 * (rows + NUM_HEAD)
        budget = TINY_BUDGET[row["round_index"]]
        up = size
        if budget < num_live:
            voting.append(row["round_index"])
            up += -(-num_live // 8) + (4 * num_live if arbitration == "budget" else 0)
        assert row["uplink_bytes"] == 5 * up
        down = size + 48 // 8 if row["round_index"] else 24  # the seed gives the start
        assert row["downlink_bytes"] == 5 * down
        for name, mask in after.rank_masks.items():
            assert not (mask & ~before.rank_masks[name]).any()
            live = [own[name] for own in after.parts.values() if name in own]
            assert {len(rows) for rows in live} <= {int(mask.sum())}
            assert bool(live) == bool(mask.any())
        if arbitration == "budget":
            assert row["live_triplets"] == budget
        if budget == num_live:
            assert after.rank_masks.keys() == before.rank_masks.keys()
            assert row["live_triplets"] == num_live
        by_adapter = {name: int(mask.sum()) for name, mask in after.rank_masks.items()}
        assert row["live_triplets_by_adapter"] == by_adapter
        assert row["live_adapters"] == sum(n > 0 for n in by_adapter.values())
    assert voting[:3] == [2, 3, 4] if arbitration == "budget" else voting[0] == 2
    assert row["live_triplets"] < 24


def test_clients_vote_for_the_budget() -> None:
    job = make_tiny_job(*SHORT)
    rounds = play_rounds(job, num_rounds=3)
    for state, num_bits, num_votes in (
        (rounds[1].before, 0, 0),
        (rounds[2].before, 48, TINY_BUDGET[2]),
    ):
        for client_id in draw_cohort(job, state.round_index)[:2]:
            bits = train_one_client(job, state, client_id).bits
            assert bits.numel() == num_bits
            assert int(bits.sum()) == num_votes


def test_module_pruning_changes_cost_alone() -> None:
    """Same bits with and without it; without it emptied adapters keep parameters.

    Under clipping, too: rows of a dead adapter are outside the vector, and so of the gradient norm.
    """
    common = ("method.final_budget=0.1", "train.max_grad_norm=0.1", *SHORT)
    on, off = make_tiny_job(*common), make_tiny_job("method.module_pruning=false", *common)
    rounds = play_rounds(on)
    flops = []
    for ours, theirs in zip(rounds, play_rounds(off), strict=True):
        costs = [round_.row.pop("clients") for round_ in (ours, theirs)]
        assert ours.row == theirs.row
        flops.append([sum(cost.flops for cost in clients) for clients in costs])
    pruned, kept = zip(*flops, strict=True)
    assert pruned[0] == kept[0]  # nothing is dead yet
    assert pruned[-1] < kept[-1]
    state = rounds[-1].after
    dead = [name for name, n in state.live_triplets.items() if not n]
    assert len(dead) >= 7  # 5 triplets can not be in more than 5 of 12 adapters
    sizes, logits = [], []
    batch = on.evaluated.batch(torch.arange(20), on.device)
    for job in (on, off):
        job.method.download(job.model, state, None)
        job.model.module.eval()
        with torch.no_grad():
            logits.append(job.model.module(batch["input_ids"], batch["attention_mask"]))
        adapters = job.model.adapters.values()
        sizes.append(sum(p.numel() for a in adapters for p in a.parts.parameters()))
    assert torch.equal(logits[0], logits[1])
    shapes = on.model.shapes
    assert sizes[1] - sizes[0] == sum(sum(shapes[name]) + 1 for name in dead)


@pytest.mark.parametrize(
    ("svd", "ranks", "modules"),
    [
        (False, False, False),
        (True, False, False),
        (True, True, False),
        (False, True, True),
        (True, False, True),
    ],
)
def test_the_three_switches(svd: bool, ranks: bool, modules: bool) -> None:
    job = make_tiny_job(
        f"method.truncated_svd={str(svd).lower()}",
        f"method.rank_allocation={str(ranks).lower()}",
        f"method.module_pruning={str(modules).lower()}",
        *("federation.num_rounds=4", "evaluate.every=9", *SHORT),
    )
    rounds = play_rounds(job)
    for name, rows in join_rows(rounds[-1].after.parts).items():
        num_live, shape = rounds[-1].after.live_triplets[name], job.model.shapes[name]
        assert rows.shape == (num_live, sum(shape) + int(svd))
    assert (rounds[-1].row["live_triplets"] < 48) == ranks
    live = rounds[-1].before.live_triplets
    shapes = job.model.shapes
    floats = sum(n * (sum(shapes[name]) + int(svd)) for name, n in live.items())
    mask = 48 // 8 if ranks else 0
    assert rounds[-1].row["downlink_bytes"] == 5 * (24 + 4 * (floats + NUM_HEAD) + mask)
    if not svd and not ranks:
        lora = play_rounds(
            make_tiny_job("method.name=lora", "federation.num_rounds=4", *SHORT), num_rounds=2
        )
        digests = [played.row["state_digest"] for played in lora]
        assert digests == [played.row["state_digest"] for played in rounds[:2]]


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_every_importance_prunes_to_the_budget(importance: str) -> None:
    job = make_tiny_job(
        *(f"method.importance={importance}", "method.arbitration=budget"),
        *("federation.num_rounds=3", "evaluate.every=9", *SHORT),
    )
    assert [played.row["live_triplets"] for played in play_rounds(job)] == [48, 48, 12]


def test_e_has_a_learning_rate_of_its_own() -> None:
    """AdamW's first step moves every value by its learning rate."""
    job = make_tiny_job("method.e_lr_factor=3.0", "train.lr=0.01")
    client = Client(client_id=0, num_examples=1, model=job.model)
    job.method.download(job.model, job.state, client)
    start_client(client, job.method, job.training, job.state)
    client.gradient.fill_(1.0)
    client.step()
    moved = job.state.vector - job.model.vector
    index = job.state.index
    rates = {part: moved[run].mean().item() for part, run in index.runs.items()}
    assert rates == pytest.approx({"A": 0.01, "E": 0.01 * 3.0, "B": 0.01, "": 0.01}, rel=1e-4)
    for run in index.runs.values():
        assert moved[run].max() - moved[run].min() < 1e-6


def test_orthogonality_pulls_the_factors_together() -> None:
    penalties = []
    for weight in (0.0, 1.0):
        job = make_tiny_job(f"method.orthogonality={weight}", "train.lr=0.02", *SHORT)
        after = play_rounds(job, num_rounds=1)[-1].after
        job.method.download(job.model, after, None)
        penalties.append(orthogonality_penalty(job.model).item())
    assert penalties[1] < 0.8 * penalties[0]


# ---- importance_per_cost ----

PER_COST = "method.importance_per_cost=1.0"
FEW = ("method.final_budget=0.1", "federation.num_rounds=8", "evaluate.every=9", *SHORT)


@pytest.mark.parametrize("arbitration", ["threshold", "budget"])
@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_every_score_is_divided_by_the_cost(
    importance: str, arbitration: str, power: float
) -> None:
    """The vote is of the quotients, and so are the scores that travel; all else is as without."""
    words = (f"method.importance={importance}", f"method.arbitration={arbitration}", *SHORT)
    job = make_tiny_job(f"method.importance_per_cost={power}", *words)
    state = play_rounds(job, num_rounds=2)[-1].after
    uploads = [
        train_one_client(own, state, client_id=0)
        for own in (make_tiny_job("method.arbitration=budget", words[0], *SHORT), job)
    ]
    num_sent = state.index.num_sent
    assert torch.equal(uploads[0].values[:num_sent], uploads[1].values[:num_sent])
    scores = uploads[0].values[num_sent:] / relative_costs(job.model) ** power
    assert torch.equal(uploads[1].bits, top_k(scores, TINY_BUDGET[2]))
    sent = scores if arbitration == "budget" else scores[:0]
    assert torch.equal(uploads[1].values[num_sent:], sent)


def test_without_it_low_layers_live_longer() -> None:
    """The backward pass ends higher up, in fewer layers; bytes are those of as many triplets."""
    words = ("method.arbitration=budget", *FEW)
    reached = []
    for option in ((), (PER_COST,)):
        rounds = play_rounds(make_tiny_job(*option, *words))
        reached.append([p.row["clients"][0].num_backward_layers for p in rounds])
        assert rounds[-1].row["live_triplets"] == 5
        for played in rounds:
            num_live = played.before.num_live
            bits = -(-num_live // 8) + 4 * num_live if played.row["live_triplets"] < num_live else 0
            size = 24 + 4 * played.before.index.num_sent
            assert played.row["uplink_bytes"] == 5 * (size + bits)
            sent = size + 48 // 8 if played.before.round_index else 24  # the start is free
            assert played.row["downlink_bytes"] == 5 * sent
    without, with_it = reached
    assert without[0] == with_it[0] == 12
    assert all(ours <= theirs for ours, theirs in zip(with_it, without, strict=True))
    assert with_it[-1] < without[-1]


def test_it_changes_nothing_where_all_triplets_cost_the_same() -> None:
    """In one adapter; and by default it is off."""
    words = ("adapter.targets=['encoder.encoder.layer.1.output.dense']", *SHORT)
    on, off, default = (
        [played.row["state_digest"] for played in play_rounds(make_tiny_job(*option, *words))]
        for option in ((PER_COST,), ("method.importance_per_cost=0.0",), ())
    )
    assert on == off == default


@pytest.mark.parametrize("arbitration", ["threshold", "budget"])
def test_costs_are_the_same_on_every_process(arbitration: str) -> None:
    words = (PER_COST, f"method.arbitration={arbitration}", *FEW)
    digests = [played.row["state_digest"] for played in play_rounds(make_tiny_job(*words))]
    jobs = [make_tiny_job(*words) for _ in range(3)]

    def run(communicator: Communicator) -> list[str]:
        rounds = play_rounds(jobs[communicator.world_rank], communicator=communicator)
        return [played.row["state_digest"] for played in rounds]

    assert in_turn(3, run) == [digests] * 3


# ---- settings ----


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vote_threshold", -0.1),
        ("vote_threshold", 1.5),
        ("final_budget", 2.0),
        ("warmup_fraction", -1.0),
        ("final_fraction", 1.1),
        ("init_std", 0.0),
        ("e_lr_factor", -1.0),
        ("orthogonality", -0.5),
        ("importance_per_cost", -1.0),
    ],
)
def test_settings_out_of_range_are_named(key: str, value: float) -> None:
    with pytest.raises(InputError) as error:
        FedAra(**{key: value})
    assert f"method.{key} = {value}" in str(error.value)
    assert "must be" in str(error.value)


def test_magnitude_needs_e() -> None:
    with pytest.raises(InputError, match="truncated_svd"):
        FedAra(importance="magnitude", truncated_svd=False)
    assert FedAra(importance="magnitude").importance == "magnitude"


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("method.importance=luck", "'sensitivity'"),
        ("method.arbitration=coin", "'threshold' or 'budget'"),
        ("method.final_budget=half", "method.final_budget"),
        ("method.regrow=true", "unknown key method.regrow"),
    ],
)
def test_settings_of_a_wrong_kind_are_refused(override: str, text: str) -> None:
    with pytest.raises(InputError) as error:
        make_tiny_job(override)
    assert text in str(error.value)
    assert "\n" not in str(error.value)
