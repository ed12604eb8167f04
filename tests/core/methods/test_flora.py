"""FLoRA: stacking is the exact mean, merging is the function, and only stacks travel down."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.models.encoders import build_model
from bench.run.clients import draw_cohort
from fedara_core.adapters import AdapterSpec, LowRank, inject
from fedara_core.merge.received import Received
from fedara_core.method import Client, missed_values
from fedara_core.methods.flora import FLora, fresh
from fedara_core.state import ServerState, Start, with_parts
from fedara_core.wire import Upload, make_upload
from support.pairs import model_parts, sent_pairs, update
from support.rounds import make_tiny_job, play_rounds, received, train_one_client

ROW_FLOATS = 8 * (32 + 32) + 4 * (64 + 32)  # one row of every adapter of tiny.toml's model
DENSE = 8 * 32 * 32 + 4 * 64 * 32
NUM_HEAD = 4 * 32 + 4
FLORA = "method.name=flora"
UNEQUAL = "adapter.client_lora_ranks=[{lora_rank=1, share=0.5}, {lora_rank=4, share=0.5}]"
SHAPES = {"a": (3, 5), "b": (4, 4)}


def small_state(client_lora_ranks: Sequence[int]) -> ServerState:
    """Adapters "a" (3 x 5) and "b" (4 x 4), two triplets each, scale 3; a head of three."""
    module = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Linear(4, 4), "head": nn.Linear(2, 1)})
    model = inject(module, ["a", "b"], ["head.weight", "head.bias"])
    adapter = AdapterSpec(
        lora_rank=2,
        lora_alpha=6.0,
        client_lora_ranks=tuple(client_lora_ranks),
        shapes=model.shapes,
    )
    return FLora().init(Start(model=model, adapter=adapter, seed=0, num_rounds=4))


def small_upload(client_id: int, num_examples: int, client_lora_rank: int, draw: int = 0) -> Upload:
    generator = torch.Generator().manual_seed(100 * draw + client_id)
    return make_upload(
        client_id=client_id,
        num_examples=num_examples,
        train_loss=0.0,
        values=torch.randn(client_lora_rank * (8 + 8) + 3, generator=generator),
    )


def mean_update(
    state: ServerState, uploads: Sequence[Upload], client_lora_ranks: Sequence[int]
) -> dict[str, np.ndarray]:
    """sum_k p_k scale B_k A_k of each adapter, dense (d_out, d_in)."""
    total = sum(upload.num_examples for upload in uploads)
    dense = {name: np.zeros(shape) for name, shape in state.adapter.shapes.items()}
    for upload in uploads:
        share = upload.num_examples / total
        pairs = sent_pairs(upload.values, client_lora_ranks[upload.client_id], state.adapter.shapes)
        for name, (a, b) in pairs.items():
            dense[name] += share * state.adapter.scale * b @ a
    return dense


# ---- aggregation ----


def test_the_merged_delta_is_the_exact_mean() -> None:
    """Over two rounds of unequal capacities, on a non-square and a square layer."""
    ranks = (2, 1, 2)
    state = small_state(ranks)
    expected = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for draw, clients in enumerate([(0, 1, 2), (1, 2)]):
        uploads = [small_upload(k, 1 + 3 * k, ranks[k], draw) for k in clients]
        for name, change in mean_update(state, uploads, ranks).items():
            expected[name] += change
        state = FLora().aggregate(state, Received.of(uploads))
        for name, change in expected.items():
            assert state.fixed["delta"][name].dtype == torch.float32
            np.testing.assert_allclose(state.fixed["delta"][name], change, atol=1e-5)
    assert np.abs(expected["b"] - expected["b"].T).max() > 1  # a transposed one would show
    assert state.extra["stacked_rows"].tolist() == [5, 3, 0, 0]
    head = torch.cat([state.whole["head.bias"], state.whole["head.weight"].reshape(-1)])
    torch.testing.assert_close(head, (4 * uploads[0].values[-3:] + 7 * uploads[1].values[-3:]) / 11)


def test_the_servers_model_computes_the_mean() -> None:
    """Evaluated, and trained from, is the plain model with W0 + the updates of two rounds."""
    job = make_tiny_job(FLORA, UNEQUAL, "adapter.lora_alpha=6.0", "train.lr=2e-2")
    plain = build_model(job.config.model, num_classes=4, seed=job.config.seed).model.eval()
    state = job.state
    for round_index in range(2):
        uploads = [train_one_client(job, state, k) for k in draw_cohort(job, round_index)]
        with torch.no_grad():
            for name, change in mean_update(
                state, uploads, state.adapter.client_lora_ranks
            ).items():
                plain.get_submodule(name).weight += torch.from_numpy(change).float()
        state = job.method.aggregate(state, received(job.method, state, uploads))
    batch = job.evaluated.batch(torch.arange(20), job.device)
    with torch.no_grad():
        for name, tensor in state.whole.items():
            plain.get_parameter(name).copy_(tensor)
        expected = plain(batch["input_ids"], batch["attention_mask"])
        for client in (None, Client(client_id=0, num_examples=1, model=job.model)):
            job.method.download(job.model, state, client)
            logits = job.model.module.eval()(batch["input_ids"], batch["attention_mask"])
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def drawn_a(state: ServerState, client_id: int) -> Mapping[str, Tensor]:
    """The A that a client draws from (seed, round, client_id)."""
    return fresh(state, state.round_index, client_id)["A"]


def test_every_client_starts_every_round_afresh() -> None:
    """B = 0, and an A that depends on the seed, the round and the client alone."""
    job = make_tiny_job(FLORA, "train.local_steps=1")
    other = make_tiny_job(FLORA, "train.local_steps=1", "train.lr=1e-4")
    starts = []
    for own in (job, other):
        states = [own.state, play_rounds(own, num_rounds=1)[-1].after]
        for state, client_id in product(states, (0, 3)):
            client = Client(client_id=client_id, num_examples=1, model=own.model)
            own.method.download(own.model, state, client)
            parts = model_parts(own.model)
            assert not any(b.any() for b in parts["B"].values())
            starts.append({name: a.clone() for name, a in parts["A"].items()})
    for name, (_, d_in) in job.state.adapter.shapes.items():
        drawn = [start[name] for start in starts]
        assert all(a.abs().max() <= d_in**-0.5 and a.std() > 0.5 * d_in**-0.5 for a in drawn)
        assert len({a.sum().item() for a in drawn[:4]}) == 4
        assert all(torch.equal(a, b) for a, b in zip(drawn[:4], drawn[4:], strict=True))


def entropy_rank(matrix: Tensor) -> float:
    """exp of the entropy of the squared singular values' shares: 1 for rank one, at most d."""
    energy = torch.linalg.svdvals(matrix.double()) ** 2
    share = energy[energy > 0] / energy.sum()
    return float((-share * share.log()).sum().exp())


def test_the_stack_spans_more_than_one_clients_rows() -> None:
    """What the downlink pays for: the mean entropy rank of the merged changes of one round of eight
    clients of lora_rank 4 is 5.4; with one A for all of them it was 2.5."""
    (played,) = play_rounds(make_tiny_job(FLORA, "federation.cohort=8"), num_rounds=1)
    ranks = [entropy_rank(delta) for delta in played.after.fixed["delta"].values()]
    assert np.mean(ranks) > 5


def test_one_client_is_lora_for_a_round() -> None:
    """Its B A, merged; from there on LoRA goes on with its factors."""
    common = ("federation.num_clients=1", "federation.cohort=1", "adapter.lora_alpha=6.0")
    job, lora = make_tiny_job(FLORA, *common), make_tiny_job("method.name=lora", *common)
    (ours,) = play_rounds(job, num_rounds=1)
    start = {"A": drawn_a(job.state, 0), "B": lora.state.parts["B"]}
    state = with_parts(lora.state, lora.method.form(lora.state), start, lora.state.whole)
    (theirs,) = play_rounds(lora, state, 1)
    assert ours.row["train_loss"] == theirs.row["train_loss"]
    for name in theirs.after.adapter.shapes:
        merged = update(theirs.after.parts, name, 1.5)
        assert merged.abs().max() > 1e-3
        delta = ours.after.fixed["delta"][name].double()
        torch.testing.assert_close(delta, merged, rtol=0, atol=1e-7)
    assert all(torch.equal(ours.after.whole[k], theirs.after.whole[k]) for k in ours.after.whole)


# ---- capacities and bytes ----


def test_clients_train_their_first_rows() -> None:
    job = make_tiny_job(FLORA, UNEQUAL)
    assert sorted(job.state.adapter.client_lora_ranks) == [1] * 4 + [4] * 4
    for client_id, client_lora_rank in enumerate(job.state.adapter.client_lora_ranks):
        client = Client(client_id=client_id, num_examples=1, model=job.model)
        size = job.method.download(job.model, job.state, client)
        assert size.num_bytes("fp32") == 24
        own, drawn = model_parts(job.model), drawn_a(job.state, client_id)
        for name, (d_out, _) in job.state.adapter.shapes.items():
            assert torch.equal(own["A"][name], drawn[name][:client_lora_rank])
            assert torch.equal(own["B"][name], torch.zeros(client_lora_rank, d_out))
        # lora_alpha 4 / lora_rank 4, whatever r_k is
        assert {adapter.form for adapter in job.model.adapters.values()} == {LowRank(scale=1.0)}


def test_missed_values_by_hand() -> None:
    """Of 3 x 5 and 4 x 4: n rows are 8 n + 8 n floats, dense 15 + 16."""
    last_round = torch.tensor([2, 1, 0, -1, -1])
    state = replace(small_state([2] * 5), round_index=3, last_round=last_round)
    state = replace(state, extra={"stacked_rows": torch.tensor([7, 3, 1, 0])})
    # Client 2 was in round 0, so it has seen none of the three stacks, like a client that is new.
    assert [missed_values(state, k) for k in range(4)] == [16, 31, 31, 31]
    two_rows = replace(state, extra={"stacked_rows": torch.tensor([0, 0, 2, 0])})
    assert missed_values(two_rows, 0) == 15 + 16  # 16 > 15 in "a", 16 <= 16 in "b"
    assert missed_values(replace(state, round_index=0), 4) == 0


@pytest.mark.parametrize("setting", [UNEQUAL, "federation.cohort=3"])
def test_bytes_of_a_run(setting: str) -> None:
    """Up r_k rows; down every stack since the client's last round, at most the dense change."""
    job = make_tiny_job(FLORA, "federation.cohort=2", setting, "train.local_steps=1")
    ranks, shapes = job.state.adapter.client_lora_ranks, job.model.shapes
    stacks: list[int] = []
    took_part: dict[int, int] = {}
    kinds = set()
    for round_index, played in enumerate(play_rounds(job)):
        cohort = played.row["cohort"]
        up = down = 0
        for client_id in cohort:
            up += 24 + 4 * (ranks[client_id] * ROW_FLOATS + NUM_HEAD)
            num_rows = sum(stacks[took_part.get(client_id, 0) :])
            missed = sum(min(num_rows * (m + n), m * n) for m, n in shapes.values())
            down += 24 + 4 * (missed + NUM_HEAD if round_index else 0)
            kinds.add((client_id in took_part, 0 < missed < DENSE))
            took_part[client_id] = round_index
        stacks.append(sum(ranks[client_id] for client_id in cohort))
        assert played.row["uplink_bytes"] == up
        assert played.row["downlink_bytes"] == down
    assert {(True, True), (False, False)} <= kinds  # a later round with stacks, a late first one
    assert played.after.extra["stacked_rows"].tolist() == stacks


def test_bytes_where_all_take_part() -> None:
    """The last round's stack, sum_k r_k rows; three clients stay below the dense limit."""
    job = make_tiny_job(
        FLORA, "federation.num_clients=3", "federation.cohort=3", "train.local_steps=1"
    )
    rounds = play_rounds(job)
    assert [r.row["uplink_bytes"] for r in rounds] == [3 * (24 + 4 * (4 * ROW_FLOATS + 132))] * 6
    later = 3 * (24 + 4 * (12 * ROW_FLOATS + NUM_HEAD))
    assert [r.row["downlink_bytes"] for r in rounds] == [3 * 24] + [later] * 5
