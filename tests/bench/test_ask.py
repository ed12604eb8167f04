"""Other programs are asked with a limit, and jobs start this suite and no other."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.ask import ask, own_command
from bench.jobs.local import run_sweep
from bench.jobs.plan import make_plan
from support.launch import LIMIT_SECONDS, ROOT, TINY, environment, rounds_of, tool
from support.stand_in import stand_in

pytestmark = pytest.mark.xdist_group("jobs")


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with programs of the user's that are named like the suite's packages."""
    folder = tmp_path / "mine"
    (folder / "analysis").mkdir(parents=True)
    for name in ("bench.py", "analysis/__init__.py", "analysis/__main__.py", "typer.py"):
        (folder / name).write_text("raise SystemExit('a program of the user')\n")
    monkeypatch.chdir(folder)
    for key in set(os.environ) - set(environment()):
        monkeypatch.delenv(key)
    for key, value in environment().items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("PYTHONPATH")
    return folder


def test_what_a_program_says(tmp_path: Path) -> None:
    done = ask("sh", "-c", "echo out; echo err >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    assert ask("printf", "\\377").stdout == "\ufffd"  # no text in UTF-8


@pytest.mark.parametrize("script", ["sleep 60", "trap '' TERM; sleep 60 & wait"])
def test_a_program_that_does_not_answer(tmp_path: Path, script: str) -> None:
    start = time.monotonic()
    done = ask(str(stand_in(tmp_path, "mute", script)), seconds=0.3)
    assert time.monotonic() - start < 10
    assert done.returncode != 0
    assert done.stderr == f"{tmp_path}/mute: no answer in 0.3 s"


def test_a_program_that_is_missing_or_no_program(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no program")
    for name, reason in [("none", "No such file"), ("text", "Permission denied")]:
        done = ask(str(tmp_path / name))
        assert done.returncode != 0
        assert reason in done.stderr


def test_every_program_is_asked_with_a_limit() -> None:
    """The sources call subprocess.run in bench/ask.py alone, and start only what they wait for."""
    for folder in ("bench", "fedara_core", "analysis"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if path != ROOT / "bench" / "ask.py":
                assert "subprocess.run" not in text, path
            for call in ("check_output", "check_call", "os.system", "os.popen", "subprocess.call"):
                assert call not in text, path


def test_the_command_is_this_suite_in_any_folder(foreign: Path) -> None:
    code = ("list", "methods")
    done = subprocess.run([*own_command(), *code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fedara" in done.stdout
    other = subprocess.run([sys.executable, "-m", "bench"], capture_output=True, text=True)
    assert "a program of the user" in other.stderr  # what must not happen in a sweep


def test_a_folder_bench_that_pythonpath_finds_is_not_run(
    foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty entry of PYTHONPATH is the working folder, with and without -P."""
    (foreign / "bench.py").unlink()
    (foreign / "typer.py").unlink()
    (foreign / "bench").mkdir()
    (foreign / "bench" / "__init__.py").write_text("raise SystemExit('a program of the user')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep)
    words = [*own_command(), "list", "methods"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fedara" in done.stdout


def test_the_figures_command_is_this_suite_s(foreign: Path) -> None:
    words = [*own_command(), "report", str(foreign)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert str(foreign) in done.stderr


def test_a_sweep_runs_this_suite_beside_the_user_s_programs(foreign: Path, tmp_path: Path) -> None:
    from rich.console import Console

    plan = make_plan(TINY, tmp_path / "out", ["federation.num_rounds=1"])
    with (tmp_path / "said").open("w") as said:
        assert run_sweep(plan, 1, 1, Console(file=said)), plan.log(0).read_text()
    assert len(rounds_of(plan.results / plan.runs[0].run_id)) == 1


@pytest.mark.slow
def test_torchrun_as_the_readme_says_it(foreign: Path, tmp_path: Path) -> None:
    """torchrun --no-python starts the script that is on PATH."""
    script = stand_in(tmp_path / "bin", "fedara", f'exec {" ".join(own_command())} "$@"')
    words = [tool("torchrun"), "--standalone", "--no-python", "--nproc-per-node", "2", str(script)]
    words += ["run", str(TINY), "--results", str(tmp_path / "out")]
    done = subprocess.run(
        [*words, "--set", "federation.num_rounds=1"],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ((run_dir),) = (tmp_path / "out").iterdir()
    assert len(rounds_of(run_dir)) == 1


def test_no_text_for_users_starts_a_module() -> None:
    """python -m and torchrun -m start what lies in the working folder."""
    paths = [ROOT / "README.md", *(ROOT / "slurm").rglob("*.*"), *(ROOT / "bench").rglob("*.py")]
    for path in paths:
        if path.name != "__main__.py":
            assert "-m bench" not in path.read_text(encoding="utf-8"), path
            assert "-m analysis" not in path.read_text(encoding="utf-8"), path
