"""One job at a time works on a run's folder: it writes its name into the file LOCK.

The kernel releases a lock when its process ends, so on one host a LOCK file that can be locked is
stale. Some cluster file systems have no locks, or none between hosts; there the process id or Slurm
tells whether the job that wrote the file still runs.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from bench.jobs.slurm_job import JobId, is_over, own_job
from fedara_core import strict_json
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
        problems: list[str] = []
        if holder and not _is_gone(holder, sure, partial(_over, problems)):
            raise _held(path, holder, *problems)
        _write(path, descriptor)
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


def is_dead(path: Path, over: Callable[[str, int], bool]) -> tuple[bool, str]:
    """Whether the job that wrote the file at `path` has ended without removing it, and its name.
    over: says of a Slurm job and its owner whether Slurm has it no more. Nothing is changed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # gone by now, or not ours to read
        return False, ""
    try:
        holder, owner, sure = _read(descriptor), os.fstat(descriptor).st_uid, True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False, _describe(holder)
        except OSError:  # the file system has no locks
            sure = False
        gone = bool(holder) and _is_gone(holder, sure, lambda number: over(number, owner))
        return gone and path.exists(), _describe(holder)
    finally:
        os.close(descriptor)


def _over(problems: list[str], number: str) -> bool:
    """Whether Slurm has a job no more; why that is unknown, if it is, goes into the list."""
    found, problem = is_over(number)
    problems.extend(filter(None, [problem]))
    return found


def _write(path: Path, descriptor: int) -> None:
    """Write down who holds the lock."""
    own: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
    if job := own_job():
        own |= {"job_id": job.number, "restarts": job.restarts}
    os.ftruncate(descriptor, 0)
    try:
        os.pwrite(descriptor, json.dumps(own).encode(), 0)
    except OSError:  # a full disk: an empty file would look like a job that is about to write
        path.unlink(missing_ok=True)
        raise


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
        found = strict_json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):  # a folder; a text that is no JSON
        return {}
    return found if isinstance(found, dict) else {}


def _is_gone(holder: dict[str, Any], sure: bool, over: Callable[[str], bool]) -> bool:
    """Whether the job that wrote the file has ended; sure: see `_open_locked`."""
    if holder.get("host") == socket.gethostname():
        return sure or process_is_gone(holder.get("pid"))
    if "job_id" not in holder:
        return False
    theirs, own = JobId(str(holder["job_id"]), holder.get("restarts", 0)), own_job()
    if own and own.number == theirs.number:
        return own.restarts != theirs.restarts  # Slurm has restarted this job since
    return over(theirs.number)


def process_is_gone(pid: object) -> bool:
    """Whether this host has no process of this id."""
    return not Path(f"/proc/{pid}").exists()


def _held(path: Path, holder: dict[str, Any], problem: str = "") -> InputError:
    return InputError(
        f"{path.parent}: in use by {_describe(holder)}"
        + (f" (whether that job has ended is unknown: {problem})" if problem else "")
        + f"; allowed: when that has ended (if it has, delete {path})"
    )


def _describe(holder: dict[str, Any]) -> str:
    job = f", Slurm job {holder['job_id']}" if "job_id" in holder else ""
    return f"process {holder.get('pid', '?')} on host {holder.get('host', '?')}{job}"
