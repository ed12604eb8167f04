"""Tests of analysis/ on synthetic records: numbers, refusals, reproducible files, the command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from analysis.figures import accuracy_bytes, accuracy_rounds, caption, style
from analysis.records import caveats
from analysis.records.campaign import load_campaign
from analysis.records.energy import one_energy_source
from analysis.tables import summary
from fedara_core.errors import InputError
from support.launch import ROOT
from support.records import add_energy, row_of, write_record


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Three methods, two seeds of each but head_only, and one run that did not finish."""
    folder = tmp_path / "records"
    for method in ("lora", "fedara"):
        for seed in (0, 1):
            write_record(folder / "deeper", method, seed)
    write_record(folder, "head_only", 0)
    write_record(folder, "lora", 2, done=False)
    return folder


def test_load_cumulates_bytes_and_leaves_incomplete_runs_out(records: Path) -> None:
    campaign = load_campaign(records)
    assert len(campaign.runs) == 5
    assert campaign.incomplete == ["synthetic-lora-seed2-0.1-0.001"]
    assert not campaign.rounds["run_id"].isin(campaign.incomplete).any()
    one = campaign.rounds[campaign.rounds["run_id"] == "synthetic-fedara-seed1-0.1-0.001"]
    assert one["round_index"].tolist() == [0, 1, 2]
    assert one["cumulative_uplink_bytes"].tolist() == [1000, 1600, 1800]
    assert one["cumulative_downlink_bytes"].tolist() == [2000, 3200, 3600]
    assert one["cumulative_total_bytes"].tolist() == [3000, 4800, 5400]
    assert one["local_train_seconds"].tolist() == [2.0, 1.5, 1.0]
    assert one["total_seconds"].tolist() == [3.0, 3.0, 3.0]
    assert one["accuracy"].notna().tolist() == [True, False, True]
    run = row_of(campaign.runs, run_id="synthetic-fedara-seed1-0.1-0.001")
    assert run["partition"] == "dirichlet, alpha 0.1"
    assert run["train.lr"] == 0.001
    assert run["setting"] == ""
    assert run["device"] == "cpu"


def test_figure_data_is_mean_and_interval_over_seeds(records: Path) -> None:
    campaign = load_campaign(records)
    frame = accuracy_rounds.data(campaign)
    point = row_of(frame, method="fedara", round_index=2)
    assert point["rounds_completed"] == 3
    assert point["num_seeds"] == 2
    assert point["accuracy_percent_mean"] == pytest.approx(71.0)
    assert point["accuracy_percent_low"] == pytest.approx(70.0)
    assert point["accuracy_percent_high"] == pytest.approx(72.0)
    assert 1 not in frame["round_index"].values  # that round was not evaluated
    frame = accuracy_bytes.data(campaign)
    lora, fedara = (frame[frame["method"] == name] for name in ("lora", "fedara"))
    assert lora["cumulative_uplink_bytes_mean"].tolist() == [1000, 3000]
    assert fedara["cumulative_uplink_bytes_mean"].tolist() == [1000, 1800]


def test_summary_numbers(records: Path) -> None:
    frame = summary.data(load_campaign(records))
    assert frame["method"].tolist() == ["fedara", "head_only", "lora"]
    fedara = row_of(frame, method="fedara")
    assert fedara["num_runs"] == 2
    assert fedara["accuracy_percent_mean"] == pytest.approx(71.0)
    assert fedara["accuracy_percent_std"] == pytest.approx(2**0.5)
    assert fedara["uplink_bytes"] == 1800
    assert fedara["downlink_bytes"] == 3600
    assert fedara["uplink_ratio_to_lora"] == pytest.approx(0.6)
    assert fedara["total_seconds"] == pytest.approx(10.5)
    assert fedara["first_round_local_train_seconds"] == 2.0
    assert fedara["last_round_local_train_seconds"] == 1.0
    assert fedara["live_triplets"] == 20
    assert pd.isna(row_of(frame, method="head_only")["accuracy_percent_std"])


def test_summary_without_lora_has_no_ratio(tmp_path: Path) -> None:
    write_record(tmp_path, "fedara", 0)
    campaign = load_campaign(tmp_path)
    assert summary.data(campaign)["uplink_ratio_to_lora"].isna().all()
    markdown = summary.write(campaign, tmp_path / "out")[0].read_text()
    assert "nan" not in markdown


def test_settings_are_never_averaged_as_seeds(tmp_path: Path) -> None:
    for lr in (0.001, 0.01):
        write_record(tmp_path, "lora", 0, lr=lr)
        write_record(tmp_path, "lora", 0, lr=lr, alpha=10.0)
    campaign = load_campaign(tmp_path)
    frame = summary.data(campaign)
    assert frame["setting"].tolist() == ["lr=0.001", "lr=0.01"] * 2
    assert frame["num_runs"].tolist() == [1] * 4
    assert frame["partition"].unique().tolist() == ["dirichlet, alpha 0.1", "dirichlet, alpha 10"]


def test_clients_that_fail_are_a_setting_and_a_condition(tmp_path: Path) -> None:
    """Records from before clients could fail are as those in which none did."""
    usual = {"dropout": 0.0, "over_selection": 1.0, "speed_spread": 0.0, "deadline_seconds": None}
    shares = {"orin_nano": 1.0}
    write_record(tmp_path, "lora", 0)
    write_record(tmp_path, "lora", 1, clients=usual)
    campaign = load_campaign(tmp_path)
    assert summary.data(campaign)["num_runs"].tolist() == [2]
    assert "dropout" not in caption.conditions(campaign)[0]
    write_record(tmp_path, "lora", 2, clients=usual | {"dropout": 0.25}, devices={"shares": {}})
    write_record(
        *(tmp_path, "lora", 3),
        alpha=1.0,
        clients=usual | {"deadline_seconds": 9.0},
        devices={"shares": shares},
    )
    write_record(
        *(tmp_path, "lora", 4),
        alpha=1.0,
        clients=usual | {"deadline_seconds": 9.0},
        devices={"shares": {"agx_orin": 1.0}},
    )
    campaign = load_campaign(tmp_path)
    assert campaign.runs.sort_values("seed")["setting"].tolist() == [
        *("dropout=0", "dropout=0", "dropout=0.25"),
        *("orin_nano=1, agx_orin=unset", "orin_nano=unset, agx_orin=1"),
    ]
    first, second = caption.conditions(campaign)
    assert "dropout 0.25; rounds" in first
    assert "deadline in modelled s 9; rounds" in second


def test_summary_fits_100_columns(records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary.show(load_campaign(records))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert any("head_only" in line for line in lines)


def test_duplicate_runs_are_refused(records: Path) -> None:
    write_record(records / "copy", "fedara", 0)
    with pytest.raises(InputError, match=r"synthetic-fedara-seed0.*comes twice"):
        load_campaign(records)


def test_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no records here"):
        load_campaign(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        load_campaign(tmp_path / "absent")


def test_corrupt_line_is_named(tmp_path: Path) -> None:
    file = write_record(tmp_path, "lora", 0) / "rounds.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], lines[1][:20], lines[2]]))
    (reason,) = load_campaign(tmp_path).damaged
    assert reason.startswith(f"{file.parent.name}/rounds.jsonl:2: not valid JSON")


@pytest.mark.parametrize("keep", [[0, 1], [0, 2], [0, 1, 1, 2]])
def test_lost_and_repeated_rounds_are_damage(tmp_path: Path, keep: list[int]) -> None:
    file = write_record(tmp_path, "lora", 0) / "rounds.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[index] for index in keep))
    (reason,) = load_campaign(tmp_path).damaged
    assert "; DONE says that it is whole" in reason


def test_looks_of_named_methods_all_differ() -> None:
    names = list(style._PUBLISHED_LOOKS)
    assert len({style.look(name).marker for name in names}) == len(names)  # readable in grey


def test_a_new_method_has_a_look_without_a_row() -> None:
    assert style.look("a_new_method").color in style._COLORS


def run_command(*arguments: object, hash_seed: int = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "analysis", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_writes_the_same_bytes_twice(records: Path, tmp_path: Path) -> None:
    # Two processes with different hash seeds and clocks, as on two days.
    first = run_command(records, "--out", tmp_path / "first", hash_seed=1)
    second = run_command(records, "--out", tmp_path / "second", hash_seed=2)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "left out, no DONE: synthetic-lora-seed2-0.1-0.001" in first.stdout
    names = sorted(file.name for file in (tmp_path / "first").iterdir())
    assert {"accuracy_rounds.pdf", "accuracy_bytes.png", "summary.csv", "report.html"} <= set(names)
    for name in names:
        same = (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
        assert same, name
        assert f"wrote {tmp_path / 'first' / name}" in first.stdout
    caption = (tmp_path / "first" / "accuracy_bytes.txt").read_text().replace("\n", " ")
    for words in (
        "synthetic",
        "alpha 0.1",
        "clients 4",
        "cohort 2",
        "local steps 5",
        "0123456789ab",
    ):
        assert words in caption


def test_command_reports_errors_in_one_line(tmp_path: Path) -> None:
    result = run_command(tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "no records here" in result.stderr


def test_only_incomplete_runs_is_an_error(tmp_path: Path) -> None:
    write_record(tmp_path, "lora", 0, done=False)
    result = run_command(tmp_path)
    assert result.returncode == 2
    assert "no finished run" in result.stderr


def test_records_of_another_version_are_left_out(tmp_path: Path) -> None:
    file = write_record(tmp_path, "lora", 0) / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": 2}))
    (reason,) = load_campaign(tmp_path).damaged
    assert reason.endswith("schema_version 2, this code reads 1")


def test_import_needs_neither_torch_nor_mpi() -> None:
    code = (
        "import sys, analysis.report; print([m for m in ('torch', 'mpi4py') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(("counted", "joules"), [(True, 21.0), (False, 40.0)])
def test_energy_of_one_source_is_in_the_summary(
    counted: bool, joules: float, tmp_path: Path
) -> None:
    for seed in (0, 1):
        add_energy(write_record(tmp_path, "lora", seed), counted=counted)
    campaign = load_campaign(tmp_path)
    source = "rapl" if counted else "codecarbon-load-model"
    assert one_energy_source(campaign) == source
    (row,) = summary.data(campaign).to_dict("records")
    assert (row["energy_joules"], row["energy_source"]) == (joules, source)
    markdown = summary.write(campaign, tmp_path / "out")[0].read_text()
    assert "| energy J |" in markdown
    assert f"energy of the whole run by {source}" in markdown


def test_energy_of_different_sources_is_refused_and_the_rest_goes_on(tmp_path: Path) -> None:
    add_energy(write_record(tmp_path, "lora", 0), counted=True)
    add_energy(write_record(tmp_path, "fedara", 0), counted=False)
    campaign = load_campaign(tmp_path)
    with pytest.raises(InputError, match=r"codecarbon-load-model \(.*fedara.* and rapl \(.*lora"):
        one_energy_source(campaign)
    frame = summary.data(campaign)
    assert not [column for column in frame if "energy" in column]
    assert frame["accuracy_percent_mean"].notna().all()
    result = run_command(tmp_path, "--out", tmp_path / "out")
    assert result.returncode == 0
    assert "energy of different sources is not compared" in result.stdout
    assert "accuracy_rounds.png" in result.stdout
    markdown = (tmp_path / "out" / "summary.md").read_text()
    assert "No energy: energy of different sources" in markdown
    assert "energy J" not in markdown


# ---- versions of the results ----


def set_versions(run: Path, **versions: int) -> None:
    file = run / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | versions))


def test_older_versions_of_a_method_are_marked_and_not_averaged(tmp_path: Path) -> None:
    """A record without the keys is of version 1."""
    for seed in (0, 1):
        write_record(tmp_path / "old", "fedara", seed)
        write_record(tmp_path / "both", "lora", seed)
        set_versions(write_record(tmp_path / "new", "fedara", seed, new={}), method_version=2)
    campaign = load_campaign(tmp_path)
    frame = summary.data(campaign)
    assert frame["method"].tolist() == ["fedara", "fedara (v1)", "lora"]
    assert frame["num_runs"].tolist() == [2, 2, 2]
    assert frame["setting"].tolist() == [""] * 3
    (sentence,) = caveats.sentences(campaign)
    assert sentence == (
        "synthetic, dirichlet, alpha 0.1: fedara (v1): runs of an older version of the code, whose "
        "results are others; they are shown apart."
    )
    out = tmp_path / "out"
    done = run_command(tmp_path, "--out", out)
    assert f"warning: {sentence}" in done.stdout
    assert "fedara (v1)" in (out / "summary.md").read_text(encoding="utf-8")


def test_versions_of_the_suite_are_told_apart(tmp_path: Path) -> None:
    """One method at both, another at one of them: the first is split, and the panel warned of."""
    write_record(tmp_path / "old", "fedara", 0)
    write_record(tmp_path / "old", "lora", 0)
    new = write_record(tmp_path / "new", "fedara", 0, new={})
    set_versions(new, results_version=2, method_version=1)
    campaign = load_campaign(tmp_path)
    assert sorted(campaign.runs["method"]) == ["fedara", "fedara (results v1)", "lora"]
    _, suite = caveats.sentences(campaign)
    assert suite.endswith(
        "runs are of results_version 1 and 2, so that their accuracies do not compare methods."
    )
