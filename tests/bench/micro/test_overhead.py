"""fedara micro overhead: what its record holds, and the numbers behind its row by hand."""

import json
from pathlib import Path

import pytest

from bench.micro.overhead import COHORT, LOCAL_STEPS, Pair, summarize
from support.documented import check_documented
from support.launch import launch

OVERHEAD = ("-m", "bench", "micro", "overhead", "--model", "tiny", "--max-length", "16")


def test_a_launch_is_a_record(tmp_path: Path) -> None:
    job = launch("plain", 1, *OVERHEAD, "--repeats", "2", "--results", tmp_path)
    assert job.code == 0, job.err
    assert "over 2 pairs" in job.out
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("micro-overhead-serial-p1-")
    assert (folder / "DONE").exists()
    run = json.loads((folder / "run.json").read_text())
    assert (run["benchmark"], run["comm"], run["world_size"]) == ("micro-overhead", "serial", 1)
    assert run["config"] == {"repeats": 2, "model": "tiny", "max_length": 16}
    (row,) = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert (row["num_clients"], row["local_steps"]) == (COHORT, LOCAL_STEPS)
    assert len(row["iteration_seconds"]) == len(row["pair_ratios"]) == 2
    assert 0 < row["meter_share"] < 0.5
    # Both sides take the same steps: neither is ten times as fast, and a row is of its own pairs.
    assert 0.1 < row["ratio_to_bare_loop"] < 10
    low, high = sorted(row["pair_ratios"])
    assert low - 1e-5 <= row["ratio_to_bare_loop"] <= high + 1e-5
    check_documented([row], "## Micro-benchmark of the overhead")


def test_ratios_are_of_pairs_by_hand() -> None:
    """The ratio is the median over pairs (2, 1, 4), not that of the medians (4 / 2)."""
    row = summarize([Pair(4.0, 2.0, 1.0), Pair(1.0, 1.0, 0.1), Pair(16.0, 4.0, 0.8)])
    assert row["pair_ratios"] == [2.0, 1.0, 4.0]
    assert row["ratio_to_bare_loop"] == 2.0
    assert (row["median_seconds"], row["bare_loop_median_seconds"]) == (4.0, 2.0)
    assert row["meter_share"] == pytest.approx(0.1)
    other = summarize([Pair(4.0, 4.0, 0.0), Pair(5.0, 1.0, 0.0), Pair(9.0, 2.0, 0.0)])
    assert other["ratio_to_bare_loop"] == 4.5  # of the medians 5 / 2


def test_several_processes_are_refused(tmp_path: Path) -> None:
    """Each would measure the same alone, on cores that it shares with the others."""
    job = launch("mpi", 2, *OVERHEAD, "--results", tmp_path / "results")
    assert job.code == 2
    assert all("2 processes" in line for line in job.refusals), job.err
    assert not (tmp_path / "results").exists()


def test_a_model_that_is_not_there_costs_one_line(tmp_path: Path) -> None:
    results = tmp_path / "results"
    job = launch("plain", 1, *OVERHEAD[:4], "--model", "/nowhere", "--results", results)
    assert job.code == 2
    assert len(job.refusals) == 1
    assert "model.name" in job.refusals[0]
    assert not results.exists()
