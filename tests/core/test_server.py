"""Server optimisers: their equations by hand, where their moments lie, and the bits of a run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.run.checkpoint import find_checkpoint, restore, save_checkpoint
from bench.run.job import Job
from fedara_core.comm.base import Communicator
from fedara_core.server import MOMENTUM, VARIANCE, ServerOptimizer
from fedara_core.state import ServerState
from support.in_turn import in_turn
from support.rounds import make_tiny_job, play_rounds

OPTIMIZERS = ("fedavgm", "fedadam", "fedyogi")
COMMON = ("method.name=lora", "federation.num_rounds=4", "train.local_steps=2")
# All that local training and server can do to a run's bits, at once.
ALL_ON = (
    *("adapter.dropout=0.1", "train.schedule=linear", "train.round_schedule=cosine"),
    *("train.proximal_mu=0.1", "train.warmup_rounds=1"),
)


def job_of(name: str, *words: str) -> Job:
    return make_tiny_job(*COMMON, f"federation.server_optimizer={name}", *words)


def steps(server: ServerOptimizer, state: ServerState, means: np.ndarray) -> list[ServerState]:
    """The states after each of the means (rounds, num_sent)."""
    states = [state]
    for mean in means:
        vector = states[-1].vector.clone()
        vector[: len(mean)] = torch.from_numpy(mean)
        states.append(server.step(states[-1], replace(states[-1], vector=vector)))
    return states[1:]


@pytest.fixture(scope="module")
def state() -> ServerState:
    """B of FFA-LoRA and the head travel, A does not."""
    return make_tiny_job("method.name=ffa_lora").state


@pytest.fixture(scope="module")
def means(state: ServerState) -> np.ndarray:
    drawn = torch.randn(4, state.index.num_sent, generator=torch.Generator().manual_seed(1))
    drawn[:, 0] = state.sent[0]  # one value never moves
    return drawn.numpy()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_equations_by_hand(name: Any, state: ServerState, means: np.ndarray) -> None:
    """In float64, value by value as the papers write them; what does not travel stays."""
    server = ServerOptimizer(name=name, lr=0.3, momentum=0.6, beta2=0.7, tau=0.05)
    x = state.sent.double().numpy()
    m, v = np.zeros_like(x), np.full_like(x, 0.05**2)
    for mean, after in zip(means, steps(server, state, means), strict=True):
        d = mean.astype(np.float64) - x
        if name == "fedavgm":
            m = 0.6 * m + d
            x = x + 0.3 * m
        else:
            m = 0.6 * m + 0.4 * d
            sign = np.sign(v - d * d)
            v = 0.7 * v + 0.3 * d * d if name == "fedadam" else v - 0.3 * d * d * sign
            x = x + 0.3 * m / (np.sqrt(v) + 0.05)
            np.testing.assert_allclose(after.extra[VARIANCE].numpy(), v, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(after.extra[MOMENTUM].numpy(), m, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(after.sent.numpy(), x, rtol=1e-4, atol=1e-5)
        assert after.sent[0] == state.sent[0]
        num_sent = state.index.num_sent
        assert len(after.vector) > num_sent
        assert torch.equal(after.vector[num_sent:], state.vector[num_sent:])


def test_fedavgm_is_sgd_with_momentum_on_the_pseudo_gradient(
    state: ServerState, means: np.ndarray
) -> None:
    parameter = torch.nn.Parameter(state.sent.double())
    sgd = torch.optim.SGD([parameter], lr=0.5, momentum=0.9)
    for mean, after in zip(
        means, steps(ServerOptimizer(name="fedavgm", lr=0.5), state, means), strict=True
    ):
        parameter.grad = parameter.detach() - torch.from_numpy(mean).double()
        sgd.step()
        torch.testing.assert_close(after.sent.double(), parameter.detach(), rtol=1e-5, atol=1e-5)


def test_fedavg_moves_by_its_learning_rate(state: ServerState, means: np.ndarray) -> None:
    (after,) = steps(ServerOptimizer(lr=0.25), state, means[:1])
    expected = state.sent + 0.25 * (torch.from_numpy(means[0]) - state.sent)
    torch.testing.assert_close(after.sent, expected)
    assert after.extra == {}


def test_fedavgm_without_momentum_is_fedavg_bit_by_bit() -> None:
    plain = play_rounds(make_tiny_job(*COMMON))
    written = play_rounds(job_of("fedavg", "federation.server_lr=1.0"))
    without = play_rounds(job_of("fedavgm", "federation.server_momentum=0.0"))
    for ours, same, theirs in zip(without, written, plain, strict=True):
        assert same.row == theirs.row
        assert torch.equal(ours.after.vector, theirs.after.vector)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_round_moves_rows_and_head_and_sends_no_byte_more(name: str) -> None:
    plain, played = play_rounds(make_tiny_job(*COMMON)), play_rounds(job_of(name))
    for ours, theirs in zip(played, plain, strict=True):
        for key in ("uplink_bytes", "downlink_bytes", "live_triplets"):
            assert ours.row[key] == theirs.row[key]
    first, last = played[0], played[-1]
    # The same uploads came in round 0: only the step differs; with fedavgm it is the mean's.
    assert first.row["train_loss"] == plain[0].row["train_loss"]
    same = torch.allclose(first.after.vector, plain[0].after.vector, rtol=0, atol=1e-7)
    assert same == (name == "fedavgm")
    assert not torch.allclose(last.after.vector, plain[-1].after.vector, rtol=0, atol=1e-4)
    for part in ("A", "B", ""):
        run = first.after.index.runs[part]
        assert (last.after.vector[run] != first.before.vector[run]).any()
        assert last.after.extra[MOMENTUM][run].any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_resumes_with_its_moments(name: str, tmp_path: Path) -> None:
    job = job_of(name, *ALL_ON)
    whole = play_rounds(job)
    save_checkpoint(tmp_path, whole[1].after, {}, {})
    found = find_checkpoint(tmp_path)
    assert found is not None
    again = job_of(name, *ALL_ON)
    resumed, _ = restore(again.state, found.data, {})
    assert resumed.digest() == whole[1].row["state_digest"]
    rest = play_rounds(again, resumed)
    assert [p.row["state_digest"] for p in rest] == [p.row["state_digest"] for p in whole[2:]]
    without = replace(resumed, extra={})  # the moments are in the digest, and count
    assert without.digest() != resumed.digest()
    (other,) = play_rounds(again, without, 1)
    assert not torch.equal(other.after.vector, rest[0].after.vector)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_number_of_processes_changes_nothing(world_size: int) -> None:
    expected = [played.row["state_digest"] for played in play_rounds(job_of("fedyogi", *ALL_ON))]
    jobs = [job_of("fedyogi", *ALL_ON) for _ in range(world_size)]

    def run(communicator: Communicator) -> list[str]:
        played = play_rounds(jobs[communicator.world_rank], communicator=communicator)
        return [one.row["state_digest"] for one in played]

    assert in_turn(world_size, run) == [expected] * world_size


def test_a_round_without_uploads_leaves_the_moments_alone() -> None:
    played = play_rounds(job_of("fedadam", "clients.dropout=0.75", "federation.num_rounds=20"))
    empty = [one for one in played[1:] if not one.row["num_arrived"] and one.before.extra]
    assert empty
    for one in empty:
        assert torch.equal(one.after.vector, one.before.vector)
        for name in (MOMENTUM, VARIANCE):
            assert torch.equal(one.after.extra[name], one.before.extra[name])


def test_it_goes_on_from_what_clients_downloaded() -> None:
    """Under a codec the message, not the state behind it, is where the mean's change starts."""
    words = ("codec.down=int4", "codec.error_feedback=true")
    plain = play_rounds(make_tiny_job(*COMMON, *words), num_rounds=1)[0].after
    after = play_rounds(job_of("fedavgm", *words), num_rounds=1)[0].after
    assert torch.equal(after.vector, plain.vector)
    assert after.extra.keys() == {*plain.extra, MOMENTUM}
