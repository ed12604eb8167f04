"""Starts the command line, here or under mpiexec or torchrun, and never without a limit."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "tiny.toml"
COMM_CHECK = ROOT / "tests" / "support" / "comm_check.py"
CLI = ("-m", "bench", "run")
LIMIT_SECONDS = 240
# What a launcher around pytest itself would leave behind.
_LAUNCHER_PREFIXES = ("PMI_", "PMIX_", "OMPI_COMM_WORLD_", "MPI_LOCAL", "SLURM_", "TORCHELASTIC_")
_LAUNCHER_KEYS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A job that ended: its exit code, what it printed, and when it ended (time.time())."""

    code: int
    out: str
    err: str
    end_time: float

    @property
    def refusals(self) -> list[str]:
        """The lines on stderr with which the command line refuses something."""
        return [line for line in self.err.splitlines() if line.startswith("fedara:")]


def tool(name: str) -> str:
    """mpiexec or torchrun, next to this Python or on PATH; skips the test where there is none."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is neither next to {sys.executable} nor on PATH")
    return found


def command(launcher: str, world_size: int) -> list[str]:
    """What comes before "-m bench" or a script. launcher: plain, mpi or torch."""
    if launcher == "plain":
        assert world_size == 1
        return [sys.executable]
    if launcher == "mpi":
        return [tool("mpiexec"), "-n", str(world_size), sys.executable]
    assert launcher == "torch", launcher
    # --standalone: a free port, so that two jobs on one machine do not meet.
    return [tool("torchrun"), "--standalone", "--nproc-per-node", str(world_size)]


def environment() -> dict[str, str]:
    """This environment without a launcher's traces, offline, and with Open MPI allowed to start."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(_LAUNCHER_PREFIXES) and key not in _LAUNCHER_KEYS
    }
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }


class Launched:
    """A running job. Its output goes to files, so that no left-over process can block a reader."""

    def __init__(self, launcher: str, world_size: int, *args: object) -> None:
        words = [*command(launcher, world_size), *map(str, args)]
        self._out, self._err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            start_new_session=True,
        )

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def wait(self, limit_seconds: float = LIMIT_SECONDS) -> Finished:
        """The job's end; fails the test, and ends the job, if that takes longer than the limit."""
        try:
            code = self._process.wait(limit_seconds)
            end_time = time.time()
        except subprocess.TimeoutExpired:
            self.kill()
            out, err = self._output()
            pytest.fail(f"still running after {limit_seconds} s\n{out}\n{err}")
        out, err = self._output()
        return Finished(code=code, out=out, err=err, end_time=end_time)

    def kill(self) -> None:
        """SIGKILL to the launcher and all below it (MPICH puts each into a session of its own)."""
        pids = [*descendants(self._process.pid), self._process.pid]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(10)
        wait_for(lambda: not any(alive(pid) for pid in pids), "the killed processes to be gone")

    def _output(self) -> tuple[str, str]:
        texts = []
        for file in (self._out, self._err):
            file.seek(0)
            texts.append(file.read())
            file.close()
        return texts[0], texts[1]


def launch(launcher: str, world_size: int, *args: object) -> Finished:
    """Run a job to its end."""
    return Launched(launcher, world_size, *args).wait()


@cache
def checked(launcher: str, world_size: int) -> Finished:
    """The job of all checks that a communicator and the merge paths must pass (comm_check.py)."""
    kind = "serial" if launcher == "plain" else launcher
    return launch(launcher, world_size, COMM_CHECK, kind, world_size)


def fedara_here(*args: object) -> Finished:
    """`fedara ARGS` in this process; anything but a clean exit is raised as it is."""
    from bench.cli import app

    words = [str(word) for word in args]
    if words[0] in ("run", "reproduce", "micro") and "--comm" not in words:
        words += ["--comm", "serial"]
    out, err = io.StringIO(), io.StringIO()
    threads = torch.get_num_threads()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            app(words, prog_name="fedara")
    except SystemExit as exit_:
        code = exit_.code or 0
    finally:
        torch.set_num_threads(threads)
    assert isinstance(code, int), code
    return Finished(code=code, out=out.getvalue(), err=err.getvalue(), end_time=time.time())


def rounds_of(run_dir: Path) -> list[dict[str, Any]]:
    """The rounds of a record, each line of which must be whole."""
    text = (run_dir / "rounds.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def digests_in(results: Path) -> list[str]:
    """The state digests of the only run in a results folder, whose rounds must be in order."""
    (run_dir,) = results.iterdir()
    rows = rounds_of(run_dir)
    assert [row["round_index"] for row in rows] == list(range(len(rows)))
    return [row["state_digest"] for row in rows]


def wait_for(condition: Any, what: str, limit_seconds: float = 60) -> None:
    """Poll until condition() is true; fails the test after the limit."""
    end = time.monotonic() + limit_seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"waited {limit_seconds} s for {what}")
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process still runs; a zombie that nobody reaped does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def descendants(pid: int) -> list[int]:
    """Ids of all processes below `pid`."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = list(children.get(pid, []))
    for child in found:
        found.extend(children.get(child, []))
    return found


def pretend_finished(run_dir: Path, num_rounds: int) -> None:
    """A finished run's files, as far as it takes to skip it."""
    run_dir.mkdir(parents=True)
    (run_dir / "run.json").write_text('{"config": {}}')
    rows = [{"round_index": index, "seconds": {"total": 1.0}} for index in range(num_rounds)]
    (run_dir / "rounds.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (run_dir / "DONE").touch()
