"""Local training: learning rates, beside transformers' schedulers, and FedProx's term."""

from dataclasses import replace
from typing import Literal

import pytest
import torch
import transformers
from torch import nn

from bench.run.clients import make_client
from bench.run.job import Job
from fedara_core.method import Client
from fedara_core.train import LocalTraining, Schedule, decay, start_client
from support.rounds import make_tiny_job, play_rounds

SCHEDULES: tuple[Schedule, ...] = ("constant", "linear", "cosine")
# Three groups of learning rates: A, E ten times that, then B and the head.
SVD = ("method.name=fedara", "method.e_lr_factor=10.0", "train.optimizer=sgd")


def started(job: Job, round_index: int = 0, client_id: int = 0) -> Client:
    """A client that is about to take its first step of a round."""
    state = replace(job.state, round_index=round_index)
    num_examples = len(job.shards[client_id])
    client = Client(client_id=client_id, num_examples=num_examples, model=job.model)
    job.method.download(job.model, state, client)
    start_client(client, job.method, job.training, state)
    return client


def theirs(schedule: Schedule, lrs: list[float], num_steps: int) -> list[list[float]]:
    """The learning rates of transformers' scheduler before each of num_steps steps."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]
    optimizer = torch.optim.SGD(groups)
    scheduler = transformers.get_scheduler(schedule, optimizer, 0, num_steps)
    found = []
    for _ in range(num_steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("length", ["train.local_steps=5", "train.local_epochs=2"])
def test_learning_rates_within_a_round_are_those_of_transformers(
    schedule: Schedule, length: str
) -> None:
    """Of each group, with its own factor; over local_epochs, each client by its own steps."""
    job = make_tiny_job(*SVD, f"train.schedule={schedule}", length, "train.max_grad_norm=none")
    for client_id in (0, 1):
        client = started(job, client_id=client_id)
        lr, num_steps = job.training.lr, job.training.num_steps(client.num_examples)
        expected = theirs(schedule, [lr, 10 * lr, lr], num_steps)
        for lrs in expected:
            before = client.vector.clone()
            client.gradient.fill_(1)
            client.step()
            assert [g["lr"] for g in client.optimizer.param_groups] == pytest.approx(lrs, abs=1e-12)
            moved = before - client.vector
            for part, lr in (("A", lrs[0]), ("E", lrs[1]), ("", lrs[2])):
                own = moved[job.state.index.runs[part]]
                torch.testing.assert_close(own, torch.full_like(own, lr), rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup_rounds", [0, 3])
def test_learning_rates_across_rounds_are_those_of_transformers_after_the_warmup(
    schedule: Schedule, warmup_rounds: int
) -> None:
    training = LocalTraining(
        lr=0.3, local_steps=1, round_schedule=schedule, warmup_rounds=warmup_rounds
    )
    lrs = [training.lr_at(round_index, 10) for round_index in range(10)]
    growing = [0.3 * (i + 1) / (warmup_rounds + 1) for i in range(warmup_rounds)]
    decaying = [lr for (lr,) in theirs(schedule, [0.3], 10 - warmup_rounds)]
    assert lrs == pytest.approx([*growing, *decaying], abs=1e-12)
    assert training.lr_at(9, 10) > 0


@pytest.mark.parametrize(
    ("schedule", "half"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)]
)
def test_a_schedule_ends_at_zero(schedule: Schedule, half: float) -> None:
    end = 1.0 if schedule == "constant" else 0.0
    found = [decay(schedule, done, 8) for done in (0, 4, 8, 9)]
    assert found == pytest.approx([1.0, half, end, end])


def test_a_warmup_as_long_as_the_run_only_grows() -> None:
    training = LocalTraining(lr=1.0, local_steps=1, round_schedule="linear", warmup_rounds=3)
    assert [training.lr_at(i, 2) for i in range(2)] == [0.25, 0.5]


def test_both_schedules_multiply() -> None:
    job = make_tiny_job(
        *("method.name=lora", "train.optimizer=sgd", "train.lr=0.4", "train.local_steps=4"),
        *("train.schedule=linear", "train.round_schedule=linear", "federation.num_rounds=4"),
    )
    client = started(job, round_index=3)  # a quarter of the learning rate is left
    lrs = []
    for _ in range(4):
        client.step()
        lrs.append(client.optimizer.param_groups[0]["lr"])
    assert lrs == pytest.approx([0.1, 0.075, 0.05, 0.025])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_schedule_changes_what_a_round_learns(optimizer: Literal["adamw", "sgd"]) -> None:
    common = ("method.name=lora", f"train.optimizer={optimizer}", "federation.num_rounds=1")
    digests = set()
    for schedule in SCHEDULES:
        (played,) = play_rounds(make_tiny_job(*common, f"train.schedule={schedule}"))
        digests.add(played.row["state_digest"])
    assert len(digests) == 3


# ---- FedProx ----


def test_the_proximal_term_pulls_to_the_rounds_start() -> None:
    """w <- w - lr (g + mu (w - w_start)), by hand, over rows and head alike."""
    job = make_tiny_job(
        *("method.name=lora", "train.optimizer=sgd", "train.lr=0.5", "train.proximal_mu=0.2"),
        "train.max_grad_norm=none",
    )
    client = started(job)
    start, gradient = client.vector.clone(), torch.randn(len(client.vector))
    moved = torch.zeros_like(start)  # w - w_start
    for _ in range(3):
        client.gradient.copy_(gradient)
        client.step()
        moved = moved - 0.5 * (gradient + 0.2 * moved)
        torch.testing.assert_close(client.vector - start, moved, rtol=0, atol=1e-5)
    assert (moved + 1.5 * gradient).abs().max() > 0.1  # where it would be without the term


def test_the_proximal_term_is_in_the_gradient_that_is_clipped() -> None:
    job = make_tiny_job(
        *("method.name=lora", "train.optimizer=sgd", "train.lr=1.0", "train.proximal_mu=1e6"),
        "train.max_grad_norm=0.5",
    )
    client = started(job)
    client.vector.add_(1.0)
    before = client.vector.clone()
    client.step()
    assert float((before - client.vector).norm()) == pytest.approx(0.5, rel=1e-3)


def test_it_starts_from_what_a_client_keeps() -> None:
    """FedSA-LoRA's B is the client's own: at the start of a round there is no pull on it."""
    job = make_tiny_job("method.name=fedsa_lora", "train.proximal_mu=1.0")
    (played,) = play_rounds(job, num_rounds=1)
    client_id = played.row["cohort"][0]
    client = make_client(job, client_id)
    job.method.download(job.model, played.after, client)
    start_client(client, job.method, job.training, played.after)
    assert client.start is not None
    assert torch.equal(client.start, client.vector)
    assert client.start[played.after.index.runs["B"]].any()


def test_without_mu_nothing_changes_and_with_it_clients_stay_nearer() -> None:
    """mu = 0 has the bits of a config without it."""
    distances = []
    for mu in (None, 0.0, 10.0):
        words = ("method.name=lora", "federation.num_rounds=1", "train.optimizer=sgd")
        job = make_tiny_job(
            *words, "train.lr=0.05", *([] if mu is None else [f"train.proximal_mu={mu}"])
        )
        (played,) = play_rounds(job)
        distances.append(float((played.after.vector - played.before.vector).norm()))
    assert distances[0] == distances[1]
    assert distances[2] < 0.9 * distances[1]
