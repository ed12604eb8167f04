"""AdaLoRA under FedAvg: PEFT's allocator and penalty, ragged uploads, regrowth, bytes by hand."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import peft
import pytest
import torch
from peft.tuners.adalora import AdaLoraModel, RankAllocator, SVDLinear
from torch import Tensor, nn
from torch.nn import functional

from bench.models.encoders import build_model
from bench.run.clients import client_batches, draw_cohort
from fedara_core.adapters import AdapterSpec, LowRank, inject
from fedara_core.errors import InputError
from fedara_core.importance import ImportanceMeter, cubic_budget, top_k
from fedara_core.method import Client
from fedara_core.methods.adalora import AdaLora, mean_orthogonality
from fedara_core.state import ServerState, with_parts
from fedara_core.train import start_client
from fedara_core.values import EMPTY, Masks
from fedara_core.wire import Upload, make_upload
from support.adapted import join_rows, load_rows, split_rows
from support.rounds import make_tiny_job, play_rounds, received, train_one_client

ADALORA = ("method.name=adalora", "train.local_steps=2")
HEAD = ("classifier.bias", "classifier.weight")
NUM_HEAD = 4 * 32 + 4  # tiny.toml's model
# 12 adapters x 4 triplets, a third of them last; one round warms up, the last three are final.
THIRD = ("method.final_budget=0.3334",)
THIRD_BUDGET = [48, 48, 20, 16, 16, 16]  # 16 + 32 (1/2)^3
# Settings under which the clients of the tiny job disagree on what to keep.
UNLIKE = ("method.init_std=0.1", "method.orthogonality=0.0", "train.lr=2e-2")


# ---- PEFT ----


def test_masks_equal_pefts_allocator_step_by_step() -> None:
    """Scores, budget and masked E of two layers over ten steps of plain gradient descent."""
    torch.manual_seed(0)
    scale, total, first, last = 9 / (6 + 1e-5), 10, 12, 4
    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, lora_alpha=9, tinit=2, tfinal=3, total_step=total
    )
    layers, theirs, rows = nn.ModuleDict(), nn.ModuleDict(), {}
    for name, d_out in {"first": 10, "second": 7}.items():
        layers[name], rows[name] = nn.Linear(10, d_out), torch.randn(6, 10 + 1 + d_out)
        theirs[name] = SVDLinear(layers[name], "default", config=config, r=6, lora_alpha=9)
        with torch.no_grad():
            theirs[name].lora_A["default"].copy_(rows[name][:, :10])
            theirs[name].lora_E["default"].copy_(rows[name][:, 10:11])
            theirs[name].lora_B["default"].copy_(rows[name][:, 11:].T)
    ours = inject(layers, ["first", "second"], ())
    load_rows(ours, rows, LowRank(scale=scale, singular=True))
    allocator, meter = RankAllocator(theirs, config, "default"), ImportanceMeter("smoothed")
    num_kept = []
    for step in range(1, total + 1):
        x, y = torch.randn(5, 10), torch.randn(5, 7)
        ours.gradient.zero_()
        theirs.zero_grad()
        for model in (ours.module, theirs):
            hidden = torch.tanh(model["first"](x))
            functional.mse_loss(model["second"](hidden), y).backward()
        meter.observe(ours)
        # AdaLoRA holds the choice of total - tfinal in the last steps; ours has none to hold.
        allocator.update_ipt(theirs)
        budget = cubic_budget(step, first=first, last=last, num_rounds=total, warmup=2, final=3)
        their_budget, masks_now = allocator.budget_schedule(step)
        assert budget - their_budget in (0, 1)  # we round, they cut
        with torch.no_grad():
            ours.vector -= 0.01 * ours.gradient
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter -= 0.01 * parameter.grad
        bits = top_k(meter.scores(ours), budget)
        num_kept.append(int(bits.sum()))
        if not masks_now:
            assert num_kept[-1] == first
            continue
        pattern = allocator.mask_to_budget(theirs, budget)
        for (name, adapter), kept in zip(ours.adapters.items(), bits.split(6), strict=True):
            assert kept.tolist() == pattern[f"{name}.lora_E.default"]
            with torch.no_grad():
                adapter.parts["E"][~kept] = 0
            expected = theirs[name].lora_E["default"]
            torch.testing.assert_close(adapter.parts["E"], expected, rtol=1e-4, atol=1e-5)
    assert num_kept == [12, 12, 8, 6, 5, 4, 4, 4, 4, 4]


def test_the_budget_is_pefts_rounded() -> None:
    config = peft.AdaLoraConfig(init_r=12, target_r=8, tinit=5, tfinal=30, total_step=100)
    theirs = nn.ModuleDict(
        {str(i): SVDLinear(nn.Linear(4, 4), "default", config=config, r=12) for i in range(10)}
    )
    allocator = RankAllocator(theirs, config, "default")
    for step in range(101):
        ours = cubic_budget(step, first=120, last=80, num_rounds=100, warmup=5, final=30)
        their_budget, _ = allocator.budget_schedule(step)
        exact = 80 + 40 * (1 - min(65, max(0, step - 5)) / 65) ** 3
        assert ours == round(exact)
        assert their_budget == int(exact)


class WithLoss(nn.Module):
    """Our model with the loss where PEFT adds its penalty."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, **batch: Tensor) -> SimpleNamespace:
        logits = self.inner(batch["input_ids"], batch["attention_mask"])
        return SimpleNamespace(loss=functional.cross_entropy(logits, batch["labels"]))


@pytest.mark.parametrize("weight", [0.1, 5.0])
def test_a_clients_round_equals_pefts(weight: float) -> None:
    """Penalty, clipping, AdamW, scores and the pruning of one whole round, from random rows."""
    job = make_tiny_job(
        *("method.name=adalora", *THIRD, f"method.orthogonality={weight}", "model.dropout=0.0"),
        *("train.local_steps=6", "train.lr=1e-3"),
    )
    torch.manual_seed(5)
    shapes, form = job.model.shapes, job.method.form(job.state)
    rows = {name: 0.2 * torch.randn(4, sum(shape) + 1) for name, shape in shapes.items()}
    start = with_parts(job.state, form, split_rows(rows, form, shapes), job.state.whole)
    state = replace(start, round_index=2)
    num_classes = job.label_counts.shape[1]
    fresh = build_model(job.config.model, num_classes=num_classes, seed=job.config.seed).model
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=1,
        lora_alpha=4.00001,  # PEFT divides by r + 1e-5
        lora_dropout=0.0,
        target_modules=list(rows),
        orth_reg_weight=weight,
        total_step=10,
    )
    theirs = AdaLoraModel(WithLoss(fresh), config, "default")
    layers = {name: theirs.model.inner.get_submodule(name) for name in rows}
    with torch.no_grad():
        for name, (_, d_in) in shapes.items():
            layers[name].lora_A["default"].copy_(rows[name][:, :d_in])
            layers[name].lora_E["default"].copy_(rows[name][:, d_in : d_in + 1])
            layers[name].lora_B["default"].copy_(rows[name][:, d_in + 1 :].T)
    theirs.model.inner.classifier.requires_grad_(True)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    client_id = draw_cohort(job, 2)[0]
    for batch in client_batches(job, 2, client_id):
        optimizer.zero_grad()
        theirs(**batch).loss.backward()
        theirs.rankallocator.update_ipt(theirs.model)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    pattern = theirs.rankallocator.mask_to_budget(theirs.model, THIRD_BUDGET[2])

    upload = train_one_client(job, state, client_id)
    expected: dict[str, list[Tensor]] = {"A": [], "E": [], "B": []}
    kept = []
    for name in sorted(rows):
        (key,) = [key for key in pattern if f".{name}.lora_E" in f".{key}"]
        mask = torch.tensor(pattern[key])
        layer = layers[name]
        a, e, b = (getattr(layer, f"lora_{part}")["default"] for part in "AEB")
        assert torch.equal(e.squeeze(1) != 0, mask)
        for part, values in {"A": a, "E": e, "B": b.T}.items():
            expected[part].append(values[mask].reshape(-1))
        kept.append(mask)
    flat = [*expected["A"], *expected["E"], *expected["B"]]
    flat += [fresh.get_parameter(name).reshape(-1) for name in HEAD]
    assert upload.bits.tolist() == torch.cat(kept).tolist()
    assert int(upload.bits.sum()) == 20
    torch.testing.assert_close(upload.values, torch.cat(flat).detach(), rtol=0, atol=2e-5)


def test_the_penalty_by_hand() -> None:
    """A = [[1, -2], [0, 4]], B^T = [[.5, 1], [2, 0]]: sqrt(369), sqrt(11.0625), their mean."""
    rows = torch.tensor([[1.0, -2.0, 3.0, 0.5, 1.0], [0.0, 4.0, -0.5, 2.0, 0.0]])
    layers = nn.ModuleDict({"layer": nn.Linear(2, 2), "dead": nn.Linear(2, 2)})
    model, form = inject(layers, "all-linear", ()), LowRank(scale=1.0, singular=True)
    load_rows(model, {"layer": rows}, form)
    penalty = (369**0.5 + 11.0625**0.5) / 2
    assert mean_orthogonality(model).item() == pytest.approx(penalty)
    load_rows(model, {}, form)
    assert mean_orthogonality(model).item() == 0


# ---- the server ----


def two_adapters(dead: Sequence[int] = ()) -> ServerState:
    """Adapters "a" (3 x 2) and "b" (2 x 4), three triplets each; rows of 6 and of 7 floats."""
    mask = torch.ones(6, dtype=torch.bool)
    mask[list(dead)] = False
    state = ServerState(
        adapter=AdapterSpec(
            lora_rank=2,
            lora_alpha=2.0,
            client_lora_ranks=(2,) * 3,
            shapes={"a": (3, 2), "b": (2, 4)},
        ),
        seed=0,
        num_rounds=10,
        vector=torch.zeros(0),
        index=EMPTY,
        rank_masks={"a": mask[:3], "b": mask[3:]},
        last_round=torch.full((3,), -1),
        round_index=5,
    )
    live, form = state.live_triplets, AdaLora().form(state)
    rows = {"a": torch.full((live["a"], 6), 99.0), "b": torch.full((live["b"], 7), 99.0)}
    parts = split_rows(rows, form, state.adapter.shapes)
    return with_parts(state, form, parts, {"head": torch.full((2,), 99.0)})


def aggregate(state: ServerState, uploads: Sequence[Upload]) -> ServerState:
    method = AdaLora()
    return method.aggregate(state, received(method, state, uploads))


def sent(client_id: int, num_examples: int, value: float, bits: Sequence[int], num: int) -> Upload:
    """Rows full of `value`, a head full of 10 x value."""
    return make_upload(
        client_id=client_id,
        num_examples=num_examples,
        train_loss=0.0,
        values=torch.cat([torch.full((num,), value), torch.full((2,), 10 * value)]),
        bits=torch.tensor(bits, dtype=torch.bool),
    )


def test_of_a_triplet_not_sent_e_alone_counts_as_zero() -> None:
    uploads = [
        sent(0, 1, 8.0, [1, 1, 0, 0, 0, 1], 2 * 6 + 7),
        sent(1, 3, 4.0, [1, 0, 0, 1, 0, 0], 6 + 7),
    ]
    after = aggregate(two_adapters(), uploads)
    # shares 1/4, 3/4: both sent a0 (2 + 3), only client 0 sent a1 and b2 (2), client 1 b0 (3); the
    # server's A and B, 99 each, take the place of the others' (3/4 of 99, 1/4 of 99).
    kept0, kept1 = 2 + 74.25, 3 + 24.75
    rows = join_rows(after.parts)
    assert rows["a"].tolist() == [[5.0] * 6, [kept0] * 2 + [2.0] + [kept0] * 3]
    assert rows["b"].tolist() == [
        [kept1] * 4 + [3.0] + [kept1] * 2,
        [kept0] * 4 + [2.0] + [kept0] * 2,
    ]
    assert after.whole["head"].tolist() == [50.0, 50.0]
    live = {name: mask.tolist() for name, mask in after.rank_masks.items()}
    assert live == {"a": [True, True, False], "b": [True, False, True]}
    assert after.round_index == 6
    assert after.last_round.tolist() == [5, 5, -1]


def test_a_triplet_that_half_sent_keeps_half_of_its_norm() -> None:
    """||B_i E_i A_i|| as each sender has it, and at the server: half of it, not (1/2)^3 = 0.125."""
    state = two_adapters()
    uploads = [
        sent(0, 1, 99.0, [1, 1, 1, 1, 1, 1], 3 * 6 + 3 * 7),
        sent(1, 1, 99.0, [0, 1, 1, 1, 1, 1], 2 * 6 + 3 * 7),
    ]
    after = aggregate(state, uploads)
    norms = [
        float(torch.stack([parts[part]["a"][0].norm() for part in "AEB"]).prod())
        for parts in (state.parts, after.parts)
    ]
    assert norms[1] / norms[0] == pytest.approx(0.5)


def test_e_may_have_a_learning_rate_of_its_own() -> None:
    """AdamW's first step moves a weight by its learning rate."""
    job = make_tiny_job(*ADALORA, "method.e_lr_factor=10.0", "train.lr=1e-3", "train.local_steps=1")
    train_one_client(job, job.state, 0)
    moved = job.model.vector - job.state.vector
    assert moved[job.state.index.runs["E"]].abs().max().item() == pytest.approx(1e-2, rel=1e-3)
    assert moved[job.state.index.runs[""]].abs().max().item() == pytest.approx(1e-3, rel=1e-3)


def test_bits_are_about_live_triplets_only() -> None:
    """With a1 and all of b but b1 dead, an upload has three bits: a0, a2, b1."""
    uploads = [sent(0, 1, 8.0, [0, 1, 0], 6), sent(2, 1, 4.0, [0, 1, 1], 6 + 7)]
    after = aggregate(two_adapters(dead=[1, 3, 5]), uploads)
    rows = join_rows(after.parts)
    assert rows["a"].tolist() == [[6.0] * 6]
    kept = 2 + 0.5 * 99
    assert rows["b"].tolist() == [[kept] * 4 + [2.0] + [kept] * 2]
    live = {name: mask.tolist() for name, mask in after.rank_masks.items()}
    assert live == {"a": [False, False, True], "b": [False, True, False]}


# ---- whole runs ----


def by_adapter(state: ServerState, bits: Tensor) -> Masks:
    """An upload's bits at their places in the rank_masks."""
    masks, start = {}, 0
    for name, num_live in state.live_triplets.items():
        masks[name] = torch.zeros_like(state.rank_masks[name])
        masks[name][state.rank_masks[name]] = bits[start : start + num_live]
        start += num_live
    assert start == len(bits)
    return masks


@pytest.mark.slow
def test_bytes_of_a_run_by_hand() -> None:
    """Uploads of b(t) triplets, but not of the same ones, nor of the same length."""
    job = make_tiny_job(*ADALORA, *THIRD, *UNLIKE)
    shapes = job.model.shapes
    ragged = []
    for played in play_rounds(job):
        before, row = played.before, played.row
        uploads = [train_one_client(job, before, client_id) for client_id in row["cohort"]]
        num_live = sum(before.live_triplets.values())
        union = {name: torch.zeros_like(mask) for name, mask in before.rank_masks.items()}
        up = []
        for upload in uploads:
            assert int(upload.bits.sum()) == min(num_live, THIRD_BUDGET[row["round_index"]])
            masks = by_adapter(before, upload.bits)
            floats = sum(int(masks[n].sum()) * (sum(shapes[n]) + 1) for n in shapes)
            up.append(24 + 4 * (floats + NUM_HEAD) + -(-num_live // 8))
            for name in shapes:
                union[name] |= masks[name]
        floats = sum(n * (sum(shapes[name]) + 1) for name, n in before.live_triplets.items())
        assert row["uplink_bytes"] == sum(up)
        down = 24 + 4 * (floats + NUM_HEAD) + 48 // 8 if row["round_index"] else 24
        assert row["downlink_bytes"] == 5 * down
        ragged.append(len(set(up)) > 1)
        for name, mask in played.after.rank_masks.items():
            assert torch.equal(mask, union[name])
            live = [own[name] for own in played.after.parts.values() if name in own]
            assert {len(rows) for rows in live} <= {int(mask.sum())}
            assert bool(live) == bool(mask.any())
        assert row["live_triplets"] >= THIRD_BUDGET[row["round_index"]]
    assert ragged[:3] == [False, False, True]
    assert 16 < row["live_triplets"] < 48


def test_a_client_takes_back_what_others_kept() -> None:
    job = make_tiny_job(*ADALORA, *THIRD, *UNLIKE, "federation.cohort=8", "evaluate.every=9")
    rounds = play_rounds(job, num_rounds=4)
    taken_back = 0
    for client_id in range(8):
        now, then = (
            by_adapter(p.before, train_one_client(job, p.before, client_id).bits)
            for p in rounds[2:4]
        )
        for name in now:
            pruned = rounds[2].before.rank_masks[name] & ~now[name]
            assert not (then[name] & ~rounds[3].before.rank_masks[name]).any()
            taken_back += int((pruned & then[name]).sum())
    assert taken_back > 0


def test_what_is_sent_is_what_was_trained() -> None:
    """Pruning comes after the last local step: the live union trains the whole round."""
    job = make_tiny_job(*ADALORA, *THIRD)
    state = replace(job.state, round_index=4)
    client = Client(client_id=3, num_examples=7, model=job.model)
    job.method.download(job.model, state, client)
    start_client(client, job.method, job.training, state)
    for batch in client_batches(job, 4, 3):
        job.method.local_step(client, batch)
        assert sum(adapter.num_live for adapter in job.model.adapters.values()) == 48
    trained = state.index.parts(job.model.vector.clone())
    upload = job.method.upload(client, state)
    masks = by_adapter(state, upload.bits)
    expected = torch.cat(
        [rows[masks[name]].reshape(-1) for part in "AEB" for name, rows in trained[part].items()]
    )
    assert torch.equal(upload.values[:-NUM_HEAD], expected)
    scores = client.notes["importance"]
    assert scores.kind == "smoothed"


@pytest.mark.parametrize("init_std", [0.02, 0.1])
def test_without_budget_and_penalty_it_is_svd_fedavg(init_std: float) -> None:
    common = (f"method.init_std={init_std}", "federation.num_rounds=3", "train.local_steps=2")
    off = ("method.final_budget=1.0", "method.orthogonality=0.0")
    ours = play_rounds(make_tiny_job("method.name=adalora", *off, *common))
    theirs = play_rounds(
        make_tiny_job("method.name=fedara", "method.rank_allocation=false", *common)
    )
    digests = [played.row["state_digest"] for played in ours]
    assert digests == [played.row["state_digest"] for played in theirs]
    penalised = play_rounds(
        make_tiny_job("method.name=adalora", "method.final_budget=1.0", *common)
    )
    assert penalised[-1].row["state_digest"] not in digests


def test_the_start_is_adaloras() -> None:
    job = make_tiny_job(*ADALORA)
    for name, rows in join_rows(job.state.parts).items():
        assert not job.state.parts["E"][name].any()
        assert rows.std() == pytest.approx(0.02, rel=0.3)
    assert job.method.form(job.state).scale == 1.0


def test_everything_can_be_pruned() -> None:
    job = make_tiny_job(*ADALORA, "method.final_budget=0.0")
    rounds = play_rounds(job)
    assert rounds[-2].row["live_triplets"] == rounds[-1].row["live_triplets"] == 0
    assert rounds[-1].row["uplink_bytes"] == 5 * (24 + 4 * NUM_HEAD)
    assert rounds[-1].row["downlink_bytes"] == 5 * (24 + 4 * NUM_HEAD + 48 // 8)


# ---- settings ----


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("final_budget", 1.5),
        ("warmup_fraction", -0.1),
        ("final_fraction", 1.1),
        ("init_std", 0.0),
        ("orthogonality", -0.1),
    ],
)
def test_settings_out_of_range_are_named(key: str, value: float) -> None:
    with pytest.raises(InputError) as error:
        AdaLora(**{key: value})
    assert f"method.{key} = {value}" in str(error.value)
    assert "must be" in str(error.value)
