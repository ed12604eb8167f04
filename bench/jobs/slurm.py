"""A plan as Slurm jobs: an array with one task per run, and a job that draws the figures."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bench.config.load import explain, read_toml
from bench.jobs.plan import Plan
from bench.run.checkpoint import write_atomically
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


def read_site(path: Path) -> Site:
    """A site file. Raises InputError with one line that names key, value and rule."""
    try:
        return Site.model_validate(read_toml(path, "site", "a file like slurm/sites/*.toml"))
    except ValidationError as error:
        raise InputError(f"site {path}: {explain(error, Site)}") from None


def submit_plan(plan: Plan, site: Site, *, dry_run: bool) -> list[str]:
    """Write the plan and its job scripts (with dry_run nothing) and submit them; returns what to
    print. Raises InputError, also if sbatch is missing or refuses."""
    left = plan.left()
    if not left:
        return [f"{plan.path}: all {len(plan.runs)} runs are done, nothing to submit"]
    python, folder = sys.executable, Path.cwd()
    texts = {
        plan.path.with_suffix(".sbatch"): array_script(plan, site, left, python, folder),
        plan.path.with_name(f"{plan.name}-figures.sbatch"): figures_script(
            plan, site, python, folder
        ),
    }
    if dry_run:
        shown = [f"# {path}\n{text}" for path, text in texts.items()]
        return [*shown, f"{len(left)} of {len(plan.runs)} runs would be submitted"]
    if shutil.which("sbatch") is None:
        raise InputError("no sbatch here; allowed: on a machine with Slurm, or with --dry-run")
    plan.write()
    for path, text in texts.items():
        write_atomically(path, text.encode())
    array, figures = texts
    array_id = _sbatch(array)
    figures_id = _sbatch(figures, f"--dependency=afterany:{array_id}")
    return [
        f"job {array_id}: {len(left)} of {len(plan.runs)} runs of {plan.path}",
        f"job {figures_id}: figures, when all of them have ended",
        f"fedara status {plan.results} shows how far they are",
    ]


def array_script(plan: Plan, site: Site, lines: list[int], python: str, folder: Path) -> str:
    """The job script for these lines of the plan; it runs `python` in `folder`."""
    limit = f"%{site.array_limit}" if site.array_limit else ""
    log = str(plan.log(0)).removesuffix("-0.log") + "-%a.log"
    options = {
        "job-name": plan.name.replace("plan-", "fedara-", 1),
        "chdir": str(folder),
        "output": log,
        "open-mode": "append",
        "array": _ranges(lines) + limit,
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
    command = shlex.join(
        [python, "-m", "bench", "run", str(plan.path), "--results", str(plan.results)]
    )
    return (
        _header(options, "One run of a plan: the line of the plan that the array's index counts.")
        + _surroundings(site)
        + 'export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"\n\n'
        + _NEW_STEP
        + "\n# srun does not take --cpus-per-task from sbatch (since Slurm 22.05). The processes\n"
        "# end together; if one dies alone, srun ends those that wait for it.\n"
        f'srun -c "$SLURM_CPUS_PER_TASK" --wait=10 --mpi={site.mpi} \\\n'
        f"  {command} \\\n"
        '  --index "$SLURM_ARRAY_TASK_ID" &\n'
        + _WAIT
        + '\n# The last line of a failed run\'s log; "fedara status" reads it.\n'
        '[ "$code" -eq 0 ] || echo "fedara: exit code $code"\n'
        'exit "$code"\n'
    )


def figures_script(plan: Plan, site: Site, python: str, folder: Path) -> str:
    """The job script that draws the figures and tables of the finished runs."""
    options = {
        "job-name": plan.name.replace("plan-", "fedara-", 1) + "-figures",
        "chdir": str(folder),
        "output": str(plan.results / "logs" / f"{plan.name}-figures.log"),
        "open-mode": "append",
        **_place(site),
        "time": "00:15:00",
        "ntasks": "1",
    }
    command = shlex.join([python, "-m", "analysis", str(plan.results)])
    return (
        _header(options, "Figures and table from the records of the runs that finished.")
        + _surroundings(site)
        + f"{command}\n"
    )


def _header(options: dict[str, str], what: str) -> str:
    lines = ["#!/bin/bash"]
    for key, value in options.items():
        quoted = f'"{value}"' if re.search(r"\s", value) else value
        lines.append(f"#SBATCH --{key}" + (f"={quoted}" if value else ""))
    return "\n".join([*lines, f"# {what}", ""])


def _place(site: Site) -> dict[str, str]:
    keys = ("account", "partition", "qos", "constraint", "mem_per_cpu")
    named = {key.replace("_", "-"): getattr(site, key) for key in keys}
    return {key: value for key, value in named.items() if value is not None}


def _surroundings(site: Site) -> str:
    lines = [f"module load {module}" for module in site.modules] + site.setup
    return "\n" + "".join(f"{line}\n" for line in lines)


def _ranges(numbers: list[int]) -> str:
    """0-3,7 for [0, 1, 2, 3, 7]."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def _sbatch(script: Path, *options: str) -> str:
    """Submit a script; returns the job id. Raises InputError with what sbatch said."""
    words = ["sbatch", "--parsable", *options, str(script)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise InputError(f"sbatch refused {script}: {said}; allowed: what your site file says")
    return done.stdout.strip().partition(";")[0]  # jobid;cluster
