"""LoRA-A2's equations: alternation, the choice of triplets, frozen rows, aggregation and bytes."""

from collections.abc import Mapping, Sequence
from itertools import islice

import pytest
import torch
from torch import Tensor, nn

from bench.run.clients import client_batches
from bench.run.job import Job
from fedara_core.adapters import (
    AdapterConfig,
    LowRank,
    Rows,
    adapter_shapes,
    inject,
    named_adapters,
    read_rows,
    write_rows,
)
from fedara_core.errors import InputError
from fedara_core.method import Client, ServerState, write_whole
from fedara_core.methods.lora_a2 import LoraA2
from fedara_core.train import start_client
from fedara_core.wire import Upload
from support.rounds import make_tiny_job, play_rounds, train_one_client

A2 = ("method.name=lora_a2", "model.dropout=0.0")
SHORT = ("train.local_steps=2", "evaluate.every=9")
NUM_HEAD = 4 * 32 + 4  # tiny.toml's model
HEAD = ("classifier.bias", "classifier.weight")


def train(job: Job, state: ServerState, client_id: int, num_steps: int) -> Client:
    """A client after its first local steps of the state's round."""
    client = Client(client_id=client_id, num_examples=len(job.shards[client_id]), model=job.model)
    job.method.download(job.model, state, client)
    start_client(client, job.method, job.training, state)
    for batch in islice(client_batches(job, state.round_index, client_id), num_steps):
        job.method.local_step(client, batch)
    return client


def changed_rows(before: Rows, after: Rows) -> dict[str, Tensor]:
    return {name: (before[name] != after[name]).any(dim=1) for name in before}


# ---- alternation ----


def test_everything_chosen_is_alternating_fedavg_by_hand() -> None:
    """Plain loops over B, then A, then B, with AdamW at 5 lr for B."""
    job = make_tiny_job(
        *(*A2, "method.budget=1.0", "train.local_steps=3", "train.lr=4e-3", "adapter.lora_alpha=8"),
        *("federation.cohort=3", "federation.num_rounds=3", "evaluate.every=9"),
    )
    rows: Rows = job.state.rows
    masks = {name: torch.ones(4).bool() for name in rows}
    head: Mapping[str, Tensor] = job.state.whole
    for played in play_rounds(job):
        cohort, part = played.row["cohort"], "BAB"[played.before.round_index]
        num_examples = [len(job.shards[client_id]) for client_id in cohort]
        new_rows = {name: torch.zeros_like(rows[name]) for name in rows}
        new_head = {name: torch.zeros_like(head[name]) for name in head}
        for client_id, n in zip(cohort, num_examples, strict=True):
            write_rows(job.model, rows, masks, LowRank(scale=2.0))
            write_whole(job.model, head)
            halves = [adapter.parts[part] for _, adapter in named_adapters(job.model)]
            heads = [job.model.get_parameter(name) for name in HEAD]
            lr = {"A": 4e-3, "B": 5 * 4e-3}[part]
            optimizer = torch.optim.AdamW(
                [{"params": halves, "lr": lr}, {"params": heads, "lr": 4e-3}], weight_decay=0.0
            )
            job.model.train()
            for batch in client_batches(job, played.before.round_index, client_id):
                job.model.zero_grad()
                logits = job.model(batch["input_ids"], batch["attention_mask"])
                nn.functional.cross_entropy(logits, batch["labels"]).backward()
                nn.utils.clip_grad_norm_([*halves, *heads], 1.0)
                optimizer.step()
            for name, values in read_rows(job.model).items():
                new_rows[name] += n / sum(num_examples) * values
            for name in HEAD:
                new_head[name] += n / sum(num_examples) * job.model.get_parameter(name).detach()
        for name, (_, d_in) in adapter_shapes(job.model).items():
            after, before = played.after.rows[name], played.before.rows[name]
            torch.testing.assert_close(after, new_rows[name], rtol=0, atol=1e-6)
            resting = slice(0, d_in) if part == "B" else slice(d_in, None)
            assert torch.equal(after[:, resting], before[:, resting])
            assert not torch.equal(after, before)
        for name in HEAD:
            torch.testing.assert_close(played.after.whole[name], new_head[name], rtol=0, atol=1e-6)
        rows, head = played.after.rows, played.after.whole


def test_everything_chosen_at_one_rate_is_rolora() -> None:
    all_of_them = ("method.name=lora_a2", "method.budget=1.0", "method.b_lr_factor=1.0")
    ours = play_rounds(make_tiny_job(*all_of_them, "train.weight_decay=0.1", *SHORT))
    theirs = play_rounds(make_tiny_job("method.name=rolora", "train.weight_decay=0.1", *SHORT))
    digests = [played.row["state_digest"] for played in ours]
    assert digests == [played.row["state_digest"] for played in theirs]
    # A choice makes another run of it.
    half = play_rounds(
        make_tiny_job("method.name=lora_a2", "method.b_lr_factor=1.0", *SHORT), num_rounds=1
    )
    assert half[0].row["state_digest"] != digests[0]


def test_b_has_five_times_the_rate_of_a() -> None:
    job = make_tiny_job(*A2, *SHORT, "train.lr=0.01")
    for played, part, lr in zip(play_rounds(job, num_rounds=2), "BA", (0.05, 0.01), strict=True):
        client = train(job, played.before, 0, 0)
        assert client.optimizer is not None
        rates = {p: group["lr"] for group in client.optimizer.param_groups for p in group["params"]}
        for _, adapter in named_adapters(job.model):
            assert rates.pop(adapter.parts[part]) == pytest.approx(lr)
        assert list(rates.values()) == [0.01, 0.01]  # the head's


# ---- the choice ----


def test_the_choice_is_by_the_change_of_w() -> None:
    """Frobenius norms of dB_i A_i and B_i dA_i formed as matrices, the largest half of them all."""
    job = make_tiny_job(*A2, "method.probe_steps=3", "train.local_steps=3", "train.lr=1e-2")
    for state in (job.state, play_rounds(job, num_rounds=1)[-1].after):
        client = train(job, state, 2, 2)
        assert all(mask.all() for mask in client.notes["chosen"].values())
        probe = train(make_tiny_job(*A2, "method.probe_steps=9", "train.lr=1e-2"), state, 2, 3)
        norms = []
        for name, adapter in named_adapters(probe.model):
            d_in = adapter.shape[1]
            before, after = state.rows[name], adapter.read()
            for i in range(4):
                product = torch.outer(after[i, d_in:], after[i, :d_in])
                contribution = product - torch.outer(before[i, d_in:], before[i, :d_in])
                norms.append((float(contribution.norm()), name, i))
        best = {(name, i) for _, name, i in sorted(norms, reverse=True)[:24]}
        assert len({round(norm, 9) for norm, _, _ in norms}) > 24
        client = train(job, state, 2, 3)
        chosen = client.notes["chosen"]
        assert {(name, i) for name in chosen for i in range(4) if chosen[name][i]} == best
        bits = torch.cat([chosen[name] for name in sorted(chosen)])
        assert torch.equal(job.method.upload(client, state).bits, bits)


@pytest.mark.parametrize("round_index", [0, 1])
def test_what_is_not_chosen_goes_back_and_stays(round_index: int) -> None:
    """Under weight decay and with Adam's momentum from the probe."""
    job = make_tiny_job(*A2, "train.local_steps=5", "train.lr=1e-2", "train.weight_decay=0.1")
    state = job.state if round_index == 0 else play_rounds(job, num_rounds=1)[-1].after
    start = state.rows
    probed = read_rows(train(job, state, 1, 1).model)
    assert all(mask.all() for mask in changed_rows(start, probed).values())
    for num_steps in (2, 3, 5):
        client = train(job, state, 1, num_steps)
        now = read_rows(client.model)
        changed = changed_rows(start, now)
        assert sum(int(mask.sum()) for mask in changed.values()) == 24
        for name, mask in client.notes["chosen"].items():
            assert torch.equal(changed[name], mask)
    assert not any(torch.equal(now[name], probed[name]) for name in now)


def test_clipping_is_about_what_is_chosen() -> None:
    """After the probe an SGD step is as long as the bound, without what stays."""
    job = make_tiny_job(
        *(*A2, "train.optimizer=sgd", "train.lr=1.0", "train.max_grad_norm=1e-3"),
        *("method.b_lr_factor=1.0", "method.probe_steps=1", "method.budget=0.1"),
        *("method.freeze_head=true", "train.local_steps=2"),
    )
    first, second = (read_rows(train(job, job.state, 0, n).model) for n in (1, 2))
    step = torch.cat([(second[name] - first[name]).reshape(-1) for name in first])
    assert step.norm().item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_round_may_be_all_probe(num_steps: int) -> None:
    """The choice then comes at its end, whether or not the probe is over by then."""
    common = (*A2, f"train.local_steps={num_steps}")
    probed = train_one_client(
        make_tiny_job(*common, "method.probe_steps=9"), make_tiny_job(*A2).state, 4
    )
    exact = train_one_client(
        make_tiny_job(*common, f"method.probe_steps={num_steps}"), make_tiny_job(*A2).state, 4
    )
    assert int(probed.bits.sum()) == 24
    assert torch.equal(probed.bits, exact.bits)
    assert torch.equal(probed.values, exact.values)


def test_how_many_are_chosen() -> None:
    """budget x 12 adapters x the client's own lora_rank, at least one."""
    for budget, expected in ((0.5, 24), (0.25, 12), (0.01, 1), (1.0, 48)):
        job = make_tiny_job(*A2, *SHORT, f"method.budget={budget}")
        assert int(train_one_client(job, job.state, 0).bits.sum()) == expected
    ranks = "adapter.client_lora_ranks=[{lora_rank=1, share=0.5}, {lora_rank=3, share=0.5}]"
    job = make_tiny_job(*A2, *SHORT, ranks)
    assert sorted(job.state.adapter.client_lora_ranks) == [1] * 4 + [3] * 4
    for client_id, lora_rank in enumerate(job.state.adapter.client_lora_ranks):
        assert int(train_one_client(job, job.state, client_id).bits.sum()) == lora_rank * 6


# ---- the server ----


def small_state(round_index: int) -> ServerState:
    """Adapters "a" (2 x 3) and "b" (1 x 1), two triplets each; A rows of 2s, B rows of 4s."""
    shapes = {"a": (2, 3), "b": (1, 1)}
    rows = {
        name: torch.cat([torch.full((2, d_in), 2.0), torch.full((2, d_out), 4.0)], dim=1)
        for name, (d_out, d_in) in shapes.items()
    }
    return ServerState(
        adapter=AdapterConfig(
            lora_rank=1, lora_alpha=1.0, client_lora_ranks=(1,) * 3, shapes=shapes
        ),
        seed=0,
        num_rounds=10,
        rows=rows,
        rank_masks={name: torch.ones(2).bool() for name in shapes},
        whole={"head": torch.zeros(1)},
        last_round=torch.full((3,), -1),
        round_index=round_index,
    )


def chosen(client_id: int, n: int, values: Sequence[float], bits: Sequence[int]) -> Upload:
    return Upload(
        client_id=client_id,
        num_examples=n,
        train_loss=0.0,
        values=torch.tensor(values),
        bits=torch.tensor(bits, dtype=torch.bool),
    )


def test_aggregation_of_disagreeing_choices() -> None:
    """Shares 1/4 and 3/4; B, 4 everywhere, moves by p_k (row_k - 4) for those who sent it."""
    uploads = [
        chosen(0, 1, [8.0, 12.0, 16.0, 100.0], [1, 0, 1, 0]),  # a0 = (8, 12), b0 = 16
        chosen(1, 3, [0.0, 4.0, 8.0, 12.0, 200.0], [1, 1, 0, 0]),  # a0 = (0, 4), a1 = (8, 12)
    ]
    state = small_state(2)
    after = LoraA2().aggregate(state, uploads)
    # a0: 4 + (4/4 - 3), 4 + 8/4 + 0; a1: 4 + 3, 4 + 6; b0: 4 + 12/4; b1 unchanged
    assert after.rows["a"].tolist() == [[2, 2, 2, 2, 6], [2, 2, 2, 7, 10]]
    assert after.rows["b"].tolist() == [[2, 7], [2, 4]]
    assert after.whole["head"].tolist() == [175.0]
    assert all(mask.all() for mask in after.rank_masks.values())


def test_aggregation_of_a_in_odd_rounds() -> None:
    uploads = [
        chosen(0, 1, [6.0, 6.0, 2.0, 10.0, 0.0], [0, 1, 1, 0]),
        chosen(2, 1, [0.0, 0.0], [0, 0, 0, 1]),
    ]
    after = LoraA2().aggregate(small_state(3), uploads)
    assert after.rows["a"].tolist() == [[2, 2, 2, 4, 4], [4, 4, 2, 4, 4]]
    assert after.rows["b"].tolist() == [[6, 4], [1, 4]]


def test_a_triplet_that_nobody_sent_keeps_its_bits() -> None:
    """At odd shares of examples, and next to triplets that move."""
    job = make_tiny_job(*A2, *SHORT, "method.budget=0.1")
    state = job.method.aggregate(
        job.state, [train_one_client(job, job.state, k) for k in (1, 4, 6)]
    )
    uploads = [train_one_client(job, state, k) for k in (1, 4, 6)]
    after = job.method.aggregate(state, uploads)
    sent = torch.stack([upload.bits for upload in uploads]).any(dim=0)
    moved = torch.cat([m for _, m in sorted(changed_rows(state.rows, after.rows).items())])
    assert torch.equal(moved, sent)
    assert 5 <= int(sent.sum()) < 48


# ---- bytes ----


def test_bytes_of_a_run_by_hand() -> None:
    job = make_tiny_job(*A2, *SHORT)
    shapes = adapter_shapes(job.model)
    num_floats = {
        "B": 4 * sum(d_out for d_out, _ in shapes.values()),
        "A": 4 * sum(d_in for _, d_in in shapes.values()),
    }
    assert num_floats["A"] == num_floats["B"] == 4 * (8 * 32 + 2 * 64 + 2 * 32)
    last_cohort: list[int] = []
    seen = set()
    for played in play_rounds(job):
        part = "BA"[played.before.round_index % 2]
        up = down = 0
        for client_id in played.row["cohort"]:
            bits = train_one_client(job, played.before, client_id).bits.reshape(12, 4)
            assert int(bits.sum()) == 24
            widths = [shapes[name]["BA".index(part)] for name in sorted(shapes)]
            floats = sum(int(n) * width for n, width in zip(bits.sum(dim=1), widths, strict=True))
            up += 24 + 4 * (floats + NUM_HEAD) + 48 // 8
            in_step = client_id in last_cohort
            seen.add(in_step)
            halves = num_floats["A"] if in_step else num_floats["A"] + num_floats["B"]
            down += 24 + 4 * (halves + NUM_HEAD)
        assert played.row["uplink_bytes"] == up
        assert played.row["downlink_bytes"] == down
        last_cohort = played.row["cohort"]
    assert seen == {True, False}


def test_the_download_is_the_half_that_the_last_round_trained() -> None:
    """On a layer that is not square: 6 x 10, rank 2; the client was there, or was not."""
    model = nn.Module()
    model.layer = nn.Linear(10, 6)
    inject(model, "all-linear", [])
    adapter = AdapterConfig.of(model, lora_rank=2, lora_alpha=2.0, client_lora_ranks=(2, 2))
    method = LoraA2()
    state = method.init(model, adapter, seed=0, num_rounds=4)
    expected = {0: [16, 16], 1: [6, 16], 2: [10, 16]}  # floats a triplet: client 0, client 1
    for round_index, widths in expected.items():
        for client_id, width in enumerate(widths):
            client = Client(client_id=client_id, num_examples=1, model=model)
            assert method.download(model, state, client) == 24 + 4 * 2 * width
        assert method.download(model, state, None) == 24 + 4 * 2 * 16
        half = 6 if round_index % 2 == 0 else 10
        state = method.aggregate(state, [chosen(0, 1, [0.0] * half, [1, 0])])


# ---- settings ----


def test_the_papers_head_stays() -> None:
    job = make_tiny_job(*A2, *SHORT, "method.freeze_head=true")
    before = {name: job.model.get_parameter(name).detach().clone() for name in HEAD}
    rounds = play_rounds(job, num_rounds=2)
    assert rounds[-1].after.whole == {}
    for name in HEAD:
        assert torch.equal(job.model.get_parameter(name), before[name])
    with_head = play_rounds(make_tiny_job(*A2, *SHORT), num_rounds=1)[0].row
    assert with_head["downlink_bytes"] - rounds[0].row["downlink_bytes"] == 5 * 4 * NUM_HEAD


@pytest.mark.parametrize(
    ("key", "value"),
    [("budget", 0.0), ("budget", 1.5), ("probe_steps", 0), ("b_lr_factor", 0.0)],
)
def test_settings_out_of_range_are_named(key: str, value: float) -> None:
    with pytest.raises(InputError) as error:
        LoraA2(**{key: value})
    assert f"method.{key} = {value}" in str(error.value)
    assert "must be" in str(error.value)
