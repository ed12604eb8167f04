"""One job at a time works on a run's folder: it writes its name into the file LOCK.

The kernel releases a lock when its process ends, so on one host a LOCK file that can be locked is
stale. Some cluster file systems have no locks, or none between hosts; there the process id or Slurm
tells whether the job that wrote the file still runs.
"""

import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bench.jobs.slurm_job import JobId, own_job, queue_state
from fedara_core.errors import InputError

FILE = "LOCK"
PATIENCE_SECONDS = 5.0  # the processes of a killed job may take a moment to end
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)  # the file system has none


@contextmanager
def locked(run_dir: Path) -> Iterator[str]:
    """Hold the folder's lock; yields a line about the stale lock that was taken over, or "". Raises
    InputError with host and job id if another job holds it."""
    path = run_dir / FILE
    descriptor, sure = _open_locked(path)
    try:
        holder = _read(descriptor)
        if holder and not _is_gone(holder, sure):
            raise _held(path, holder)
        os.ftruncate(descriptor, 0)
        own: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
        if job := own_job():
            own |= {"job_id": job.number, "restarts": job.restarts}
        os.pwrite(descriptor, json.dumps(own).encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    try:
        yield f"{path}: the job of {_describe(holder)} is gone; taken over" if holder else ""
    finally:
        path.unlink(missing_ok=True)  # while it is locked: so nobody takes it for stale
        with suppress(OSError):  # not empty: it holds the record
            run_dir.rmdir()  # a refused run leaves nothing behind
        os.close(descriptor)


def _open_locked(path: Path) -> tuple[int, bool]:
    """A descriptor of the file at `path`, and whether the kernel guarantees that no other process
    of this host holds it."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        sure = True
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read(descriptor)
            os.close(descriptor)
            if time.monotonic() > end:
                raise _held(path, holder) from None
            time.sleep(0.1)
            continue
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            sure = False
        try:
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor, sure
        except FileNotFoundError:  # its holder ended between the two steps
            pass
        os.close(descriptor)


def _read(descriptor: int) -> dict[str, Any]:
    """What the holder wrote; empty if it has not written yet."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_gone(holder: dict[str, Any], sure: bool) -> bool:
    """Whether the job that wrote the file has ended; sure: see `_open_locked`."""
    if holder.get("host") == socket.gethostname():
        return sure or not Path(f"/proc/{holder.get('pid')}").exists()
    if "job_id" not in holder:
        return False
    theirs, own = JobId(holder["job_id"], holder.get("restarts", 0)), own_job()
    if own and own.number == theirs.number:
        return own.restarts != theirs.restarts  # Slurm has restarted this job since
    if shutil.which("squeue") is None:
        return False
    done = queue_state(theirs.number)
    if done.returncode:  # also for a job that Slurm has forgotten
        return "Invalid job id" in done.stderr
    return not done.stdout.strip()


def _held(path: Path, holder: dict[str, Any]) -> InputError:
    return InputError(
        f"{path.parent}: in use by {_describe(holder)}; allowed: when that has ended (if it has, "
        f"delete {path})"
    )


def _describe(holder: dict[str, Any]) -> str:
    job = f", Slurm job {holder['job_id']}" if "job_id" in holder else ""
    return f"process {holder.get('pid', '?')} on host {holder.get('host', '?')}{job}"
