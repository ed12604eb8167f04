"""fedara micro roundtrip: its records, its bytes, wrong options; and rounds in several chunks."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from bench.run import clients
from fedara_core.codec import payload_bytes
from fedara_core.merge.sums import OrderedSum
from fedara_core.method import method_names
from support.documented import check_documented
from support.launch import fedara_here, launch
from support.rounds import make_tiny_job, play_rounds

pytestmark = pytest.mark.xdist_group("jobs")

ROUNDTRIP = ("-m", "bench", "micro", "roundtrip")
OPTIONS = ("--clients", "3,8", "--methods", "lora,fedara", "--model", "tiny", "--lora-rank", "4")
ROW_FLOATS, NUM_HEAD = 8 * (32 + 32) + 4 * (64 + 32), 20 * 32 + 20  # tiny, of 20 classes
LORA_BYTES = 24 + 4 * (4 * ROW_FLOATS + NUM_HEAD)
FEDARA_BYTES = LORA_BYTES + 4 * 4 * 12  # E; no votes before the first pruning
WHOLE = ("--rounds", "2", "--codecs", "fp32,int8", "--paths", "allgather,split,allreduce")


def rows_of(results: Path) -> list[dict[str, Any]]:
    (folder,) = results.iterdir()
    assert (folder / "DONE").exists()
    run = json.loads((folder / "run.json").read_text())
    assert run["benchmark"] == "micro-roundtrip"
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def wire_bytes_by_hand(launcher: str, world_size: int, row: dict[str, Any]) -> int:
    """Every process sends each other one its clients' messages and their size; torch pads all to
    the longest."""
    message = row["uplink_bytes_per_client"]
    if launcher == "torch":
        longest = message * -(-row["num_clients"] // world_size)
        return world_size * (world_size - 1) * (longest + 8)
    return (world_size - 1) * (message * row["num_clients"] + 8 * world_size)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "world_size"), [("plain", 1), ("mpi", 2), ("torch", 2)])
def test_every_combination_is_recorded(launcher: str, world_size: int, tmp_path: Path) -> None:
    job = launch(launcher, world_size, *ROUNDTRIP, *OPTIONS, *WHOLE, "--results", tmp_path)
    assert job.code == 0, job.err
    rows = rows_of(tmp_path)
    assert len(rows) == 2 * 2 * 3 * 2
    fp32 = {row["method"]: row["uplink_bytes_per_client"] for row in rows if row["codec"] == "fp32"}
    assert fp32 == {"lora": LORA_BYTES, "fedara": FEDARA_BYTES}
    for row in rows:
        seconds, median = row["iteration_seconds"], row["median_seconds"]
        assert len(seconds) == 2
        assert median == pytest.approx(statistics.median(seconds), abs=1e-6)  # they are rounded
        assert row["min_seconds"] == pytest.approx(min(seconds), abs=1e-6)
        assert row["rounds_per_second"] == pytest.approx(1 / median)
        assert row["messages_per_second"] == pytest.approx(row["num_clients"] / median)
        assert row["seconds_per_client"] == pytest.approx(median / row["num_clients"])
        num_values = (fp32[row["method"]] - 24) // 4
        assert row["uplink_bytes_per_client"] == 24 + payload_bytes(row["codec"], num_values)
        assert row["downlink_bytes_per_client"] >= fp32[row["method"]]
        assert median > sum(row["phase_seconds"].values()) * 0.5 > 0
        if row["path"] == "allgather":
            assert row["wire_bytes_sent"] == wire_bytes_by_hand(launcher, world_size, row)
        else:
            assert (row["wire_bytes_sent"] > 0) == (world_size > 1)
        assert ("bare_allgather_median_seconds" in row) == (world_size > 1)
    assert "messages/s" in job.out
    if world_size > 1:
        check_documented(rows, "## Micro-benchmark of a round")


def test_the_ratio_is_of_a_round_and_the_loop_beside_it(tmp_path: Path) -> None:
    one = ("--clients", "3", "--methods", "lora", "--codecs", "fp32", "--paths", "allgather")
    more = ("--model", "tiny", "--lora-rank", "4", "--rounds", "1", "--results", tmp_path)
    assert fedara_here("micro", "roundtrip", *one, *more).code == 0
    (row,) = rows_of(tmp_path)
    (seconds,) = row["iteration_seconds"]
    assert row["ratio_to_bare_loop"] == pytest.approx(
        seconds / row["bare_loop_median_seconds"], rel=1e-3
    )
    # Of the rounds that take turns with the loop with messages the record has the ratio alone.
    suite = row["ratio_to_bare_messages"] * row["bare_messages_median_seconds"]
    assert 0.1 < suite / seconds < 10


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--clients", "0", "numbers from 1 to"),
        ("--methods", "sgd", ", ".join(method_names())),
        ("--paths", "dense", "allgather, split, allreduce"),
        ("--codecs", "zip", "fp32, bf16"),
        ("--rounds", "0", "1 to 50"),
        ("--model", "/nowhere", "model.name"),
    ],
)
def test_wrong_options_cost_one_line(option: str, value: str, words: str, tmp_path: Path) -> None:
    job = fedara_here("micro", "roundtrip", *OPTIONS, option, value, "--results", tmp_path)
    assert job.code == 2
    assert len(job.refusals) == 1, job.err
    assert words in job.refusals[0]


def test_clients_are_placed_by_their_steps_and_named_in_order() -> None:
    """The others find a process's clients in client_id order, however they were by_steps out."""
    job = make_tiny_job("train.local_epochs=1", "train.batch_size=2")
    steps = [job.training.num_steps(len(shard)) for shard in job.shards]
    placed = clients.place(job, range(len(steps)), 3)
    assert sorted(client_id for own in placed for client_id in own) == [*range(len(steps))]
    assert all(own == sorted(own) for own in placed)
    loads = [sum(steps[client_id] for client_id in own) for own in placed]
    assert max(loads) - min(loads) <= max(steps)
    by_steps = sorted(range(len(steps)), key=lambda client_id: (-steps[client_id], client_id))
    firsts = [min(own, key=by_steps.index) for own in placed]
    assert firsts == by_steps[:3]  # the clients with most steps, one on each
    assert any(own[0] != first for own, first in zip(placed, firsts, strict=True))


@pytest.mark.parametrize("path", ["allgather", "split"])
def test_a_cohort_in_several_chunks_gives_the_same_bits(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One client's upload at a time is held, and nothing of the result changes."""
    setting = f"federation.merge_path={path}"
    whole = play_rounds(make_tiny_job(setting), num_rounds=2)
    held: list[int] = []
    exchange = OrderedSum.exchange

    def noting(total: Any, contributions: Any) -> None:
        held.append(len(total._own))
        exchange(total, contributions)

    monkeypatch.setattr(OrderedSum, "exchange", noting)
    monkeypatch.setattr(clients, "HELD_VALUES", 1)
    parts = play_rounds(make_tiny_job(setting), num_rounds=2)
    assert held == [1] * 10
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours.row["state_digest"] == theirs.row["state_digest"]
        assert ours.row["uplink_bytes"] == theirs.row["uplink_bytes"]
