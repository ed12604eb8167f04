"""LoRA-A2's equations: alternation, the choice of triplets, frozen rows, aggregation and bytes."""

from collections.abc import Sequence
from itertools import islice

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from bench.run.clients import client_batches
from bench.run.job import Job
from fedara_core.adapters import AdapterSpec, LowRank, inject
from fedara_core.errors import InputError
from fedara_core.method import Client
from fedara_core.methods.lora_a2 import LoraA2, scores
from fedara_core.state import ServerState, Start, with_parts
from fedara_core.train import start_client
from fedara_core.values import EMPTY, Parts, make_index
from fedara_core.wire import Upload, make_upload
from support.pairs import model_parts, pair
from support.rounds import make_tiny_job, play_rounds, received, train_one_client

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


def changed_triplets(before: Parts, after: Parts) -> Tensor:
    """Which triplets differ in A or B, over the adapters in name order (n,) bool."""
    changed = [
        torch.cat([(rows != after[part][name]).any(dim=1) for name, rows in before[part].items()])
        for part in "AB"
    ]
    return torch.stack(changed).any(dim=0)


def aggregated(state: ServerState, uploads: Sequence[Upload]) -> ServerState:
    return LoraA2().aggregate(state, received(LoraA2(), state, uploads))


# ---- alternation ----


def test_everything_chosen_is_alternating_fedavg_by_hand() -> None:
    """Plain loops over B, then A, then B, with AdamW at 5 lr for B."""
    job = make_tiny_job(
        *(*A2, "method.budget=1.0", "train.local_steps=3", "train.lr=4e-3", "adapter.lora_alpha=8"),
        *("federation.cohort=3", "federation.num_rounds=3", "evaluate.every=9"),
    )
    form, model = LowRank(scale=2.0), job.model
    parts, head = job.state.parts, job.state.whole
    head_shapes = {name: tuple(tensor.shape) for name, tensor in head.items()}
    index = make_index(form, model.shapes, dict.fromkeys(model.shapes, 4), head_shapes)
    for played in play_rounds(job):
        cohort, part = played.row["cohort"], "BAB"[played.before.round_index]
        num_examples = [len(job.shards[client_id]) for client_id in cohort]
        mean = torch.zeros(index.size)
        for client_id, n in zip(cohort, num_examples, strict=True):
            model.load(index.pack(parts, head), index, form)
            halves = [adapter.parts[part] for adapter in model.adapters.values()]
            heads = [model.module.get_parameter(name) for name in HEAD]
            lr = {"A": 4e-3, "B": 5 * 4e-3}[part]
            optimizer = torch.optim.AdamW(
                [{"params": halves, "lr": lr}, {"params": heads, "lr": 4e-3}], weight_decay=0.0
            )
            model.module.train()
            for batch in client_batches(job, played.before.round_index, client_id):
                model.gradient.zero_()
                logits = model.module(batch["input_ids"], batch["attention_mask"])
                nn.functional.cross_entropy(logits, batch["labels"]).backward()
                nn.utils.clip_grad_norm_([*halves, *heads], 1.0)
                optimizer.step()
            mean += n / sum(num_examples) * model.vector
        after, before = played.after.parts, played.before.parts
        for name in model.shapes:
            expected = index.parts(mean)[part][name]
            torch.testing.assert_close(after[part][name], expected, rtol=0, atol=1e-6)
            resting = "A" if part == "B" else "B"
            assert torch.equal(after[resting][name], before[resting][name])
            assert not torch.equal(after[part][name], before[part][name])
        for name in HEAD:
            expected = index.whole(mean)[name]
            torch.testing.assert_close(played.after.whole[name], expected, rtol=0, atol=1e-6)
        parts, head = after, played.after.whole


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
        # AdamW's first step moves a weight by its learning rate.
        client = train(job, played.before, 0, 1)
        moved = job.model.vector - played.before.vector
        runs = played.before.index.runs
        assert moved[runs[part]].abs().max().item() == pytest.approx(lr, rel=1e-3)
        assert moved[runs[""]].abs().max().item() == pytest.approx(0.01, rel=1e-3)
        assert client.optimizer is not None
        rates = {
            group["lr"]: sum(p.numel() for p in group["params"])
            for group in client.optimizer.param_groups
        }
        num_half = 4 * (8 * 32 + 2 * 64 + 2 * 32)
        expected = {0.05: num_half, 0.01: NUM_HEAD} if part == "B" else {0.01: num_half + NUM_HEAD}
        assert rates == expected


# ---- the choice ----


def test_the_choice_is_by_the_change_of_w() -> None:
    """Frobenius norms of dB_i A_i and B_i dA_i formed as matrices, dB and dA the sums of three
    steps' gradients: the largest half of them all."""
    job = make_tiny_job(*A2, "method.probe_steps=3", "train.local_steps=3", "train.lr=1e-2")
    for state in (job.state, play_rounds(job, num_rounds=1)[-1].after):
        client = train(job, state, 2, 2)
        assert client.notes["chosen"].all()
        part = "A" if state.round_index else "B"
        gradients = {name: torch.zeros_like(rows) for name, rows in state.parts[part].items()}
        probing = make_tiny_job(*A2, "method.probe_steps=9", "train.lr=1e-2")
        for num_steps in (1, 2, 3):
            probe = train(probing, state, 2, num_steps - 1)
            batch = list(client_batches(probing, state.round_index, 2))[num_steps - 1]
            probe.backward(batch)  # where the steps before have led
            for name, adapter in probing.model.adapters.items():
                gradients[name] += adapter.parts[part].grad
        norms = []
        for name in job.model.shapes:
            a, b = pair({**state.parts, part: gradients}, name)
            norms += [float(np.linalg.norm(np.outer(b[:, i], a[i]))) for i in range(4)]
        best = set(sorted(range(48), key=lambda i: -norms[i])[:24])
        assert len({round(norm, 9) for norm in norms}) > 24
        client = train(job, state, 2, 3)
        chosen = client.notes["chosen"]
        assert set(chosen.nonzero().squeeze(1).tolist()) == best
        assert torch.equal(job.method.upload(client, state).bits, chosen)


def test_a_short_probe_ranks_triplets_as_a_long_one() -> None:
    """Spearman's rank correlation of the scores after 2 and after 60 steps, mean of four clients.

    By gradients it is 0.86 here; by what Adam changed, as before, 0.55, as every change is about as
    large as the learning rate then."""
    job = make_tiny_job(*A2, "method.probe_steps=60", "train.local_steps=60", "train.lr=1e-3")
    correlations: dict[str, list[float]] = {"gradients": [], "changes": []}
    for client_id in range(4):
        ranked: dict[str, list[np.ndarray]] = {"gradients": [], "changes": []}
        for num_steps in (2, 60):
            client = train(job, job.state, client_id, num_steps)
            ranked["gradients"].append(scores(client).numpy())
            client.notes["gradients"] = client.vector - client.notes["start"]
            ranked["changes"].append(scores(client).numpy())
        for kind, (short, long) in ranked.items():
            correlations[kind].append(float(spearmanr(short, long).statistic))
    assert np.mean(correlations["gradients"]) > 0.8
    assert np.mean(correlations["changes"]) < 0.6


@pytest.mark.parametrize("round_index", [0, 1])
def test_what_is_not_chosen_goes_back_and_stays(round_index: int) -> None:
    """Under weight decay and with Adam's momentum from the probe."""
    job = make_tiny_job(*A2, "train.local_steps=5", "train.lr=1e-2", "train.weight_decay=0.1")
    state = job.state if round_index == 0 else play_rounds(job, num_rounds=1)[-1].after
    start = state.parts
    probed = model_parts(train(job, state, 1, 1).model)
    assert changed_triplets(start, probed).all()
    for num_steps in (2, 3, 5):
        client = train(job, state, 1, num_steps)
        now = model_parts(client.model)
        changed = changed_triplets(start, now)
        assert int(changed.sum()) == 24
        assert torch.equal(changed, client.notes["chosen"])
    trained = "BA"[round_index]
    assert not any(torch.equal(now[trained][n], probed[trained][n]) for n in now[trained])


def test_clipping_is_about_what_is_chosen() -> None:
    """After the probe an SGD step is as long as the bound, without what stays."""
    job = make_tiny_job(
        *(*A2, "train.optimizer=sgd", "train.lr=1.0", "train.max_grad_norm=1e-3"),
        *("method.b_lr_factor=1.0", "method.probe_steps=1", "method.budget=0.1"),
        *("method.freeze_head=true", "train.local_steps=2"),
    )
    first, second = (train(job, job.state, 0, n).model.vector.clone() for n in (1, 2))
    step = second - first
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
    parts = {
        "A": {name: torch.full((2, d_in), 2.0) for name, (_, d_in) in shapes.items()},
        "B": {name: torch.full((2, d_out), 4.0) for name, (d_out, _) in shapes.items()},
    }
    empty = ServerState(
        adapter=AdapterSpec(lora_rank=1, lora_alpha=1.0, client_lora_ranks=(1,) * 3, shapes=shapes),
        seed=0,
        num_rounds=10,
        vector=torch.zeros(0),
        index=EMPTY,
        rank_masks={name: torch.ones(2).bool() for name in shapes},
        last_round=torch.full((3,), -1),
        round_index=round_index,
    )
    return with_parts(empty, LoraA2().form(empty), parts, {"head": torch.zeros(1)})


def rows_of(state: ServerState, name: str) -> list[list[float]]:
    """The rows [A_i, B_i] of an adapter."""
    return torch.cat([state.parts[part][name] for part in "AB"], dim=1).tolist()


def chosen(client_id: int, n: int, values: Sequence[float], bits: Sequence[int]) -> Upload:
    return make_upload(
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
    after = aggregated(state, uploads)
    # a0: 4 + (4/4 - 3), 4 + 8/4 + 0; a1: 4 + 3, 4 + 6; b0: 4 + 12/4; b1 unchanged
    assert rows_of(after, "a") == [[2, 2, 2, 2, 6], [2, 2, 2, 7, 10]]
    assert rows_of(after, "b") == [[2, 7], [2, 4]]
    assert after.whole["head"].tolist() == [175.0]
    assert all(mask.all() for mask in after.rank_masks.values())


def test_aggregation_of_a_in_odd_rounds() -> None:
    uploads = [
        chosen(0, 1, [6.0, 6.0, 2.0, 10.0, 0.0], [0, 1, 1, 0]),
        chosen(2, 1, [0.0, 0.0], [0, 0, 0, 1]),
    ]
    after = aggregated(small_state(3), uploads)
    assert rows_of(after, "a") == [[2, 2, 2, 4, 4], [4, 4, 2, 4, 4]]
    assert rows_of(after, "b") == [[6, 4], [1, 4]]


def test_a_triplet_that_nobody_sent_keeps_its_bits() -> None:
    """At odd shares of examples, and next to triplets that move."""
    job = make_tiny_job(*A2, *SHORT, "method.budget=0.1")
    first = [train_one_client(job, job.state, k) for k in (1, 4, 6)]
    state = job.method.aggregate(job.state, received(job.method, job.state, first))
    uploads = [train_one_client(job, state, k) for k in (1, 4, 6)]
    after = job.method.aggregate(state, received(job.method, state, uploads))
    sent = torch.stack([upload.bits for upload in uploads]).any(dim=0)
    assert torch.equal(changed_triplets(state.parts, after.parts), sent)
    assert 5 <= int(sent.sum()) < 48


# ---- bytes ----


def test_bytes_of_a_run_by_hand() -> None:
    job = make_tiny_job(*A2, *SHORT)
    shapes = job.model.shapes
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
            # In round 0 the seed gives everything, in round 1 it still gives A.
            one_half = in_step or played.row["round_index"] == 1
            halves = num_floats["A"] if one_half else num_floats["A"] + num_floats["B"]
            down += 24 + (4 * (halves + NUM_HEAD) if played.row["round_index"] else 0)
        assert played.row["uplink_bytes"] == up
        assert played.row["downlink_bytes"] == down
        last_cohort = played.row["cohort"]
    assert seen == {True, False}


def test_the_download_is_the_half_that_the_last_round_trained() -> None:
    """On a layer that is not square: 6 x 10, rank 2; the client was there, or was not."""
    module = nn.Module()
    module.layer = nn.Linear(10, 6)
    model = inject(module, "all-linear", [])
    adapter = AdapterSpec(
        lora_rank=2, lora_alpha=2.0, client_lora_ranks=(2, 2), shapes=model.shapes
    )
    method = LoraA2()
    state = method.init(Start(model=model, adapter=adapter, seed=0, num_rounds=4))
    expected = {0: [0, 0], 1: [6, 6], 2: [10, 16]}  # floats a triplet: client 0, client 1
    for round_index, widths in expected.items():
        for client_id, width in enumerate(widths):
            client = Client(client_id=client_id, num_examples=1, model=model)
            size = method.download(model, state, client)
            assert size.num_bytes("fp32") == 24 + 4 * 2 * width
        assert method.download(model, state, None).num_bytes("fp32") == 24
        half = 6 if round_index % 2 == 0 else 10
        state = aggregated(state, [chosen(0, 1, [0.0] * half, [1, 0])])


# ---- settings ----


def test_the_papers_head_stays() -> None:
    job = make_tiny_job(*A2, *SHORT, "method.freeze_head=true")
    before = {name: job.model.module.get_parameter(name).detach().clone() for name in HEAD}
    rounds = play_rounds(job, num_rounds=2)
    assert rounds[-1].after.whole == {}
    for name in HEAD:
        assert torch.equal(job.model.module.get_parameter(name), before[name])
    with_head = play_rounds(make_tiny_job(*A2, *SHORT), num_rounds=2)[1].row
    assert with_head["downlink_bytes"] - rounds[1].row["downlink_bytes"] == 5 * 4 * NUM_HEAD


@pytest.mark.parametrize(
    ("key", "value"),
    [("budget", 0.0), ("budget", 1.5), ("probe_steps", 0), ("b_lr_factor", 0.0)],
)
def test_settings_out_of_range_are_named(key: str, value: float) -> None:
    with pytest.raises(InputError) as error:
        LoraA2(**{key: value})
    assert f"method.{key} = {value}" in str(error.value)
    assert "must be" in str(error.value)
