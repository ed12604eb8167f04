"""Slurm's jobs, seen from outside and from inside: which job this is, the state of any, requeueing.

A Slurm that does not answer costs `bench.ask.SECONDS`, and then its jobs' state is unknown.
"""

import os
import shutil
from dataclasses import dataclass
from functools import cached_property

from bench.ask import ask


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
    state = ask("squeue", "--noheader", "--format=%T", "--jobs", job.number)
    if state.stdout.strip() != "RUNNING":
        said = state.stdout.strip() or " ".join(state.stderr.split()) or "gone"
        return f"job {job.number} is not requeued: its state is {said}"
    asked = ask("scontrol", "requeue", job.number)
    if asked.returncode:
        return f"job {job.number} is not requeued: {' '.join(asked.stderr.split())}"
    return f"job {job.number} is requeued"


def is_over(number: str) -> tuple[bool, str]:
    """Whether Slurm has the job no more, or has forgotten it; and why that is unknown, if it is."""
    if shutil.which("squeue") is None:
        return False, ""
    done = ask("squeue", "--noheader", "--format=%T", "--jobs", number)
    if not done.returncode:
        return not done.stdout.strip(), ""
    said = " ".join(done.stderr.split())
    return ("Invalid job id" in said), "" if "Invalid job id" in said else said


class Queue:
    """The jobs of this user that Slurm has, asked for once and only if somebody wants to know."""

    def __init__(self) -> None:
        self.problem = ""  # why it is unknown

    @cached_property
    def _jobs(self) -> frozenset[str] | None:
        if shutil.which("squeue") is None:
            return None
        done = ask("squeue", "--noheader", "--array", "--format=%i", f"--user={os.getuid()}")
        if done.returncode:
            self.problem = " ".join(done.stderr.split())
            return None
        return frozenset(done.stdout.split())

    def is_over(self, number: str, owner: int) -> bool:
        """Whether Slurm has a job of this user id no more. Sites hide the jobs of other users."""
        return owner == os.getuid() and self._jobs is not None and number not in self._jobs
