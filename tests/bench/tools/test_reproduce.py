"""fedara reproduce: the same bits, close to it, or neither; and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest

from support.launch import TINY, Finished, fedara_here, rounds_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    results = tmp_path_factory.mktemp("record")
    assert fedara_here("run", TINY, "--results", results).code == 0
    (run_dir,) = results.glob("toy-*")
    return run_dir


@pytest.fixture
def record(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "record" / finished.name))


def again(record: Path, *words: object) -> Finished:
    return fedara_here("reproduce", record, "--results", record.parents[1] / "again", *words)


def change(record: Path, round_index: int, **values: object) -> None:
    rows = rounds_of(record)
    rows[round_index] |= values
    (record / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_same_bits(record: Path) -> None:
    done = again(record)
    assert (done.code, done.err) == (0, "")
    assert f"same bits as {record} in all 6 rounds" in done.out


def test_other_bits_are_judged_by_the_accuracy(record: Path) -> None:
    accuracy = rounds_of(record)[-1]["accuracy"]
    change(record, 4, state_digest="0")
    run = json.loads((record / "run.json").read_text())
    run["package_versions"]["torch"] = "1.0"
    (record / "run.json").write_text(json.dumps(run))
    done = again(record)
    assert done.code == 0
    assert f"other bits than {record} from round 5 of 6 on" in done.out
    assert "changed: package_versions.torch 1.0 -> " in done.out
    assert "+0.00 points, within the 2 that are allowed" in done.out
    change(record, 5, accuracy=accuracy - 0.03)
    done = again(record)  # its run is finished; only the comparison is made again
    assert done.code == 1
    assert "+3.00 points, outside the 2 that are allowed" in done.out
    assert again(record, "--within-points", "3.5").code == 0


def test_other_bits_may_lie_in_the_interval_over_seeds(record: Path) -> None:
    """Of the runs beside the record that differ in the seed alone."""
    accuracy = rounds_of(record)[-1]["accuracy"]
    for seed, change_by in ((1, -0.04), (2, -0.08)):
        other = Path(shutil.copytree(record, record.with_name(f"seed{seed}")))
        run = json.loads((other / "run.json").read_text())
        run |= {"run_id": other.name, "config": run["config"] | {"seed": seed}}
        (other / "run.json").write_text(json.dumps(run))
        change(other, 5, accuracy=accuracy + change_by)
    change(record, 5, accuracy=accuracy - 0.03, state_digest="0")
    low, high = 100 * accuracy - 8, 100 * accuracy - 3  # the new run, at accuracy, is above it
    done = again(record)
    assert done.code == 1
    assert f"outside the 95 % interval of the record's 3 seeds, {low:.2f} to {high:.2f}" in done.out
    change(record.with_name("seed1"), 5, accuracy=accuracy + 0.01)
    done = again(record)
    assert done.code == 0
    assert "outside the 2 that are allowed" in done.out
    assert "inside the 95 % interval of the record's 3 seeds" in done.out


def test_what_is_refused(record: Path) -> None:
    same = fedara_here("reproduce", record, "--results", record.parent)
    assert same.code == 2
    assert "the record's own folder" in same.err
    longer = again(record, "--set", "federation.num_rounds=5")
    assert longer.code == 2
    assert "another run than the record's" in longer.err
    run = json.loads((record / "run.json").read_text())
    (record / "run.json").write_text(json.dumps(run | {"dataset_digest": "0123"}))
    other = again(record)
    assert other.code == 2
    assert 'dataset_digest is "0123" there' in other.err
    rows = (record / "rounds.jsonl").read_text().splitlines(keepends=True)
    (record / "rounds.jsonl").write_text("".join(rows[:2]))
    short = again(record)
    assert (short.code, short.err.count("\n")) == (2, 1)
    assert f"{record} is no finished record" in short.err
    assert "allowed: rounds.jsonl: holds 2 of 6 rounds; DONE says that it is whole" in short.err
    (record / "run.json").write_text("{")
    assert "allowed: run.json:1: not valid JSON" in again(record).err
    (record / "DONE").unlink()
    assert "allowed: no DONE" in again(record).err
