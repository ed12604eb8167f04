"""fedara micro scaling and its figure: what is recorded, and the numbers behind the lines."""

import json
from pathlib import Path

import pytest

from analysis.figures.scaling import draw
from analysis.records.scaling import load_scaling, scaling_points
from fedara_core.errors import InputError
from support.documented import check_documented
from support.launch import fedara_here

TINY = (
    "--methods",
    "lora",
    "--model",
    "tiny",
    "--max-length",
    "16",
    "--local-steps",
    "1",
    "--rounds",
    "2",
)


def test_a_launch_records_both_kinds(tmp_path: Path) -> None:
    words = ("micro", "scaling", *TINY, "--cohort", "3", "--clients-per-process", "2")
    job = fedara_here(*words, "--results", tmp_path)
    assert job.code == 0, job.err
    (folder,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [(row["scaling"], row["cohort"]) for row in rows] == [("strong", 3), ("weak", 2)]
    for row in rows:
        assert len(row["iteration_seconds"]) == 2
        assert 0 < row["phase_seconds"]["local_train"] <= max(row["iteration_seconds"])
    check_documented(rows, "## Micro-benchmark of scaling")
    scaling = load_scaling(tmp_path)
    assert scaling is not None
    assert sorted(scaling_points(scaling)["per_round"]) == [2, 3]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--rounds", "0"), "--rounds 0: allowed: 1 or more"),
        (("--cohort", "0", "--clients-per-process", "0"), "allowed: one of them above 0"),
    ],
)
def test_what_is_refused(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    job = fedara_here("micro", "scaling", *TINY, *words, "--results", tmp_path)
    assert job.code == 2
    assert said in job.err
    assert not list(tmp_path.iterdir())


def make_launch(folder: Path, number: int, world_size: int, strong: float, weak: float) -> None:
    run_id = f"micro-scaling-mpi-p{world_size}-{number}"
    (folder / run_id).mkdir(parents=True)
    run = {
        "schema_version": 1,
        "benchmark": "micro-scaling",
        "run_id": run_id,
        "config": {"cohort": 8, "clients_per_process": 4, "model": "minilm"},
        "comm": "mpi",
        "mpi_library": "MPICH Version: 5",
        "world_size": world_size,
        "cpu": "some CPU",
        "num_cores": 2,
        "processes": [{"host": "a"}],
    }
    rows = [
        {"scaling": "strong", "cohort": 8, "median_seconds": strong},
        {"scaling": "weak", "cohort": 4 * world_size, "median_seconds": weak},
    ]
    rows = [{"method": "lora", **row} for row in rows]
    (folder / run_id / "run.json").write_text(json.dumps(run))
    (folder / run_id / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / run_id / "DONE").touch()


def test_ideal_and_efficiency_by_hand(tmp_path: Path) -> None:
    """Strong: a half of 8 s on two processes, measured 5 (median of 4, 5, 6); weak: 4 s, measured
    5."""
    make_launch(tmp_path, 0, 1, strong=8.0, weak=4.0)
    for number, strong in enumerate((4.0, 5.0, 6.0)):
        make_launch(tmp_path, number, 2, strong=strong, weak=5.0)
    scaling = load_scaling(tmp_path)
    assert scaling is not None
    frame = scaling_points(scaling).set_index(["scaling", "world_size"])
    strong_two, weak_two = frame.loc[("strong", 2)], frame.loc[("weak", 2)]
    assert (strong_two["seconds"], strong_two["ideal_seconds"], strong_two["efficiency"]) == (
        *(5.0, 4.0),
        0.8,
    )
    assert (strong_two["min_seconds"], strong_two["max_seconds"]) == (4.0, 6.0)
    assert strong_two["num_launches"] == 3
    assert (weak_two["ideal_seconds"], weak_two["efficiency"]) == (4.0, 0.8)
    assert (frame.loc[("strong", 1), "efficiency"], frame.loc[("weak", 1), "efficiency"]) == (
        1,
        1,
    )
    files = draw(scaling, tmp_path / "figures")
    assert [file.name for file in files] == ["scaling.pdf", "scaling.png", "scaling.txt"]
    text = " ".join(files[-1].read_text().split())
    assert "strong scaling 8 clients a round and weak scaling 4 clients on each process" in text
    assert "More than 2 processes share" in text


def test_a_launch_that_did_not_finish_is_left_out(tmp_path: Path) -> None:
    make_launch(tmp_path, 0, 1, strong=8.0, weak=4.0)
    make_launch(tmp_path, 1, 1, strong=1.0, weak=1.0)
    (tmp_path / "micro-scaling-mpi-p1-1" / "DONE").unlink()
    scaling = load_scaling(tmp_path)
    assert scaling is not None
    assert scaling.incomplete == ["micro-scaling-mpi-p1-1"]
    assert scaling.rows["median_seconds"].tolist() == [8.0, 4.0]
    twice = tmp_path / "again"
    make_launch(twice, 0, 1, strong=8.0, weak=4.0)
    with pytest.raises(InputError, match="comes twice"):
        load_scaling(tmp_path)
