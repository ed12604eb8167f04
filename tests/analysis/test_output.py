"""A folder that cannot be written, and a disk that is full: one line, and nothing half-written."""

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from analysis.cli import app
from analysis.output import together
from fedara_core.errors import InputError
from support.launch import ROOT
from support.records import write_record


@pytest.fixture
def records(tmp_path: Path) -> Path:
    write_record(tmp_path / "records", "lora", 0)
    return tmp_path / "records"


@contextmanager
def full_disk(after_bytes: int) -> Iterator[None]:
    """A file that grows beyond so many bytes cannot be written, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def report(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def check_refused(result: Result, *words: str) -> None:
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert all(word in result.stderr for word in words), result.stderr


@pytest.mark.parametrize("below", ["", "deeper", "deeper/still"])
def test_a_file_in_the_way_is_named(below: str, records: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    result = report(records, "--out", tmp_path / "file" / below)
    check_refused(result, f"{tmp_path / 'file' / below}: cannot be written")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_takes_no_file_is_named(records: Path) -> None:
    check_refused(report(records, "--out", "/proc/report"), "/proc/report: cannot be written")


def test_a_name_that_is_too_long_is_refused(records: Path) -> None:
    check_refused(report(records, "--out", "x" * 300), "cannot be written: File name too long")
    check_refused(report("x" * 300), "File name too long")


@pytest.mark.parametrize("after_bytes", [0, 1000, 20_000])
def test_a_full_disk_leaves_nothing(after_bytes: int, records: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with full_disk(after_bytes):
        result = report(records, "--out", out)
    check_refused(result, f"{out}: cannot be written", "allowed: a folder with enough room")
    assert not out.exists()


def test_a_full_disk_leaves_the_last_report_whole(records: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert report(records, "--out", out).exit_code == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    write_record(records, "fedara", 0)
    with full_disk(20_000):
        check_refused(report(records, "--out", out), "cannot be written")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_a_full_disk_stops_a_comparison(records: Path, tmp_path: Path) -> None:
    with full_disk(10):
        result = report("--compare", records, records, "--out", tmp_path / "out")
    check_refused(result, "cannot be written")
    assert not (tmp_path / "out").exists()


def test_a_folder_in_the_way_of_a_file_leaves_the_others(records: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "summary.md").mkdir(parents=True)
    result = report(records, "--out", tmp_path / "out")
    check_refused(result, "summary.md: a folder is in the way")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["summary.md"]


def test_a_full_disk_below_stdout_is_named(records: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "analysis", records, "--out", tmp_path / "out"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            words, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert result.returncode == 1
    assert result.stderr == "error: standard output: No space left on device\n"
    assert (tmp_path / "out" / "report.html").exists()


def test_an_error_in_the_block_is_raised_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mine"), together(tmp_path / "out"):
        raise InputError("mine")


def test_damaged_costs_are_refused(records: Path, tmp_path: Path) -> None:
    file = tmp_path / "costs.toml"
    for content in (b"\xff", b"x =", b"x = " + b"[" * 5000, b'"a\\nb" = 1', b""):
        file.write_bytes(content)
        check_refused(report(records, "--costs", file), "costs.toml")


def test_a_killed_report_is_cleared_away_by_the_next(tmp_path: Path) -> None:
    """And neither one that still runs, nor one of another host, whose processes are not seen."""
    code = (
        "import os, sys; from pathlib import Path; from analysis.output import together\n"
        "with together(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').touch()\n    os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    (left,) = tmp_path.iterdir()
    assert [file.name for file in left.iterdir()] == ["half"]
    other = tmp_path / ".report-another-4194303-x"
    other.mkdir()
    with together(tmp_path) as mine, together(tmp_path):
        assert other.exists()
        assert mine.exists()
        assert not left.exists()
    assert list(tmp_path.iterdir()) == [other]
