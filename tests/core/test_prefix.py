"""The frozen prefix: its layers run once for each text, and nothing else changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.metering.flops import BatchShape, StepFlops
from bench.run.checkpoint import find_checkpoint, restore, save_checkpoint
from bench.run.job import Job
from fedara_core.errors import InputError
from fedara_core.prefix import FrozenPrefix, frozen_depth, layer_stack
from support.models import SIZES, write_model
from support.rounds import make_tiny_job, play_rounds

TOP = "adapter.targets=['layer.1.attention.self.query']"  # of two layers
COMMON = ("model.name=tiny", "method.name=lora", TOP, "federation.num_rounds=3", "train.lr=1e-2")
CACHE = "train.frozen_prefix=cache"


def prefix_of(job: Job) -> FrozenPrefix:
    assert job.prefix is not None
    return job.prefix


def digests(job: Job, **kwargs: Any) -> list[str]:
    return [played.row["state_digest"] for played in play_rounds(job, **kwargs)]


def test_without_dropout_it_changes_rounding_alone() -> None:
    words = (*COMMON, "model.dropout=0.0")
    ours, theirs = (play_rounds(make_tiny_job(*words, *more)) for more in ((CACHE,), ()))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.after.vector, other.after.vector, rtol=0, atol=1e-4)
        assert one.row["train_loss"] == pytest.approx(other.row["train_loss"], abs=1e-5)
        assert one.row["accuracy"] == other.row["accuracy"]


def test_dropout_is_off_below_and_on_above() -> None:
    job = make_tiny_job(*COMMON, CACHE, "model.dropout=0.5")
    job.method.download(job.model, job.state, None)
    batch = job.train.batch(torch.arange(4), job.device)
    found = [job.model.logits(batch) for _ in range(2)]
    assert not torch.equal(*found)
    kept = dict(prefix_of(job)._kept)
    job.model.logits(batch)
    assert all(kept[number] is states for number, states in prefix_of(job)._kept.items())


def test_each_text_is_computed_once_while_the_layers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_tiny_job(*COMMON, CACHE)
    job.method.download(job.model, job.state, None)
    job.model.module.eval()
    batch = job.train.batch(torch.arange(6), job.device)
    computed: list[int] = []

    def states(ids: Tensor, mask: Tensor) -> Tensor:
        computed.append(int(mask.sum()))
        return original(ids, mask)

    original = prefix_of(job)._states
    monkeypatch.setattr(prefix_of(job), "_states", states)
    for _ in range(3):
        job.model.logits(batch)
    assert computed == job.train.lengths[:6].tolist()
    evaluated = job.evaluated.batch(torch.arange(6), job.device)  # other texts of the same places
    job.model.logits(evaluated)
    assert computed[6:] == job.evaluated.lengths[:6].tolist()


TIMED = (  # FLOPs decide who is late
    *("clients.over_selection=1.6", "devices.shares={orin_nano=0.5, raspberry_pi_5=0.5}"),
    "evaluate.every=2",
)


@pytest.mark.parametrize("more", [(), TIMED], ids=["all arrive", "timed"])
def test_the_bits_do_not_depend_on_the_memory_or_the_resume(
    more: tuple[str, ...], tmp_path: Path
) -> None:
    words = (*COMMON, CACHE, *more)
    wanted = digests(make_tiny_job(*words))
    small = make_tiny_job(*words)
    prefix_of(small)._max_bytes = 2000  # of two texts
    assert digests(small) == wanted
    assert prefix_of(small)._num_bytes <= 2000
    halfway = play_rounds(make_tiny_job(*words), num_rounds=2)[-1].after
    save_checkpoint(tmp_path, halfway, {}, {})
    job = make_tiny_job(*words)
    found = find_checkpoint(tmp_path)
    assert found is not None
    state, _ = restore(job.state, found.data, {})
    assert digests(job, state=state) == wanted[2:]


def test_flops_are_those_that_are_executed() -> None:
    job = make_tiny_job(*COMMON, CACHE, "adapter.fused=false")
    flops, prefix = StepFlops(job.model), prefix_of(job)
    job.method.download(job.model, job.state, None)
    job.model.module.train()
    prefix.settle()
    cost = flops.now(prefix.depth)
    batch = job.train.batch(torch.arange(4), job.device)
    lengths = job.train.lengths[:4].tolist()
    with FlopCounterMode(display=False) as counter:
        job.model.logits(batch).sum().backward()
    first = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        job.model.logits(batch).sum().backward()
    step = counter.get_total_flops()
    assert cost.flops(4, max(lengths), sum(lengths)) == step
    assert cost.prefix_total(BatchShape(1, n, n) for n in lengths) == first - step
    assert flops.now().flops(4, max(lengths), sum(lengths)) > step


def test_a_record_counts_each_text_of_a_client_once_a_round() -> None:
    """Two passes: every text is read twice, and the layers below count once."""
    words = (*COMMON, "partition.scheme=iid", "train.local_steps=12", "federation.num_rounds=1")
    job, plain = make_tiny_job(*words, CACHE), make_tiny_job(*words)
    costs, wholes = (play_rounds(each)[0].row["clients"] for each in (job, plain))
    job.method.download(job.model, job.state, None)
    below = StepFlops(plain.model).now(1)
    for cost, whole in zip(costs, wholes, strict=True):
        lengths = job.train.lengths[job.shards[cost.client_id]].tolist()
        once = below.prefix_total(BatchShape(1, n, n) for n in lengths)
        assert once <= whole.flops - cost.flops < 1.5 * once  # attention pads in a batch


def test_a_projection_below_the_layers_runs_in_every_step(tmp_path: Path) -> None:
    settings = transformers.ElectraConfig(**SIZES, embedding_size=8)
    name = write_model(tmp_path, settings, pad_token="!").name
    job = make_tiny_job(f"model.name={name}", "method.name=head_only", CACHE)
    job.method.download(job.model, job.state, None)
    batch = job.train.batch(torch.arange(4), job.device)
    job.model.logits(batch)
    with FlopCounterMode(display=False) as counter:
        job.model.logits(batch).sum().backward()
    lengths = job.train.lengths[:4].tolist()
    cost = StepFlops(job.model).now(2)
    assert cost.flops(4, max(lengths), sum(lengths)) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("words", "depth"),
    [
        (("method.name=head_only",), 2),
        (("method.name=lora",), 0),
        (("method.name=lora", TOP), 1),
        (("method.name=bitfit",), 0),
        (("method.name=full",), 0),
    ],
)
def test_depth(words: tuple[str, ...], depth: int) -> None:
    job = make_tiny_job("model.name=tiny", *words)
    job.method.download(job.model, job.state, None)
    assert frozen_depth(job.model, layer_stack(job.model.module)) == depth


def test_states_of_other_layers_are_forgotten() -> None:
    """FedARA's last triplets of a layer die: more lies below."""
    job = make_tiny_job("model.name=tiny", "method.name=fedara", CACHE, "federation.num_rounds=2")
    batch = job.train.batch(torch.arange(2), job.device)
    state = play_rounds(job, num_rounds=1)[0].after
    job.method.download(job.model, state, None)
    job.model.logits(batch)
    prefix = prefix_of(job)
    assert (prefix.depth, len(prefix._kept)) == (0, 0)
    for name, adapter in job.model.adapters.items():
        if "layer.0" in name:
            adapter.form = None
            adapter.parts.clear()
    job.model.logits(batch)
    assert (prefix.depth, len(prefix._kept)) == (1, 2)
    job.model.fixed = {"delta": {}}  # such as another change of W0
    prefix.settle()
    assert len(prefix._kept) == 0


def test_a_model_with_padding_is_refused() -> None:
    with pytest.raises(InputError, match=r"^train.frozen_prefix = 'cache': model.name = 'toy'"):
        make_tiny_job(CACHE, "method.name=head_only")
