"""Tests of fedara report: data behind each figure and table by hand, gaps, the page, its time."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import stats
from analysis.figures import (
    alpha,
    client_spread,
    live_triplets,
    local_train,
    pareto,
    partition,
    phases,
    target,
)
from analysis.records.campaign import Campaign, NotDrawn, load_campaign
from analysis.records.target import costs_to_target
from analysis.report import Records, report
from analysis.tables import accuracy, cost, headline
from support.launch import ROOT
from support.records import row_of, write_record


def test_fedara_report_imports_neither_torch_nor_mpi(tmp_path: Path) -> None:
    write_record(tmp_path / "records", "lora", 0)
    code = (
        "import sys; from bench.cli import app\n"
        "app(['report', *sys.argv[1:]], standalone_mode=False)\n"
        "print([m for m in ('torch', 'mpi4py') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "records"), "--out", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "out" / "accuracy_rounds.pdf").exists()


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    """LoRA and FedARA at three seeds, accuracies 50 to 74 %, with the linear probe at one."""
    for seed in range(3):
        write_record(tmp_path, "lora", seed)
        write_record(tmp_path, "fedara", seed)
    write_record(tmp_path, "head_only", 0)
    return load_campaign(tmp_path)


def test_interval_repeats_and_one_seed_has_none() -> None:
    values = pd.Series([1.0, 2.0, 6.0])
    low, high = stats.interval(values)
    assert stats.interval(values) == (low, high)
    assert 1.0 <= low < 3.0 < high <= 6.0
    assert all(pd.isna(end) for end in stats.interval(pd.Series([1.0])))


def test_sign_flip_and_holm_by_hand() -> None:
    assert stats.paired_p_value(np.array([1.0, 2.0, 3.0])) == 0.25  # +++ and --- of 8 patterns
    assert stats.paired_p_value(np.array([0.0, 0.0, 0.0])) == 1.0
    adjusted = stats.holm(pd.Series([0.04, np.nan, 0.01, 0.03]))
    assert adjusted.tolist() == pytest.approx([0.06, np.nan, 0.03, 0.06], nan_ok=True)


def test_costs_to_target(campaign: Campaign) -> None:
    # lora ends at 70, 72, 74 %: the target is 0.95 * 72 = 68.4 %, reached in round 2 only.
    frame = target.data(campaign)
    fedara = row_of(frame, method="fedara")
    assert fedara["target_accuracy_percent"] == pytest.approx(68.4)
    assert (fedara["num_reached"], fedara["num_runs"]) == (3, 3)
    assert fedara["uplink_bytes_ratio"] == pytest.approx(1800 / 3000)
    assert fedara["seconds_ratio"] == pytest.approx(1.0)


def test_each_seed_has_a_target_of_its_own(campaign: Campaign, tmp_path: Path) -> None:
    # Seed 0 is 40 points harder for all: 0.95 * 30 = 28.5 %. Seed 3 has no run of lora.
    write_record(tmp_path, "fedara", 3)
    for path in tmp_path.glob("*-seed0-*/rounds.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row |= {"accuracy": row["accuracy"] - 0.4} if "accuracy" in row else {}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    paid = costs_to_target(load_campaign(tmp_path)).set_index(["method", "seed"])
    assert set(paid.loc["fedara"].index) == {0, 1, 2}
    assert paid.loc[("fedara", 0), "target_accuracy_percent"] == pytest.approx(28.5)
    assert paid.loc[("fedara", 1), "target_accuracy_percent"] == pytest.approx(68.4)
    assert paid["uplink_bytes"].drop("head_only").notna().all()


def test_pareto_front(campaign: Campaign) -> None:
    # fedara is as accurate as lora for fewer bytes; the probe is cheapest.
    frame = pareto.data(campaign)
    front = dict(zip(frame["method"], frame["on_front"], strict=True))
    assert front == {"fedara": True, "head_only": True, "lora": False}


def test_local_train_and_phases(campaign: Campaign) -> None:
    frame = local_train.data(campaign)
    assert set(frame["method"]) == {"fedara", "lora"}
    assert row_of(frame, method="lora", round_index=1)["local_train_seconds_mean"] == 1.5
    assert row_of(phases.data(campaign), method="lora")["seconds"] == 1.5


def test_what_the_records_do_not_hold_is_said(campaign: Campaign) -> None:
    reasons = {
        alpha: "two Dirichlet concentrations",
        client_spread: "client_accuracy_mean",
        partition: "partition.json",
        live_triplets: "no method pruned",
    }
    for figure, reason in reasons.items():
        with pytest.raises(NotDrawn, match=reason):
            figure.data(campaign)


def test_records_without_an_evaluation_have_no_accuracies(tmp_path: Path) -> None:
    run = write_record(tmp_path / "records", "lora", 0)
    rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("accuracy", None)
    (run / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files, gaps = report(Records(campaign=load_campaign(tmp_path / "records")), tmp_path)
    named = {gap.partition(":")[0] for gap in gaps if "no run holds an evaluated round" in gap}
    assert named == {"accuracy_rounds", "accuracy_bytes", "pareto", "accuracy"}
    assert "cost.csv" in {file.name for file in files}


def test_the_mean_of_the_last_three_evaluations(campaign: Campaign, tmp_path: Path) -> None:
    """Missing where there are two."""
    two = row_of(accuracy.data(campaign), method="lora")
    assert pd.isna(two["late_accuracy_percent_mean"])
    for run in tmp_path.glob("*-lora-*"):
        rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
        for row, value in zip(rows, (0.1, 0.5, 0.6), strict=True):
            row["accuracy"] = value
        (run / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    three = row_of(accuracy.data(load_campaign(tmp_path)), method="lora")
    assert three["late_accuracy_percent_mean"] == pytest.approx(40.0)


def test_paired_tests_need_three_seeds(campaign: Campaign) -> None:
    frame = accuracy.data(campaign)
    lora = row_of(frame, method="lora")
    assert (lora["num_pairs"], lora["difference_points"], lora["p_holm"]) == (3, 0.0, 1.0)
    assert pd.isna(row_of(frame, method="head_only")["p_value"])


def test_rows_name_their_runs_and_means_are_of_all_of_them(
    campaign: Campaign, tmp_path: Path
) -> None:
    runs = [f"synthetic-lora-seed{seed}-0.1-0.001" for seed in range(3)]
    lora = row_of(accuracy.data(campaign), method="lora")
    assert lora["run_ids"].split() == runs
    assert set(lora["paired_run_ids"].split()) == {
        *runs,
        *(run_id.replace("lora", "fedara") for run_id in runs),
    }
    (run,) = tmp_path.glob("*lora-seed1*")
    facts = json.loads((run / "run.json").read_text())
    del facts["total_seconds"]
    (run / "run.json").write_text(json.dumps(facts))
    paid = row_of(cost.data(load_campaign(tmp_path)), method="lora")
    assert (paid["run_ids"].split(), paid["num_runs"]) == (runs, 3)
    assert pd.isna(paid["total_seconds"])  # two of three runs know it
    assert paid["uplink_bytes"] == 3000


def test_headline_readings(campaign: Campaign) -> None:
    frame = headline.data(campaign)
    ours = dict(zip(frame["reading"], frame["ours"], strict=True))
    assert ours["bytes up and down of LoRA to FedARA's, whole run"] == "1.67x"  # 9000 / 5400
    assert ours["measured: seconds of local training, whole run"] == "+0.00 %"
    assert ours["accuracy over strong baselines, points"] == "not in these records"
    assert ours["accuracy over weak baselines, points"] == "+0.00"
    assert "energy" in cost.table(campaign).notes[-1].lower()


def test_an_ablation_is_compared_with_fedara_and_is_not_it(
    campaign: Campaign, tmp_path: Path
) -> None:
    svd_only = {"name": "fedara", "rank_allocation": False, "module_pruning": False}
    for seed in range(3):
        write_record(tmp_path, "fedara", seed, method=svd_only)
    campaign = load_campaign(tmp_path)
    num_pairs = accuracy.data(campaign).set_index(["method", "setting"])["num_pairs"]
    assert num_pairs.loc["lora"].tolist() == [3]
    pairs = num_pairs.loc["fedara"]
    assert len(pairs) == 2
    assert [setting for setting in pairs.index if pairs[setting] == 3] == [
        "rank_allocation=False, module_pruning=False"
    ]
    assert headline.data(campaign)["setting"].nunique() == 1


def test_one_method_makes_a_page_with_gaps(tmp_path: Path) -> None:
    write_record(tmp_path / "records", "fedara", 0)
    files, gaps = report(Records(campaign=load_campaign(tmp_path / "records")), tmp_path)
    text = files[-1].read_text()
    assert files[-1].name == "report.html"
    assert any(gap.startswith("target: no evaluated run of lora") for gap in gaps)
    assert any(gap.startswith("headline: ") for gap in gaps)
    assert 'data-method="fedara"' in text
    assert "0123456789ab" in text
    assert "http" not in text  # nothing from a network
