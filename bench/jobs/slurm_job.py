"""A process inside a Slurm job: which job it is, its state, and how to requeue it."""

import os
import shutil
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class JobId:
    """A job's number for Slurm's commands (5, or 5_1 for a task of an array), and its requeues."""

    number: str
    restarts: int = 0


def own_job() -> JobId | None:
    """The job of this process; None outside Slurm."""
    number = os.environ.get("SLURM_JOB_ID")
    if not number:
        return None
    if "SLURM_ARRAY_TASK_ID" in os.environ:  # SLURM_JOB_ID may be the whole array's
        number = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    restarts = os.environ.get("SLURM_RESTART_COUNT", "")
    return JobId(number, int(restarts) if restarts.isdigit() else 0)


def requeue() -> str:
    """Ask Slurm to requeue this job, which ends it at once; a cancelled job stays cancelled.
    Returns a line about the outcome, or "" outside Slurm."""
    job = own_job()
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
    """squeue's answer about a job: its state on stdout, or an error on stderr."""
    return _ask("squeue", "--noheader", "--format=%T", "--jobs", number)


def _ask(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False)
