"""Which communicator a job gets, and how its processes end together.

A launcher is recognised by the variables that it sets. Nothing of a back end's library is imported
before the back end is chosen.
"""

import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import NoReturn, TypeVar

from fedara_core.comm.base import Communicator
from fedara_core.comm.mpi import MpiCommunicator
from fedara_core.comm.node import NodeCommunicator
from fedara_core.comm.torchrun import TorchCommunicator
from fedara_core.errors import InputError

T = TypeVar("T")

BACK_ENDS: dict[str, Callable[[], Communicator]] = {
    "serial": Communicator,
    "mpi": MpiCommunicator,
    "mpi-node": NodeCommunicator,
    "torch": TorchCommunicator,
}
KINDS = ("auto", *BACK_ENDS)

# The variables that hold a launcher's number of processes. A batch script's own step has none.
_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")
_SRUN_SIZE = "SLURM_STEP_NUM_TASKS"
_TORCHRUN = "TORCHELASTIC_RUN_ID"  # set by torchrun and by nothing else


def detect(environ: Mapping[str, str]) -> str:
    """The communicator that the launcher's environment asks for: serial, mpi or torch."""
    if _TORCHRUN in environ:
        return "torch"
    if _launched_processes(environ):
        return "mpi"
    return "serial"


def open_communicator(kind: str, environ: Mapping[str, str] = os.environ) -> Communicator:
    """Join the job. Raises InputError for an unknown kind or a launcher that MPI does not see."""
    if kind not in KINDS:
        raise InputError(f"--comm {kind!r} is not allowed; allowed: {', '.join(KINDS)}")
    chosen = detect(environ) if kind == "auto" else kind
    if chosen == "torch":
        return BACK_ENDS[chosen]()
    launched = _launched_processes(environ)
    if chosen == "serial" and launched > 1:
        raise InputError(
            f"--comm serial: the launcher started {launched} processes, and each would run "
            "alone; allowed: one process, or --comm mpi or torch as the launcher asks"
        )
    communicator = BACK_ENDS[chosen]()
    if launched > 1 and communicator.world_size == 1:
        raise InputError(
            f"the launcher started {launched} processes but MPI sees 1; allowed: the mpiexec of "
            "the MPI that mpi4py was built for, srun --mpi=pmi2 (srun --mpi=list shows the "
            "choices), or --comm torch under torchrun"
        )
    return communicator


def _launched_processes(environ: Mapping[str, str]) -> int:
    """How many processes torchrun, mpiexec or srun says it started; 0 without a launcher."""
    if _TORCHRUN in environ:
        return _number(environ, "WORLD_SIZE")
    for key in _MPI_SIZES:
        if number := _number(environ, key):
            return number
    # srun sets SLURM_PROCID for its tasks; a batch step's size is 1 and needs no MPI.
    number = _number(environ, _SRUN_SIZE)
    return number if number > 1 else 0


def _number(environ: Mapping[str, str], key: str) -> int:
    """A variable's number; 0 where it has none."""
    text = environ.get(key, "")
    return int(text) if text.isdecimal() else 0


def together(communicator: Communicator, action: Callable[[], T]) -> T:
    """Run `action` on every process. If any raises InputError, the first one is raised on all."""
    result, refusal = None, ""
    try:
        result = action()
    except InputError as error:
        refusal = str(error)
    # A folder's name may hold bytes that are no UTF-8: Python reads them as lone surrogates.
    gathered = communicator.gather_bytes(refusal.encode(errors="surrogatepass"))
    refusals = [part.decode(errors="surrogatepass") for part in gathered]
    for text in refusals:
        if text:
            raise InputError(text)
    return result  # type: ignore[return-value]


def abort_on_error(communicator: Communicator, error: BaseException) -> NoReturn:
    """Print the traceback with the world_rank and end the job, so that nobody waits for ever."""
    text = "".join(traceback.format_exception(error))
    sys.stderr.write(f"world_rank {communicator.world_rank} failed:\n{text}")
    sys.stderr.flush()
    communicator.abort()
