"""Tests of report --compare: what counts as a change between two campaigns, and what does not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from analysis import compare
from analysis.cli import app
from analysis.compare import ACCURACY, BYTES, SECONDS
from analysis.records.campaign import load_campaign
from support.records import row_of, write_record

Edit = Callable[[dict[str, Any], list[dict[str, Any]]], None]


def write(folder: Path, method: str, seed: int, edit: Edit | None = None, **options: Any) -> None:
    """A synthetic record with digests, after `edit(run, rounds)`."""
    record = write_record(folder, method, seed, **options)
    run = json.loads((record / "run.json").read_text())
    rounds = [json.loads(line) for line in (record / "rounds.jsonl").read_text().splitlines()]
    for row in rounds:
        row["state_digest"] = f"{method}-{seed}-{row['round_index']}"
    if edit is not None:
        edit(run, rounds)
    (record / "run.json").write_text(json.dumps(run))
    (record / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rounds))


def changes(tmp_path: Path) -> pd.DataFrame:
    return compare.data(load_campaign(tmp_path / "a"), load_campaign(tmp_path / "b"))


def verdicts(frame: pd.DataFrame, method: str) -> dict[str, str]:
    rows = frame[frame["method"] == method]
    return dict(zip(rows["measure"], rows["verdict"], strict=True))


def run_compare(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    return result.exit_code, result.output


def test_equal_bits_are_equal(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        for seed in (0, 1):
            write(tmp_path / folder, "lora", seed)
    frame = changes(tmp_path)
    assert set(frame["verdict"]) == {compare.EQUAL}
    assert set(frame["num_equal_digests"]) == {2}
    code, text = run_compare("--compare", tmp_path / "a", tmp_path / "b")
    assert code == 0
    assert "2 of 2 pairs with digests ended with the same bits" in text
    assert "Nothing differs by more than noise" in text
    markdown = (tmp_path / "b" / "figures" / "compare.md").read_text()
    assert "| 3,000 | 3,000 | +0 |" in markdown
    numbers = pd.read_csv(tmp_path / "b" / "figures" / "compare.csv")
    assert numbers["a_run_ids"].str.split().map(len).tolist() == [2, 2, 2]


def test_one_byte_counts_and_accuracy_has_to_exceed_noise(tmp_path: Path) -> None:
    def worse(run: dict[str, Any], rounds: list[dict[str, Any]]) -> None:
        rounds[2]["accuracy"] -= 0.05
        rounds[2]["uplink_bytes"] += 1
        rounds[2]["state_digest"] = "other"
        run["total_seconds"] += 1.0 if run["config"]["seed"] % 2 else -1.0

    for seed in range(8):
        write(tmp_path / "a", "lora", seed)
        write(tmp_path / "b", "lora", seed, worse)
    frame = changes(tmp_path)
    assert verdicts(frame, "lora") == {
        ACCURACY: compare.DIFFERS,
        BYTES: compare.DIFFERS,
        SECONDS: compare.WITHIN,
    }
    accuracy = row_of(frame, measure=ACCURACY)
    assert accuracy["difference"] == pytest.approx(-5.0)
    # Accuracy and seconds are tested: 2 of 2^8 sign patterns, twice for Holm.
    assert accuracy["p_holm"] == pytest.approx(2 * 2 / 2**8)
    assert row_of(frame, measure=BYTES)["difference"] == 1
    assert accuracy["num_equal_digests"] == 0
    code, text = run_compare("--compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    assert code == 0
    assert "Other bits: synthetic, dirichlet, alpha 0.1, lora." in text
    assert "lora: uplink bytes 3,000 -> 3,001 (+1)" in text
    assert "lora: accuracy % 77.00 -> 72.00 (-5.00)" in text
    assert "seconds" not in text.split("Differs")[1].split("wrote")[0]


def test_three_seeds_can_not_show_a_difference(tmp_path: Path) -> None:
    def slower(run: dict[str, Any], rounds: list[dict[str, Any]]) -> None:
        run["total_seconds"] += 5.0

    for seed in range(3):
        write(tmp_path / "a", "lora", seed)
        write(tmp_path / "b", "lora", seed, slower)
    assert verdicts(changes(tmp_path), "lora")[SECONDS] == compare.TOO_FEW


def test_seconds_of_other_hardware_and_other_seeds_are_not_judged(tmp_path: Path) -> None:
    def elsewhere(run: dict[str, Any], rounds: list[dict[str, Any]]) -> None:
        run["cpu"], run["total_seconds"] = "another CPU", 1.0

    for seed in range(3):
        write(tmp_path / "a", "lora", seed)
        write(tmp_path / "b", "lora", seed, elsewhere)
        write(tmp_path / "a", "fedara", seed)
        write(tmp_path / "b", "fedara", 3 + seed)
    frame = changes(tmp_path)
    assert verdicts(frame, "lora")[SECONDS] == compare.OTHER_HARDWARE
    assert set(verdicts(frame, "fedara").values()) == {compare.NO_PAIRS}
    _, text = run_compare("--compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    assert "Changed in 1 of 2 groups: hardware a CPU, cpu" in text


def test_a_key_that_changed_is_named_and_compared_all_the_same(tmp_path: Path) -> None:
    write(tmp_path / "a", "lora", 0, lr=0.001)
    write(tmp_path / "b", "lora", 0, lr=0.01)
    write(tmp_path / "a", "fedara", 0, lr=0.001)
    for lr in (0.001, 0.01):  # two settings in B: only the one that A has is compared
        write(tmp_path / "b", "fedara", 0, lr=lr)
    frame = changes(tmp_path)
    assert set(frame[["method", "setting"]].itertuples(index=False, name=None)) == {
        ("lora", ""),
        ("fedara", "lr=0.001"),
    }
    code, text = run_compare("--compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    assert code == 0
    assert "Changed in 1 of 2 groups: train.lr 0.001 -> 0.01." in text
    assert "Only in B, synthetic, dirichlet, alpha 0.1: fedara (lr=0.01)." in text


def test_nothing_in_common_is_said_and_is_no_error(tmp_path: Path) -> None:
    write(tmp_path / "a", "lora", 0)
    write(tmp_path / "b", "fedara", 0)
    code, text = run_compare("--compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    assert code == 0
    assert "Nothing in common" in text
    assert "Only in A, synthetic, dirichlet, alpha 0.1: lora." in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["DIR", "--compare", "A", "B"]])
def test_a_folder_or_a_pair_is_needed(arguments: list[str]) -> None:
    code, text = run_compare(*arguments)
    assert (code, text.count("\n")) == (2, 1)
    assert "either a folder DIR or --compare A B" in text


def test_a_folder_without_records_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a", "lora", 0)
    code, text = run_compare("--compare", tmp_path / "a", tmp_path / "none")
    assert code == 2
    assert "no such folder" in text
