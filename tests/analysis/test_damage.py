"""Damaged records: named with file and line and left out, or refused in one line; no traceback."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from analysis.cli import app
from analysis.records import reader
from analysis.records.campaign import load_campaign
from support.launch import ROOT
from support.records import make_launch, overhead_row, write_record

PUBLISHED = ROOT / "results" / "published"


def lines_of(run: Path) -> list[str]:
    return (run / "rounds.jsonl").read_text().splitlines()


def write_rounds(run: Path, lines: list[str]) -> None:
    (run / "rounds.jsonl").write_text("".join(f"{line}\n" for line in lines))


def keep_rounds(*indices: int) -> Callable[[Path], None]:
    return lambda run: write_rounds(run, [lines_of(run)[index] for index in indices])


def set_in_round(index: int, **values: Any) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        lines = lines_of(run)
        lines[index] = json.dumps(json.loads(lines[index]) | values)
        write_rounds(run, lines)

    return change


def set_in_run(**values: Any) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        facts = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(facts | values))

    return change


def set_in_config(section: str, **values: Any) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        facts = json.loads((run / "run.json").read_text())
        facts["config"][section] |= values
        (run / "run.json").write_text(json.dumps(facts))

    return change


def put(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda run: (run / name).write_bytes(content) and None


def without(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


# What is done to a finished run of three rounds, and what is said of it after the run's name.
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "rounds gone": (without("rounds.jsonl"), "rounds.jsonl: no such file"),
    "run.json gone": (without("run.json"), "run.json: no such file"),
    "rounds empty": (put("rounds.jsonl", b""), "rounds.jsonl: holds 0 of 3 rounds; DONE says"),
    "last round lost": (keep_rounds(0, 1), "rounds.jsonl: holds 2 of 3 rounds; DONE says"),
    "a gap": (keep_rounds(0, 2), "rounds.jsonl:2: round_index = 2; allowed: 0 to 2"),
    "a round twice": (keep_rounds(0, 1, 1, 2), "rounds.jsonl:3: round_index = 1; allowed: 0 to 2"),
    "a round too many": (set_in_config("federation", num_rounds=2), "rounds.jsonl:3: round_index"),
    "rounds without end": (
        set_in_config("federation", num_rounds=10**15),
        "rounds.jsonl: holds 3 of 1000000000000000 rounds",
    ),
    "no rounds wanted": (set_in_config("federation", num_rounds=0), "num_rounds = 0; allowed: an"),
    "a truncated line": (
        lambda run: write_rounds(run, [lines_of(run)[0], lines_of(run)[1][:30]]),
        "rounds.jsonl:2: not valid JSON",
    ),
    "an empty line": (
        lambda run: write_rounds(run, ["", *lines_of(run)]),
        "rounds.jsonl:1: not valid JSON",
    ),
    "binary rounds": (put("rounds.jsonl", b"\xff\x00\xfe"), "rounds.jsonl: cannot be read"),
    "a list for a round": (put("rounds.jsonl", b"[1]\n"), "rounds.jsonl:1: a JSON object"),
    "a word for bytes": (set_in_round(1, uplink_bytes="many"), "rounds.jsonl:2: uplink_bytes = 'm"),
    "null for an accuracy": (
        set_in_round(2, accuracy=None),
        "rounds.jsonl:3: accuracy = None; all",
    ),
    "an accuracy in percent": (set_in_round(2, accuracy=71.0), "rounds.jsonl:3: accuracy = 71.0"),
    "negative bytes": (set_in_round(0, downlink_bytes=-1), "rounds.jsonl:1: downlink_bytes = -1"),
    "true for a number": (set_in_round(0, flops=True), "rounds.jsonl:1: flops = True; allowed: a"),
    "not a number": (set_in_round(0, flops=float("nan")), "rounds.jsonl:1: not valid JSON: NaN"),
    "beyond floats": (
        put("rounds.jsonl", b'{"a": 1e999}\n'),
        "rounds.jsonl:1: not valid JSON: 1e999; allowed: finite",
    ),
    "5000 digits": (
        put("rounds.jsonl", b'{"a": %s}\n' % (b"9" * 5000)),
        "rounds.jsonl:1: not valid",
    ),
    "seconds of a word": (
        set_in_round(0, seconds={"total": "3"}),
        "rounds.jsonl:1: seconds.total =",
    ),
    "seconds as a list": (
        set_in_round(0, seconds=[3.0]),
        "rounds.jsonl:1: seconds = [3.0]; allowed",
    ),
    "run.json truncated": (put("run.json", b'{"schema_version": 1,'), "run.json:1: not valid JSON"),
    "run.json empty": (put("run.json", b""), "run.json:1: not valid JSON"),
    "run.json a list": (put("run.json", b"[]"), "run.json:1: a JSON object was expected"),
    "run.json deep": (put("run.json", b"[" * 100_000), "run.json:1: not valid JSON"),
    "run.json a folder": (
        lambda run: (run / "run.json").unlink() or (run / "run.json").mkdir(),
        "run.json: cannot be read",
    ),
    "no method": (set_in_config("method", name=None), "run.json: config.method.name = None"),
    "no config": (set_in_run(config={}), "run.json: missing config.seed, config.method.name"),
    "a config of text": (set_in_run(config="lora"), "run.json: missing config.seed"),
    "a seed of text": (set_in_run(config={"seed": "0"}), "run.json: missing config.method.name"),
    "an alpha of text": (set_in_config("partition", alpha="0.1"), "config.partition.alpha = '0.1'"),
    "processes of text": (
        set_in_run(processes="one"),
        "run.json: processes = 'one'; allowed: a JSON",
    ),
    "a process of text": (set_in_run(processes=["one"]), "run.json: processes[0] = 'one'; allowed"),
    "seconds of text": (set_in_run(total_seconds="10"), "run.json: total_seconds = '10'; allowed"),
    "partition truncated": (put("partition.json", b"[{"), "partition.json:1: not valid JSON"),
    "partition of text": (put("partition.json", b'"x"'), "partition.json: content = 'x'; allowed"),
    "a client twice": (
        put("partition.json", b'[{"client_id": 0}, {"client_id": 0}]'),
        "partition.json: a client_id comes twice",
    ),
    "a client without id": (
        put("partition.json", b"[{}]"),
        "partition.json: entry 0: missing clien",
    ),
    "a label of text": (
        put("partition.json", b'[{"client_id": 0, "label_counts": {"a": "7"}}]'),
        "partition.json: content[0].label_counts.a = '7'",
    ),
}


def report(folder: Path, out: Path) -> Result:
    return CliRunner().invoke(app, [str(folder), "--out", str(out)])


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_run_is_no_finished_run(what: str, tmp_path: Path) -> None:
    damage, words = DAMAGE[what]
    run = write_record(tmp_path / "records", "lora", 0)
    assert reader.problem(run) == ""
    damage(run)
    assert words in reader.problem(run)
    assert not reader.is_finished(run)
    result = report(tmp_path / "records", tmp_path / "out")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert f"no finished run; damaged: {run.name}/" in result.stderr
    assert words in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_damaged_run_among_good_ones_is_named_everywhere_and_left_out(tmp_path: Path) -> None:
    records, out = tmp_path / "records", tmp_path / "out"
    write_record(records, "lora", 0)
    run = write_record(records, "fedara", 0)
    keep_rounds(0, 1)(run)
    reason = f"{run.name}/rounds.jsonl: holds 2 of 3 rounds; DONE says that it is whole"
    campaign = load_campaign(records)
    assert campaign.runs["method"].tolist() == ["lora"]
    assert campaign.damaged[0].startswith(reason)
    result = report(records, out)
    assert result.exit_code == 0
    assert f"left out, damaged: {reason}" in result.stdout
    assert f"<li>damaged: {reason}" in (out / "report.html").read_text()
    assert f"Left out as damaged (1): {reason}" in (out / "summary.md").read_text()
    caption = (out / "accuracy_rounds.txt").read_text().replace("\n", " ")
    assert f"Left out as damaged (1): {reason}" in caption


def test_a_damaged_launch_leaves_the_runs_and_damaged_runs_the_launches(tmp_path: Path) -> None:
    write_record(tmp_path, "lora", 0)
    make_launch(tmp_path, "overhead", 0, overhead_row(1, 1))
    launch = tmp_path / "micro-overhead-mpi-p2-0"
    rows = (launch / "rows.jsonl").read_bytes()
    (launch / "rows.jsonl").unlink()
    result = report(tmp_path, tmp_path / "out")
    assert result.exit_code == 0
    assert f"left out, damaged: {launch.name}/rows.jsonl: no such file" in result.stdout
    (launch / "rows.jsonl").write_bytes(rows)
    next(tmp_path.glob("synthetic*/run.json")).unlink()
    result = report(tmp_path, tmp_path / "out")
    assert result.exit_code == 0
    assert "run.json: no such file" in result.stdout
    assert (tmp_path / "out" / "overhead.csv").exists()


def test_a_folder_with_done_alone_is_named(tmp_path: Path) -> None:
    write_record(tmp_path, "lora", 0)
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "DONE").touch()
    assert load_campaign(tmp_path).damaged == [
        "lost/run.json: no such file; allowed: a whole record"
    ]


def test_a_comparison_counts_what_is_damaged(tmp_path: Path) -> None:
    for name in "ab":
        for seed in range(2):
            write_record(tmp_path / name, "lora", seed)
    without("rounds.jsonl")(next((tmp_path / "b").glob("*seed1*")))
    result = CliRunner().invoke(app, ["--compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert result.exit_code == 0, result.output
    assert "1 runs (1 damaged, left out)" in result.stdout


def test_many_damaged_runs_are_refused_in_one_line(tmp_path: Path) -> None:
    for seed in range(8):
        without("rounds.jsonl")(write_record(tmp_path, "lora", seed))
    result = report(tmp_path, tmp_path / "out")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "and 3 more" in result.stderr


def test_sums_beyond_64_bits_do_not_wrap_around(tmp_path: Path) -> None:
    run = write_record(tmp_path, "lora", 0)
    for index in range(3):
        set_in_round(index, flops=2**62)(run)
    flops = load_campaign(tmp_path).rounds["cumulative_flops"]
    assert flops.tolist() == [2.0**62, 2.0**63, 3 * 2.0**62]


@pytest.mark.slow
def test_all_committed_records_are_finished() -> None:
    folders = [file.parent for file in PUBLISHED.rglob("rounds.jsonl")]
    assert len(folders) > 300
    assert [reader.problem(folder) for folder in folders if reader.problem(folder)] == []
