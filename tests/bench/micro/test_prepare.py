"""fedara micro prepare: what its record holds, and that the cache is its own."""

import json
import os
from pathlib import Path

import pytest

from support.documented import check_documented
from support.launch import launch

pytestmark = pytest.mark.xdist_group("jobs")

PREPARE = ("-m", "bench", "micro", "prepare", "--max-length", "16")


@pytest.mark.parametrize(("launcher", "world_size"), [("plain", 1), ("mpi", 2)])
def test_a_launch_is_a_record(
    launcher: str, world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDARA_CACHE", str(tmp_path / "cache"))
    words = ("--model", "toy", "--dataset", "toy", "--results", tmp_path / "out")
    job = launch(launcher, world_size, *PREPARE, *words)
    assert job.code == 0, job.err
    assert not (tmp_path / "cache").exists()
    (folder,) = (tmp_path / "out").iterdir()
    assert os.listdir(folder).count("DONE") == 1
    run = json.loads((folder / "run.json").read_text())
    assert (run["benchmark"], run["world_size"]) == ("micro-prepare", world_size)
    assert run["config"] == {"dataset": "toy", "model": "toy", "max_length": 16}
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [row["cache"] for row in rows] == ["empty", "filled"]
    for row in rows:
        assert 0 < row["prepare_seconds"] < 60
        assert 0 < row["cpu_seconds"] < 60 * world_size
        assert 50e6 < row["prepared_pss_bytes"] / world_size < 2e9
    check_documented(rows, "## Micro-benchmark of preparing")


def test_data_that_are_not_there_cost_one_line(tmp_path: Path) -> None:
    words = ("--model", "toy", "--dataset", "file:/nowhere", "--results", tmp_path / "out")
    job = launch("mpi", 2, *PREPARE, *words)
    assert (job.code, len(job.refusals)) == (2, 1), job.err
    assert "no folder '/nowhere'" in job.refusals[0]
    assert not (tmp_path / "out").exists()
