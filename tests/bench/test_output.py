"""Streams that are full or closed, and names that the locale can not encode: one line each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.ask import own_command
from support.launch import ROOT, TINY, environment, fedara_here

pytestmark = pytest.mark.xdist_group("jobs")

ONE_ROUND = ("--set", "federation.num_rounds=1")
ASCII = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def fedara(*words: object, stdout: object = subprocess.PIPE, **more: str):  # type: ignore[no-untyped-def]
    return subprocess.run(
        [*own_command(), *map(str, words)],
        env=environment() | more,
        stdin=subprocess.DEVNULL,
        stdout=stdout,  # type: ignore[call-overload]
        stderr=subprocess.PIPE,
        check=False,
    )


# ---- a full disk behind stdout ----


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("list", "methods"),
        pytest.param(("list", "keys"), marks=pytest.mark.slow),
        ("list", "datasets"),  # short: it fails when the buffer is written at the end
        ("sweep", TINY, "--dry-run"),
    ],
    ids=str,
)
def test_a_full_stdout_costs_one_line(words: tuple[object, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = fedara(*words, stdout=full)
    assert done.returncode == 1
    assert done.stderr == b"fedara: standard output: No space left on device\n"


@pytest.mark.parametrize("command", ["run", pytest.param("sweep", marks=pytest.mark.slow)])
def test_a_full_stdout_ends_a_run_in_one_line(tmp_path: Path, command: str) -> None:
    with open("/dev/full", "w") as full:
        done = fedara(command, TINY, "--results", tmp_path, *ONE_ROUND, stdout=full)
    assert done.returncode == 1
    assert done.stderr == b"fedara: standard output: No space left on device\n"
    again = fedara(command, TINY, "--results", tmp_path, *ONE_ROUND)
    assert again.returncode == 0, again.stderr


def test_wrong_input_stays_wrong_input_where_nothing_can_be_written() -> None:
    words = [*own_command(), "run", "none.toml"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, env=environment(), stdout=full, stderr=full, check=False)
    assert done.returncode == 2


def test_a_reader_that_leaves_is_no_error() -> None:
    line = f'{" ".join(own_command())} list methods -v | head -n 1; echo "${{PIPESTATUS[0]}}" >&2'
    words = ["bash", "-c", line]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    assert done.stderr in ("0\n", "1\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_stream_is_no_traceback(closed: str) -> None:
    line = f"{' '.join(own_command())} list datasets {closed}"
    words = ["bash", "-c", line]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_sweep_whose_logs_can_not_be_written_costs_one_line(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    dry = fedara("submit", TINY, "--site", site(tmp_path), "--results", tmp_path, "--dry-run")
    plan = next(w for w in dry.stdout.decode().split() if w.endswith(".sbatch"))
    (tmp_path / "logs" / f"{Path(plan).stem}-0.log").symlink_to("/dev/full")
    done = fedara("sweep", TINY, "--results", tmp_path, *())
    assert done.returncode == 1
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith(f"fedara: {tmp_path}/logs")
    assert line.endswith(": No space left on device")


def site(folder: Path) -> Path:
    path = folder / "site.toml"
    path.write_text('time = "60"\nmpi = "pmi2"\n')
    return path


# ---- names beyond the locale's encoding ----


@pytest.mark.slow
@pytest.mark.parametrize("name", ["d\u00f6", "\u65e5\u672c x"])
def test_a_folder_that_ascii_can_not_name(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    done = fedara("run", TINY, "--results", out, *ONE_ROUND, **ASCII)
    assert done.returncode == 0, done.stderr
    for words in (("status", out), ("report", out), ("sweep", TINY, "--results", out / "more")):
        done = fedara(*words, **ASCII)
        assert done.returncode == 0, done.stderr
        assert b"Traceback" not in done.stderr
    submitted = ("submit", TINY, "--site", site(tmp_path), "--results", out / "x", "--dry-run")
    assert fedara(*submitted, **ASCII).returncode == 0


@pytest.mark.parametrize(
    "words",
    [
        ("status", "n\u00f6"),
        ("run", "n\u00f6.toml"),
        ("run", TINY, "--set", "dataset.name=file:d\u00f6"),
        ("run", TINY, "--set", "model.name=\u00df"),
        ("sweep", TINY, "--set", "dataset.name=file:d\u00f6", "--dry-run"),
        ("report", "n\u00f6"),
        ("export", "n\u00f6", "\u00f6"),
    ],
    ids=str,
)
def test_wrong_input_in_ascii_costs_one_line(words: tuple[object, ...]) -> None:
    done = fedara(*words, **ASCII)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_a_config_with_a_name_that_ascii_can_not_encode(tmp_path: Path) -> None:
    config = tmp_path / "my.toml"
    text = TINY.read_text().replace('name = "toy"', f'name = "file:{tmp_path}/d\u00f6"', 1)
    assert "d\u00f6" in text
    config.write_text(text, encoding="utf-8")
    done = fedara("run", config, "--results", tmp_path / "out", **ASCII)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_bytes_that_are_no_text_are_refused_in_any_locale() -> None:
    words = [os.fsencode(w) for w in own_command()]
    words += [b"run", os.fsencode(TINY), b"--set", b"dataset.name=file:\xff"]
    done = subprocess.run(words, env=environment(), capture_output=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert b"--set" in line
    assert b"allowed: UTF-8" in line
    assert sys.getfilesystemencoding() == "utf-8"


def test_a_name_is_shown_as_it_is(tmp_path: Path) -> None:
    """Neither as rich's markup nor as its code of an emoji."""
    name = "[bold]x :smile:"
    job = fedara_here("run", TINY, "--results", tmp_path / name, *ONE_ROUND)
    assert job.code == 0, job.err
    assert f"records in {tmp_path / name}/toy-fedara" in job.out


def test_all_consoles_are_made_in_one_place() -> None:
    files = [p for p in (ROOT / "bench").rglob("*.py") if " Console(" in p.read_text()]
    assert [file.name for file in files] == ["output.py"]
