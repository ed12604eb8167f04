"""What a process inside a Slurm job can know and ask: its job, and to be started again."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class JobId:
    """What Slurm's commands call a job, 5 or, for a task of an array, 5_1, and how often it was
    requeued."""

    number: str
    restarts: int = 0


def own_job(environ: Mapping[str, str] = os.environ) -> JobId | None:
    """The job that this process belongs to."""
    number = environ.get("SLURM_JOB_ID")
    if not number:
        return None
    if "SLURM_ARRAY_TASK_ID" in environ:  # one task's SLURM_JOB_ID is also the whole array's
        number = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    restarts = environ.get("SLURM_RESTART_COUNT", "")
    return JobId(number, int(restarts) if restarts.isdigit() else 0)


def requeue(environ: Mapping[str, str] = os.environ) -> str:
    """Ask Slurm to start this job again; says in a line what came of it, nothing outside Slurm.

    A job that somebody has cancelled stays cancelled. Slurm ends a requeued job at once.
    """
    job = own_job(environ)
    if job is None:
        return ""
    if shutil.which("scontrol") is None or shutil.which("squeue") is None:
        return f"job {job.number} is not requeued: no scontrol or squeue here"
    state = queue_state(job.number)
    if state.stdout.strip() != "RUNNING":
        said = state.stdout.strip() or " ".join(state.stderr.split()) or "gone"
        return f"job {job.number} is not requeued: its state is {said}"
    asked = _ask("scontrol", "requeue", job.number)
    if asked.returncode:
        return f"job {job.number} is not requeued: {' '.join(asked.stderr.split())}"
    return f"job {job.number} is requeued"


def queue_state(number: str) -> subprocess.CompletedProcess[str]:
    """What squeue says of a job: its state on stdout, or why it does not know on stderr."""
    return _ask("squeue", "--noheader", "--format=%T", "--jobs", number)


def _ask(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False)
