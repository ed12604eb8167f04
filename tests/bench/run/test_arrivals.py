"""Clients that fail: who vanishes, arrives and is late, by hand; and that nobody else notices."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.metering.client_cost import ClientCost, reduce_clients
from bench.run import clients
from bench.run.arrivals import Fleet, draw_speeds, first
from bench.run.checkpoint import dump, find_checkpoint, restore, save_checkpoint
from bench.run.clients import draw_cohort
from bench.run.job import Job
from fedara_core.comm.base import Communicator
from fedara_core.errors import InputError
from fedara_core.method import method_names
from fedara_core.state import ServerState, relaid
from support.in_turn import in_turn
from support.launch import ROOT, TINY, fedara_here, rounds_of
from support.rounds import make_tiny_job, play_rounds, received, train_one_client

DEVICES = """
[fast]
fp32_flops_per_second = 1e9
fp16_flops_per_second = 1e9
active_watts = 5.0
idle_watts = 1.0
memory_bytes = 4e9
uplink_mbits_per_second = 8.0
downlink_mbits_per_second = 16.0

[slow]
fp32_flops_per_second = 2e8
fp16_flops_per_second = 2e8
active_watts = 5.0
idle_watts = 1.0
memory_bytes = 4e9
uplink_mbits_per_second = 4.0
downlink_mbits_per_second = 8.0
"""
SHORT = ("train.local_steps=2", "evaluate.every=100")
ALL_DRAWN = "clients.over_selection=1.6"  # all 8 clients for a cohort of 5


@pytest.fixture
def shares(tmp_path: Path) -> tuple[str, ...]:
    """Overrides that deal two kinds of devices, and speeds, to the clients."""
    path = tmp_path / "devices.toml"
    path.write_text(DEVICES)
    return (
        *(f"devices.file={path}", "devices.shares={fast=0.5, slow=0.5}", "devices.names=[]"),
        "clients.speed_spread=0.5",
    )


def times_by_hand(job: Job, row: dict[str, Any]) -> dict[int, float]:
    """8 bits a byte, at 8 (4) Mbit/s up and 16 (8) down; 1 (0.2) GFLOP/s times the client's own."""
    times = {}
    for cost in row["clients"]:
        slow = job.fleet.device_of[cost.client_id] == "slow"
        rate = (2e8 if slow else 1e9) * job.fleet.speeds[cost.client_id]
        down, up = cost.downlink_bytes / 2e6, cost.uplink_bytes / 1e6
        times[cost.client_id] = cost.flops / rate + (down + up) * (2 if slow else 1)
    return times


def aggregate_by_hand(job: Job, state: ServerState, client_ids: Sequence[int]) -> str:
    """Digest of the next state from these clients alone."""
    uploads = [train_one_client(job, state, client_id) for client_id in client_ids]
    return job.method.aggregate(state, received(job.method, state, uploads)).digest()


# ---- draws ----


def test_as_many_vanish_as_dropout_says() -> None:
    fleet = make_tiny_job("clients.dropout=0.3").fleet
    draws = np.array([[fleet.vanishes(t, c) for c in range(100)] for t in range(200)])
    deviation = math.sqrt(0.3 * 0.7 / draws.size)
    assert abs(draws.mean() - 0.3) < 4 * deviation
    # No client and no round is special, and rounds are independent.
    assert np.abs(draws.mean(axis=0) - 0.3).max() < 5 * math.sqrt(0.3 * 0.7 / 200)
    assert np.abs(draws.mean(axis=1) - 0.3).max() < 5 * math.sqrt(0.3 * 0.7 / 100)
    both = (draws[1:] & draws[:-1]).mean()
    assert abs(both - 0.09) < 4 * math.sqrt(0.09 * 0.91 / draws[1:].size)
    other = dataclasses.replace(fleet, seed=1)
    assert [other.vanishes(0, c) for c in range(100)] != draws[0].tolist()


def test_speeds_are_log_normal() -> None:
    speeds = draw_speeds(0.5, num_clients=10_000, seed=3)
    logarithms = np.log(speeds)
    assert abs(logarithms.mean()) < 4 * 0.5 / 100
    assert logarithms.std() == pytest.approx(0.5, rel=0.03)
    assert draw_speeds(0.5, num_clients=10, seed=3) == speeds[:10]
    assert draw_speeds(0.5, num_clients=10, seed=4) != speeds[:10]
    assert draw_speeds(0.0, num_clients=3, seed=3) == [1.0] * 3


@pytest.mark.parametrize(
    ("num_wanted", "deadline", "arrived"),
    [
        (5, None, [1, 4, 6, 7, 9]),
        (3, None, [4, 7, 9]),
        (2, None, [4, 9]),  # 7 is as fast as 9, and 4 as both: lowest client_ids first
        (5, 3.0, [4, 6, 7, 9]),  # an upload that comes at the deadline is in time
        (5, 2.9, [4, 7, 9]),
        (3, 1.0, []),
    ],
)
def test_the_first_to_arrive(num_wanted: int, deadline: float | None, arrived: list[int]) -> None:
    seconds = {9: 1.5, 7: 2.0, 4: 2.0, 1: 4.0, 6: 3.0}
    assert first(seconds, num_wanted, deadline) == arrived


# ---- one round by hand ----


def test_a_deadline(shares: tuple[str, ...]) -> None:
    common = (*SHORT, *shares, "method.name=lora", "federation.cohort=8")
    job = make_tiny_job(*common, "clients.deadline_seconds=1e6")
    (patient,) = play_rounds(job, num_rounds=1)
    times = times_by_hand(job, patient.row)
    costs = {cost.client_id: cost for cost in patient.row["clients"]}
    assert {c: cost.modelled_seconds for c, cost in costs.items()} == pytest.approx(times)
    assert len(set(times.values())) == 8
    assert patient.row["arrived"] == list(range(8))
    assert patient.row["modelled_round_seconds"] == pytest.approx(max(times.values()))
    assert patient.row["late_uplink_bytes"] == 0

    order = sorted(times, key=times.__getitem__)
    deadline = (times[order[4]] + times[order[5]]) / 2
    job = make_tiny_job(*common, f"clients.deadline_seconds={deadline}")
    (played,) = play_rounds(job, num_rounds=1)
    row = played.row
    assert (row["arrived"], row["late"], row["dropped"]) == (
        sorted(order[:5]),
        sorted(order[5:]),
        [],
    )
    assert (row["num_arrived"], row["num_late"], row["num_dropped"]) == (5, 3, 0)
    assert row["cohort"] == list(range(8))
    assert row["modelled_round_seconds"] == deadline
    uplink = {cost.client_id: cost.uplink_bytes for cost in row["clients"]}
    assert row["uplink_bytes"] == sum(uplink[c] for c in row["arrived"])
    assert row["late_uplink_bytes"] == sum(uplink[c] for c in row["late"])
    assert row["downlink_bytes"] == patient.row["downlink_bytes"]
    assert row["state_digest"] == aggregate_by_hand(job, played.before, row["arrived"])
    assert row["state_digest"] != patient.row["state_digest"]
    took_part = (played.after.last_round == 0).nonzero().flatten().tolist()
    assert took_part == row["arrived"]


def test_over_selection_takes_the_fastest(shares: tuple[str, ...]) -> None:
    job = make_tiny_job(*SHORT, *shares, "method.name=lora", ALL_DRAWN)
    (played,) = play_rounds(job, num_rounds=1)
    times = times_by_hand(job, played.row)
    order = sorted(times, key=times.__getitem__)
    assert played.row["arrived"] == sorted(order[:5])
    assert played.row["late"] == sorted(order[5:])
    assert played.row["modelled_round_seconds"] == pytest.approx(times[order[4]])
    by_hand = aggregate_by_hand(job, played.before, played.row["arrived"])
    assert played.row["state_digest"] == by_hand
    # Those that would be drawn without over-selection are among those that are drawn.
    assert set(draw_cohort(make_tiny_job(), 3)) < set(draw_cohort(job, 3)) == set(range(8))


def test_dropout() -> None:
    """Clients that vanish download, and do nothing else; FedARA's votes are of the others."""
    settings = ("federation.cohort=8", "method.warmup_fraction=0.0", *SHORT)
    job = make_tiny_job(*settings, "clients.dropout=0.5")
    played = play_rounds(job, num_rounds=3)
    everyone = play_rounds(make_tiny_job(*settings), num_rounds=1)[0]
    for one in played:
        row = one.row
        gone = [c for c in range(8) if job.fleet.vanishes(one.before.round_index, c)]
        assert row["dropped"] == gone
        assert row["arrived"] == sorted(set(range(8)) - set(gone))
        assert row["late"] == []
        assert "modelled_round_seconds" not in row  # nobody has a device
        for cost in row["clients"]:
            assert cost.downlink_bytes > 0
            assert (cost.uplink_bytes == 0) == (cost.flops == 0) == (cost.client_id in gone)
        by_hand = aggregate_by_hand(job, one.before, row["arrived"])
        assert row["state_digest"] == by_hand
    assert 0 < len(played[0].row["dropped"]) < 8
    assert played[0].row["downlink_bytes"] == everyone.row["downlink_bytes"]
    assert played[-1].row["live_triplets"] < everyone.row["live_triplets"]


def test_by_default_nothing_changes() -> None:
    """Devices and speeds alone change no bit and no key."""
    plain = play_rounds(make_tiny_job(*SHORT), num_rounds=2)
    dealt = play_rounds(make_tiny_job(*SHORT, "devices.shares={orin_nano=1.0}"), num_rounds=2)
    spread = play_rounds(make_tiny_job(*SHORT, "clients.speed_spread=1.0"), num_rounds=2)
    for one, two, three in zip(plain, dealt, spread, strict=True):
        assert one.row.keys() == two.row.keys()
        assert "arrived" not in one.row
        assert one.row["state_digest"] == two.row["state_digest"] == three.row["state_digest"]
        assert all(cost.modelled_seconds is None for cost in one.row["clients"])


# ---- rounds in a row ----


@pytest.mark.parametrize("name", method_names())
def test_rounds_in_which_nobody_arrives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state stays as it was, and the next round takes it up. Round 0 is the last of SLoRA's
    first stage, whose end has to wait then."""
    monkeypatch.setattr(Fleet, "vanishes", lambda self, t, client_id: t in (0, 2) or client_id == 3)
    job = make_tiny_job(f"method.name={name}", "clients.dropout=0.1", *SHORT)
    played = play_rounds(job, num_rounds=4)
    for one in played:
        row, empty = one.row, one.before.round_index in (0, 2)
        assert one.after.round_index == one.before.round_index + 1
        # Where halves train in turn they lie elsewhere in the next round, with the same values.
        same = relaid(one.before, job.method.form(one.after)) if empty else one.before
        assert (row["state_digest"] == same.digest()) == empty
        before, after = one.before.whole, one.after.whole
        assert all(torch.equal(before[name], after[name]) == empty for name in before)
        assert ("train_loss" not in row) == (row["num_arrived"] == 0) == empty
        assert (row["uplink_bytes"] == 0) == empty
        assert row["downlink_bytes"] > 0
    assert played[3].row["num_dropped"] == (3 in played[3].row["cohort"])


@pytest.mark.parametrize("codec", ["fp32", "int4"])
def test_a_late_client_keeps_what_it_had(codec: str, shares: tuple[str, ...]) -> None:
    """A stateful method, and one whose codec's residual is kept: nothing of a late round stays."""
    name = "fedsa_lora" if codec == "fp32" else "lora"
    words = (f"method.name={name}", f"codec.up={codec}", *SHORT, *shares, ALL_DRAWN)
    if codec != "fp32":
        words = (*words, "codec.error_feedback=true")
    job = make_tiny_job(*words)
    state, was_late = job.state, 0
    for round_index in range(3):
        before = {c: dict(kept) for c, kept in job.client_state.items()}
        (played,) = play_rounds(job, state, 1)
        for client_id in played.row["late"]:
            assert job.client_state.get(client_id, {}).keys() == before.get(client_id, {}).keys()
            for key, tensor in before.get(client_id, {}).items():
                assert torch.equal(tensor, job.client_state[client_id][key])
        changed = played.row["arrived"]
        assert all(
            job.client_state[c].keys() and job.client_state[c] is not before.get(c) for c in changed
        )
        was_late += len(played.row["late"])
        state = played.after
        assert state.round_index == round_index + 1
    assert was_late == 9


# Methods whose uploads are summed on the way in, one of them with tensors kept at its clients; one
# that sums rows of the clients' choice, one that needs all factors; what makes their clients fail.
CASES = [
    ("lora", ("codec.up=int8", "codec.error_feedback=true"), "deadline"),
    ("fedsa_lora", (), "over-selection"),
    ("fedara", ("method.warmup_fraction=0.0",), "both"),
    ("adalora", (), "both"),
    ("flora", (), "both"),
]
RECORD = (
    *("cohort", "arrived", "dropped", "late", "train_loss", "uplink_bytes"),
    *("modelled_round_seconds", "state_digest"),
)


@pytest.mark.parametrize(("name", "settings", "failing"), CASES)
@pytest.mark.slow
def test_the_same_on_any_processes_and_after_an_interruption(
    name: str,
    settings: tuple[str, ...],
    failing: str,
    shares: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clients, "HELD_VALUES", 1)  # one client of a process at a time
    words = [f"method.name={name}", *settings, *SHORT, *shares, "clients.dropout=0.2"]
    words += [] if failing == "deadline" else [ALL_DRAWN]
    words += [] if failing == "over-selection" else ["clients.deadline_seconds=0.08"]
    job = make_tiny_job(*words)
    reference = play_rounds(job, num_rounds=2)
    belongs_to = job.belongs_to
    save_checkpoint(tmp_path, reference[-1].after, job.client_state, belongs_to)
    reference += play_rounds(job, reference[-1].after, 2)
    for key in ("arrived", "late", "dropped"):
        assert any(one.row[key] for one in reference), key

    again = make_tiny_job(*words)
    found = find_checkpoint(tmp_path)
    assert found is not None
    state, kept = restore(again.state, found.data, belongs_to)
    again.client_state.update(kept)
    assert [one.row for one in play_rounds(again, state, 2)] == [one.row for one in reference[2:]]

    def run(communicator: Communicator) -> list[dict[str, Any]]:
        return [one.row for one in play_rounds(make_tiny_job(*words), None, 4, communicator)]

    for world_size in (2, 3):
        parts = list(zip(*in_turn(world_size, run), strict=True))  # by round, by process
        for one, processes in zip(reference, parts, strict=True):
            for row in processes:
                assert {key: row.get(key) for key in RECORD} == {
                    key: one.row.get(key) for key in RECORD
                }
            for key in ("late_uplink_bytes", "downlink_bytes"):
                assert sum(row[key] for row in processes) == one.row[key]
            costs = sorted(
                (cost for row in processes for cost in row["clients"]), key=lambda c: c.client_id
            )
            assert [c.modelled_seconds for c in costs] == [
                c.modelled_seconds
                for c in sorted(one.row["clients"], key=lambda cost: cost.client_id)
            ]


def test_devices_that_became_faster_are_another_run(
    shares: tuple[str, ...], tmp_path: Path
) -> None:
    """Only where they decide who is late."""
    for setting, refused in (
        ("clients.deadline_seconds=9.0", True),
        ("clients.dropout=0.1", False),
    ):
        (tmp_path / "devices.toml").write_text(DEVICES)
        job = make_tiny_job(*shares, setting)
        old = job.belongs_to
        (tmp_path / "devices.toml").write_text(DEVICES.replace("2e8", "3e8"))
        again = make_tiny_job(*shares, setting)
        assert again.config.run_id == job.config.run_id
        new = again.belongs_to
        assert (new != old) == refused
        if refused:
            with pytest.raises(InputError, match=r"another run: .*device slow.*200000000"):
                restore(again.state, dump(job.state, {}, old), new)


# ---- the record ----


def test_the_record_of_clients_that_fail(shares: tuple[str, ...], tmp_path: Path) -> None:
    words = [*SHORT, *shares, ALL_DRAWN, "clients.dropout=0.3", "clients.deadline_seconds=0.08"]
    overrides = [word for text in words for word in ("--set", text)]
    job = fedara_here("run", TINY, *overrides, "--results", tmp_path / "results")
    assert job.code == 0, job.err
    (run_dir,) = (tmp_path / "results").iterdir()
    rows = rounds_of(run_dir)
    documented = (ROOT / "results" / "README.md").read_text()
    for row in rows:
        assert all(f"`{key}`" in documented for key in row if key != "seconds")
        assert sorted(row["arrived"] + row["dropped"] + row["late"]) == row["cohort"]
        for what in ("arrived", "dropped", "late"):
            assert row[f"num_{what}"] == len(row[what])
        by_client = {
            key: dict(zip(row["cohort"], row[f"{key}_by_client"], strict=True))
            for key in ("uplink_bytes", "downlink_bytes", "flops", "modelled_seconds")
        }
        assert row["uplink_bytes"] == sum(by_client["uplink_bytes"][c] for c in row["arrived"])
        assert row["late_uplink_bytes"] == sum(by_client["uplink_bytes"][c] for c in row["late"])
        assert row["downlink_bytes"] == sum(by_client["downlink_bytes"].values())
        assert row["flops"] == sum(by_client["flops"].values())
        seconds = by_client["modelled_seconds"]
        assert max(seconds[c] for c in row["arrived"]) <= row["modelled_round_seconds"] <= 0.08
        assert all(seconds[c] >= row["modelled_round_seconds"] for c in row["late"])
        slowest = row["modelled_by_device"]["mix"]
        assert slowest["modelled_seconds"] == round(max(seconds.values()), 6)
    assert {name for row in rows for name in ("dropped", "late") if row[name]} == {
        "dropped",
        "late",
    }
    entries = json.loads((run_dir / "partition.json").read_text())
    assert {entry["device"] for entry in entries} == {"fast", "slow"}
    assert len({entry["speed"] for entry in entries}) == 8
    assert f"round 1/6  arrived {rows[0]['num_arrived']} of 8  loss" in job.out


def test_costs_where_everybody_vanished() -> None:
    gone = [ClientCost(client_id=c, uplink_bytes=0, downlink_bytes=9, flops=0) for c in (4, 2)]
    found = reduce_clients([[dataclasses.asdict(cost)] for cost in gone])
    assert found == {
        "flops_by_client": [0, 0],
        "uplink_bytes_by_client": [0, 0],
        "downlink_bytes_by_client": [9, 9],
        "flops": 0,
    }


def test_times_need_counted_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.metering.client_cost.StepFlops", lambda model: 1 / 0)
    with (
        pytest.raises(InputError, match=r"model\.name = 'toy': its FLOPs can not be counted"),
        pytest.warns(RuntimeWarning, match="FLOPs are not counted"),
    ):
        make_tiny_job("clients.deadline_seconds=1.0", "devices.shares={orin_nano=1.0}")
