"""The state of each run of a results folder, from files; imports no torch. The folder holds
plan-*.jsonl (bench/jobs/plan.py), a folder for each run (bench/run/record.py), and logs/ with one
log for each line of a plan, which says what started its run, and last whether it failed. Slurm is
asked whether it still has the jobs of runs that have not ended."""

import re
import socket
import time
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.jobs.slurm_job import Queue
from bench.run import lock
from fedara_core import strict_json
from fedara_core.errors import InputError, Interrupted
from fedara_core.schema import DONE_FILE, ROUNDS_FILE, ROWS_FILE, RUN_FILE, rounds_fault

_STYLES = {
    "running": "cyan",
    "failed": "red",
    "died": "red",
    "interrupted": "yellow",
    "waiting": "dim",
    "done": "green",
}
STATES = tuple(_STYLES)  # in the order of the table
_TAIL_BYTES = 1 << 20  # of rounds.jsonl: hundreds of rounds, or a few with 10^5 clients
_LOG_TAIL_BYTES = 1 << 14
_MAX_LOG_BYTES = 1 << 24  # to find where a run started
_MOST_COLUMNS = 1000  # of the table: names of folders have 255 letters at most
_EXIT = "fedara: exit code "
_STARTED = "fedara: started as "
_PROCESS = re.compile(_STARTED + r"process (\d+) on host (\S+)$")
_JOB = re.compile(_STARTED + r"Slurm job (\S+)$")
_SLURM = r"(slurmstepd\S*|srun): "  # begins what Slurm itself writes into a log
_REQUEUED = re.compile(r"fedara: job \S+ is requeued$|slurmstepd.* DUE TO JOB REQUEUE")
# What ends a job before it can write its exit code. A step may survive a mere signal.
_KILLED = re.compile(
    _SLURM + r"error: (\*\*\* JOB .*CANCELLED(?!.*REQUEUE)|.*(oom|Out Of Memory|TIME LIMIT))"
)
_REASON = re.compile(rf"(fedara: |[\w.]+(Error|Exception|Interrupt|Exit)\b|{_SLURM}err)")


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """One run. accuracy: of the last evaluated round. num_rounds: None if unknown."""

    run_id: str
    state: str
    rounds_done: int
    num_rounds: int | None
    accuracy: float | None
    reason: str
    silent_seconds: float | None  # since the last write to its record or log


def log_file(results: Path, plan: str, index: int) -> Path:
    """The log of line `index` (from 0) of a plan."""
    return results / "logs" / f"{plan}-{index}.log"


def exit_line(code: int) -> str:
    """The last line of a failed run's log."""
    return f"{_EXIT}{code}\n"


def started_as_job(number: str) -> str:
    """The line of a log at which a Slurm job starts."""
    return f"{_STARTED}Slurm job {number}"


def started_as_process(pid: int) -> str:
    """The line of a log at which a process of this host starts."""
    return f"{_STARTED}process {pid} on host {socket.gethostname()}\n"


def read_status(results: Path, queue: Queue | None = None) -> list[RunStatus]:
    """Every run that has a line in a plan in `results`, or a folder there. Raises InputError.
    queue: tells whether a run's Slurm job is still there."""
    queue = queue or Queue()
    if not results.is_dir():
        raise InputError(f"{results}: no such folder; allowed: the folder given as --results")
    runs: dict[str, RunStatus] = {}
    for run_id, (num_rounds, logs) in _planned(results).items():
        runs[run_id] = look(results / run_id, num_rounds, logs, queue)
    for file in sorted(results.glob(f"*/{RUN_FILE}")):
        if file.parent.name not in runs and not (file.parent / ROWS_FILE).exists():
            num_rounds = _num_rounds(_parse(_text(file)))
            runs[file.parent.name] = look(file.parent, num_rounds, [], queue)
    if not runs:
        raise InputError(f"{results}: no plan and no record here; allowed: the folder of --results")
    return list(runs.values())


def look(
    run_dir: Path, num_rounds: int | None, logs: list[Path], queue: Queue | None = None
) -> RunStatus:
    """The state of one run, from its folder and the newest of its logs. queue: to find out whether
    a run that has not ended is still there; None where that is known."""
    log = max((path for path in logs if path.exists()), key=_modified, default=None)
    rounds_done, accuracy = _progress(run_dir / ROUNDS_FILE)
    signs = [p for p in (log, run_dir / ROUNDS_FILE, run_dir / RUN_FILE) if p and p.exists()]
    held = (run_dir / lock.FILE).exists()
    ended, reason = _end(log) if log else ("", "")
    if (run_dir / DONE_FILE).exists():
        state, reason = _done(run_dir, num_rounds)
    elif ended:
        state = ended
    elif held or log:
        state = "running"
        if queue and (dead := _dead(run_dir / lock.FILE, log, queue)):
            done = (run_dir / DONE_FILE).exists()  # since it was looked for
            state, reason = _done(run_dir, num_rounds) if done else ("died", dead)
    else:
        state = "interrupted" if signs else "waiting"
    return RunStatus(
        run_id=run_dir.name,
        state=state,
        rounds_done=rounds_done,
        num_rounds=num_rounds,
        accuracy=accuracy,
        reason=reason,
        silent_seconds=time.time() - max(map(_modified, signs)) if signs else None,
    )


def show(runs: list[RunStatus], console: Console, problem: str = "") -> None:
    """Print the table, the reasons of failures, and the counts. problem: why Slurm could not be
    asked for jobs."""
    rows = table(sorted(runs, key=lambda run: STATES.index(run.state)))
    # One line for each run, however long its name and narrow the terminal: other programs read it.
    wide = console.options.update(width=_MOST_COLUMNS)
    console.width = max(console.width, console.measure(rows, options=wide).maximum)
    console.print(rows)
    for run in runs:
        if run.state in ("failed", "died"):
            console.print(Text(f"{run.run_id}: {run.reason}", "red"), soft_wrap=True)
    counts = [f"{sum(run.state == state for run in runs)} {state}" for state in STATES]
    console.print(f"{len(runs)} runs: {', '.join(counts)}")
    if problem:
        console.print(f"whether Slurm's jobs still run is unknown: {problem}", soft_wrap=True)


def _done(run_dir: Path, num_rounds: int | None) -> tuple[str, str]:
    """The state of a run with DONE, and why it is not done all the same."""
    indices = [
        _parse(line).get("round_index") for line in _text(run_dir / ROUNDS_FILE).splitlines()
    ]
    if num_rounds is None:
        fault = f"{RUN_FILE} does not say how many rounds there are"
    else:
        fault = rounds_fault(indices, num_rounds)
    if not fault:
        return "done", ""
    return "failed", f"{DONE_FILE} is there, but {fault} (delete the folder to run again)"


def _dead(lock_file: Path, log: Path | None, queue: Queue) -> str:
    """What started a run and is gone without a word; "" if nothing is known to be gone."""
    gone, name = lock.is_dead(lock_file, queue.is_over)
    if log and not name:
        gone, name = _gone_by_log(log, queue)
    return f"{name} is gone; start the run again to resume" if gone else ""


def _gone_by_log(log: Path, queue: Queue) -> tuple[bool, str]:
    """Whether what last started into this log is gone, and its name."""
    lines = _tail(log, _MAX_LOG_BYTES).splitlines()
    started = next((line for line in reversed(lines) if line.startswith(_STARTED)), "")
    name = started.removeprefix(_STARTED)
    if process := _PROCESS.match(started):
        here = process[2] == socket.gethostname()
        return here and lock.process_is_gone(process[1]), name
    if job := _JOB.match(started):
        return queue.is_over(job[1], log.stat().st_uid), name
    return False, ""


def table(runs: list[RunStatus]) -> Table:
    """One row per run."""
    columns = Table(box=None, pad_edge=False)
    columns.add_column("run", no_wrap=True)
    columns.add_column("state", no_wrap=True)
    for title in ("rounds", "accuracy %", "last sign"):
        columns.add_column(title, justify="right", no_wrap=True)
    for run in runs:
        columns.add_row(
            Text(run.run_id),
            Text(run.state, _STYLES[run.state]),
            f"{run.rounds_done}/{'?' if run.num_rounds is None else run.num_rounds}",
            "" if run.accuracy is None else f"{100 * run.accuracy:.1f}",
            "" if run.silent_seconds is None else _ago(run.silent_seconds),
        )
    return columns


def last_lines(log: Path, count: int) -> list[str]:
    """The last non-empty lines of a log."""
    return [line for line in _tail(log, _LOG_TAIL_BYTES).splitlines() if line.strip()][-count:]


def _planned(results: Path) -> dict[str, tuple[int | None, list[Path]]]:
    """run_id -> num_rounds and possible logs; plans may share runs."""
    found: dict[str, tuple[int | None, list[Path]]] = {}
    for plan in sorted(results.glob("plan-*.jsonl")):
        for index, text in enumerate(_text(plan).splitlines()):
            line = _parse(text)
            run_id = _folder_name(line.get("run_id"))
            if not run_id:
                raise InputError(f"plan {plan}, line {index} is damaged; delete the file")
            _, logs = found.setdefault(run_id, (_num_rounds(line), []))
            logs.append(log_file(results, plan.stem, index))
    return found


def _folder_name(value: object) -> str:
    """A value that can be the name of a folder; else nothing."""
    if not isinstance(value, str) or set(value) & set("/\0"):
        return ""
    return value if len(value.encode(errors="replace")) < 256 else ""


def _num_rounds(record: dict[str, Any]) -> int | None:
    try:
        found = record["config"]["federation"]["num_rounds"]
    except (KeyError, TypeError):
        return None
    return found if isinstance(found, int) else None


def _progress(rounds: Path) -> tuple[int, float | None]:
    """Rounds on disk and the last accuracy, from the end of the file."""
    lines = _tail(rounds, _TAIL_BYTES).split("\n")[:-1]  # a whole line ends with a newline
    count = 0
    for line in reversed(lines):
        row = _parse(line)
        round_index, accuracy = row.get("round_index"), row.get("accuracy")
        if isinstance(round_index, int):
            count = count or round_index + 1
        if isinstance(accuracy, int | float):
            return count, float(accuracy)
    return count, None


def _end(log: Path) -> tuple[str, str]:
    """The state in which the run ended according to its log ("" if it did not), and why."""
    lines = last_lines(log, 200)
    code = lines.pop() if lines and lines[-1].startswith(_EXIT) else ""
    last_words = list(takewhile(re.compile(_SLURM).match, reversed(lines)))
    before = lines[-1 - len(last_words)] if len(last_words) < len(lines) else ""
    for line in (before, *last_words):
        if _REQUEUED.match(line):  # Slurm then ends it, with any exit code
            return "interrupted", line.removeprefix("fedara: ")
    if not (code or any(_KILLED.match(line) for line in last_words)):
        return "", ""
    earlier = [number for number, line in enumerate(lines) if line.startswith(_EXIT)]
    this_try = lines[earlier[-1] + 1 :] if earlier else lines
    this_try = [line for line in this_try if not line.startswith(_STARTED)]
    killed = [line for line in this_try if _KILLED.match(line)]
    named = killed or [line for line in this_try if _REASON.match(line)]
    said = (named or this_try or [""])[-1].removeprefix("fedara: ").strip()
    if code == exit_line(Interrupted.exit_code).strip():
        return "interrupted", said
    return "failed", " ".join(
        filter(None, [said, f"({code.removeprefix('fedara: ')})" if code else ""])
    )


def _parse(text: str) -> dict[str, Any]:
    """A JSON object; empty for a line that is cut off."""
    try:
        value = strict_json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _text(path: Path) -> str:
    """What a file holds; nothing if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _tail(path: Path, num_bytes: int) -> str:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - num_bytes))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"
