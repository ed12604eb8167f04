"""The job scripts of a plan: an array with one task per run, and a job that draws the figures."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from bench.jobs.plan import Plan
from bench.jobs.status import started_as_job
from fedara_core.errors import InputError

_Word = Annotated[str, Field(pattern=r"^[^\s'\"]+$")]  # part of an #SBATCH line
_Time = Annotated[str, Field(pattern=r"^(\d+-\d{1,2}(:\d{1,2}){0,2}|\d+(:\d{1,2}){0,2})$")]
_SIGNAL_SECONDS = 120  # before the time limit: time for a round and a checkpoint

_NEW_STEP = """\
# MPICH names its shared memory by job and step, and a killed step leaves it behind: a requeued job
# continues under a number that no step had.
for _ in $(seq "${SLURM_RESTART_COUNT:-0}"); do srun --nodes=1 --ntasks=1 --mpi=none true; done
"""
_WAIT = f"""\
step=$!

# Slurm sends USR1 to this shell {_SIGNAL_SECONDS} s before the time limit. srun passes it on to the
# processes; at TERM it would kill them.
trap 'kill -USR1 "$step"' USR1 TERM
code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do  # a signal ended the wait, not the run
  code=0
  wait "$step" || code=$?
done
"""


_STOP = """\
# What fails here ends the job: it would run with other programs, or with none.
# shellcheck disable=SC2329
stop() {  # COMMAND CODE FILES: with more than one file, it failed inside a sourced one, which may
  [ "${3:-1}" -eq 1 ] || return 0
  echo "fedara: $1 failed"
  echo "fedara: exit code $2"
  exit "$2"
}
"""
_WATCH = """trap 'stop "$BASH_COMMAND" "$?" "${#BASH_SOURCE[@]}"' ERR"""


class Site(BaseModel):
    """How runs are submitted at one place. The keys are named after the options of sbatch."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    time: _Time
    """Time limit of a run."""

    mpi: _Word
    """srun's plug-in, which has to fit the MPI; `srun --mpi=list` shows them."""

    account: _Word | None = None
    """Whom to bill."""

    partition: _Word | None = None
    """Where to run."""

    qos: _Word | None = None
    """Quality of service."""

    constraint: _Word | None = None
    """Features that nodes must have."""

    nodes: int = Field(default=1, ge=1)
    """Nodes of a run."""

    ntasks_per_node: int = Field(default=1, ge=1)
    """Processes on each node."""

    cpus_per_task: int = Field(default=1, ge=1)
    """Cores, and so threads, of each process."""

    gpus_per_task: int = Field(default=0, ge=0)
    """GPUs of each process."""

    mem_per_cpu: _Word | None = None
    """Memory per core, such as "4G"."""

    exclusive: bool = False
    """Whether to keep other jobs off the nodes; measured energy counts whole nodes."""

    array_limit: int | None = Field(default=None, ge=1)
    """Most runs at a time."""

    modules: list[_Word] = []
    """Modules to load, in this order."""

    setup: list[str] = []
    """Shell lines after the modules."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive lines of a plan that one job array runs: as many as Slurm's indices reach.

    first: the line of index 0. digits: of the indices, where lines before this chunk need a number
    of their own in the names of the logs.
    """

    lines: tuple[int, ...]
    first: int = 0
    digits: int = 0


def chunks(lines: list[int], max_array_size: int | None) -> list[Chunk]:
    """These lines of a plan by job array. max_array_size: indices lie below it; None: no limit.

    An array that does not start at line 0 starts at a multiple of a power of ten: its logs are then
    named after the lines by Slurm itself, with the index as the last digits.
    """
    if max_array_size is None or max(lines) < max_array_size:
        return [Chunk(lines=tuple(lines))]
    digits = len(str(max_array_size)) - 1
    length = 10**digits
    by_first: dict[int, list[int]] = {}
    for line in lines:
        by_first.setdefault(line - line % length, []).append(line)
    return [
        Chunk(lines=tuple(found), first=first, digits=digits if first else 0)
        for first, found in by_first.items()
    ]


def array_script(plan: Plan, site: Site, chunk: Chunk, program: list[str], folder: Path) -> str:
    """The job script for these lines of the plan; it runs `program`, the suite, in `folder`."""
    limit = f"%{site.array_limit}" if site.array_limit else ""
    options = {
        "job-name": plan.name.replace("plan-", "fedara-", 1),
        "chdir": str(folder),
        "output": _log(plan, chunk),
        "open-mode": "append",
        "array": _ranges([line - chunk.first for line in chunk.lines]) + limit,
        **_place(site),
        "time": site.time,
        "nodes": str(site.nodes),
        "ntasks-per-node": str(site.ntasks_per_node),
        "cpus-per-task": str(site.cpus_per_task),
        **({"gpus-per-task": str(site.gpus_per_task)} if site.gpus_per_task else {}),
        **({"exclusive": ""} if site.exclusive else {}),
        "requeue": "",
        "signal": f"B:USR1@{_SIGNAL_SECONDS}",
    }
    command = shlex.join([*program, "run", str(plan.path), "--results", str(plan.results)])
    index = f"$((SLURM_ARRAY_TASK_ID + {chunk.first}))" if chunk.first else "$SLURM_ARRAY_TASK_ID"
    job = started_as_job("${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID")
    return (
        _header(options, "One run of a plan: the line of the plan that the array's index counts.")
        + f'\n# "fedara status" reads it: a killed job can not say that it ended.\necho "{job}"\n'
        + _surroundings(site)
        + 'export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"\n\n'
        + _NEW_STEP
        + "\n# srun does not take --cpus-per-task from sbatch (since Slurm 22.05). The processes\n"
        "# end together; if one dies alone, srun ends those that wait for it.\n"
        f'srun -c "$SLURM_CPUS_PER_TASK" --wait=10 --mpi={site.mpi} \\\n'
        f"  {command} \\\n"
        f'  --index "{index}" &\n'
        + _WAIT
        + '\n# The last line of a failed run\'s log; "fedara status" reads it.\n'
        '[ "$code" -eq 0 ] || echo "fedara: exit code $code"\n'
        'exit "$code"\n'
    )


def figures_script(plan: Plan, site: Site, program: list[str], folder: Path) -> str:
    """The job script that draws the figures and tables of the finished runs."""
    options = {
        "job-name": plan.name.replace("plan-", "fedara-", 1) + "-figures",
        "chdir": str(folder),
        "output": _pattern(plan.results / "logs" / f"{plan.name}-figures.log"),
        "open-mode": "append",
        **_place(site),
        "time": "00:15:00",
        "ntasks": "1",
    }
    command = shlex.join([*program, "report", str(plan.results)])
    return (
        _header(options, "Figures and table from the records of the runs that finished.")
        + _surroundings(site)
        + f"{command}\n"
    )


def _log(plan: Plan, chunk: Chunk) -> str:
    """The pattern of the logs' names: each is that of its line (`Plan.log`)."""
    stem = _pattern(plan.log(0)).removesuffix("0.log")
    if not chunk.first:
        return f"{stem}%a.log"
    leading = chunk.first // 10**chunk.digits
    return f"{stem}{leading}" + (f"%{chunk.digits}a" if chunk.digits else "") + ".log"


def _pattern(log: Path) -> str:
    """A log's name, in which Slurm replaces nothing. Raises InputError."""
    if "\\" in str(log):  # Slurm then replaces no %a in it
        raise InputError(
            f"--results {str(log.parent.parent)!r}, config {log.stem!r}: Slurm's logs can not have "
            "a backslash in their names; allowed: names without one"
        )
    return str(log).replace("%", "%%")


def _header(options: dict[str, str], what: str) -> str:
    lines = ["#!/bin/bash"]
    for key, value in options.items():
        if "\n" in value:
            raise InputError(f"{value!r}: a line break in Slurm's --{key}; allowed: one line")
        lines.append(f"#SBATCH --{key}" + (f"={_quoted(value)}" if value else ""))
    return "\n".join([*lines, f"# {what}", ""])


def _quoted(value: str) -> str:
    """A value as sbatch reads it from a script: spaces, quotes and # end it unless quoted."""
    if not re.search(r"[\s'\"#\\]", value):
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def _place(site: Site) -> dict[str, str]:
    keys = ("account", "partition", "qos", "constraint", "mem_per_cpu")
    named = {key.replace("_", "-"): getattr(site, key) for key in keys}
    return {key: value for key, value in named.items() if value is not None}


def _surroundings(site: Site) -> str:
    """Modules and setup. What fails there ends the job."""
    if not site.modules and not site.setup:
        return "\n"
    lines = [f'module load {name} || stop "module load {name}" "$?"' for name in site.modules]
    if site.setup:
        lines += [_WATCH, *site.setup, "trap - ERR"]
    return "\n" + _STOP + "".join(f"{line}\n" for line in lines) + "\n"


def _ranges(numbers: list[int]) -> str:
    """0-3,7 for [0, 1, 2, 3, 7]."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)
