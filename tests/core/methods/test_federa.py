"""FeDeRA: the start against numpy's SVD, the unchanged function, the reduction to LoRA, bytes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.models.encoders import build_model
from bench.run.job import Job
from fedara_core.state import with_parts
from support.adapted import join_rows
from support.rounds import make_tiny_job, play_rounds

FEDERA = ("method.name=federa", "adapter.lora_alpha=8.0", "train.local_steps=2")  # scale 2
SHAPES = [(32, 32)] * 8 + [(64, 32), (32, 64)] * 2  # tiny.toml's model
NUM_HEAD = 4 * 32 + 4


def logits(job: Job, model: torch.nn.Module) -> Tensor:
    batch = job.train.batch(torch.arange(8), job.device)
    model.eval()
    with torch.no_grad():
        return model(batch["input_ids"], batch["attention_mask"])


def test_the_start_is_the_best_low_rank_part_of_each_weight() -> None:
    job = make_tiny_job(*FEDERA)
    assert len(job.state.rank_masks) == 12
    for name, adapter in job.model.adapters.items():
        weight = adapter.base.weight.detach().double().numpy()
        u, s, vt = np.linalg.svd(weight)
        best = u[:, :4] @ np.diag(s[:4]) @ vt[:4]
        a = job.state.parts["A"][name].double().numpy()
        b = job.state.parts["B"][name].double().numpy().T
        np.testing.assert_allclose(2.0 * b @ a, best, atol=1e-6)
        np.testing.assert_allclose(job.state.fixed["delta"][name].numpy(), -best, atol=1e-6)
        # Both factors get sqrt(S / scale): neither is left with all of S, or with none of it.
        np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.sqrt(s[:4] / 2), rtol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(b, axis=0), np.sqrt(s[:4] / 2), rtol=1e-5)


def test_the_start_leaves_the_function_as_it_was() -> None:
    job = make_tiny_job(*FEDERA, "model.name=tiny")
    plain = build_model(job.config.model, num_classes=4, seed=job.config.seed).model
    before = logits(job, plain)
    job.method.download(job.model, job.state, None)
    torch.testing.assert_close(logits(job, job.model.module), before, rtol=0, atol=1e-5)
    job.method.download(job.model, replace(job.state, fixed={}), None)
    assert (logits(job, job.model.module) - before).abs().max() > 1e-2  # the delta does it


def test_the_start_does_not_hang_on_the_signs_of_an_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = make_tiny_job(*FEDERA).state.digest()
    svd = torch.linalg.svd

    def other_signs(matrix: Tensor, **options: bool) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vt = svd(matrix, **options)
        flip = torch.where(torch.arange(len(s)) % 3 == 0, -1.0, 1.0).double()
        return u * flip, s, vt * flip[:, None]

    monkeypatch.setattr(torch.linalg, "svd", other_signs)
    assert make_tiny_job(*FEDERA).state.digest() == digest


def test_training_moves_the_low_rank_part_only() -> None:
    job = make_tiny_job(*FEDERA, "train.lr=2e-2")
    state = play_rounds(job, num_rounds=2)[-1].after
    job.method.download(job.model, state, None)
    for name, adapter in job.model.adapters.items():
        d_in = adapter.shape[1]
        (start_a, start_b), (a, b) = (
            (one.parts["A"][name], one.parts["B"][name].T) for one in (job.state, state)
        )
        moved = 2 * (b @ a - start_b @ start_a)
        with torch.no_grad():  # the rows of the identity give the columns of the weight
            weight = (adapter(torch.eye(d_in)) - adapter.base.bias).T
        assert moved.abs().max() > 1e-3
        torch.testing.assert_close(weight, adapter.base.weight + moved, rtol=0, atol=1e-5)


def test_from_loras_start_it_is_lora() -> None:
    lora = make_tiny_job("method.name=lora", *FEDERA[1:])
    federa = make_tiny_job(*FEDERA)
    zero = {name: torch.zeros(shape) for name, shape in federa.model.shapes.items()}
    form, whole = federa.method.form(federa.state), federa.state.whole
    start = with_parts(federa.state, form, lora.state.parts, whole)
    start = replace(start, fixed={"delta": zero})
    ours, theirs = play_rounds(federa, start, 2)[-1], play_rounds(lora, num_rounds=2)[-1]
    assert ours.row["train_loss"] == theirs.row["train_loss"]
    assert torch.equal(ours.after.vector, theirs.after.vector)
    first = join_rows(lora.state.parts)
    for name, rows in join_rows(theirs.after.parts).items():
        assert not torch.equal(rows, first[name])


def test_the_start_factors_travel_once_to_each_client() -> None:
    """In round 0 they are the current factors; later a newcomer gets both."""
    factors = 4 * 4 * sum(d_out + d_in for d_out, d_in in SHAPES)
    usual = 24 + factors + 4 * NUM_HEAD
    seen: set[int] = set()
    num_late = []
    for played in play_rounds(make_tiny_job(*FEDERA)):
        cohort = set(played.row["cohort"])
        round_index = played.row["round_index"]
        late = cohort - seen if round_index else set()
        num_late.append(len(late))
        assert played.row["uplink_bytes"] == 5 * usual
        first = 24 + factors  # the head's start is the seed's
        down = 5 * (usual if round_index else first)
        assert played.row["downlink_bytes"] == down + len(late) * factors
        seen |= cohort
    assert num_late[0] == 0
    assert sum(num_late) == 3  # 8 clients, 5 of them in round 0
