"""Bytes that really left this process: the kernel's socket counters, or Open MPI's monitoring.

A counter is used only if it sees all bytes of a probe. The processes of one host often talk through
shared memory, which no counter sees. Then nothing is counted, and the record says why.
"""

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Callable
from functools import partial

import torch

from fedara_core.comm.base import Communicator

_PROBE_BYTES = 1 << 18
_HINT = (
    "to count, let all bytes pass a counter: Open MPI with --mca pml_monitoring_enable 1; MPICH "
    "with MPIR_CVAR_NOLOCAL=1 and UCX_TLS=tcp,self (ucx) or FI_PROVIDER=tcp (ofi)"
)


class WireCounter:
    """The null counter, and the interface of the others. reason: why nothing is counted."""

    source: str | None = None  # the record's measured_bytes_source

    def __init__(self, reason: str = "") -> None:
        self.reason = reason

    def sent(self) -> int:
        """Bytes that this process has sent to others so far."""
        return 0

    def count(self, action: Callable[[], object], communicator: Communicator) -> int | None:
        """Bytes that action() sends from this process; None if they can not be counted.

        Every process calls it, and action() runs in any case. Bytes that are still on their way
        when it returns have left by the end of a barrier. The barrier's own bytes are subtracted.
        """
        if self.source is None:
            action()
            return None
        return self._moved(action, communicator) - self._moved(lambda: None, communicator)

    def _moved(self, action: Callable[[], object], communicator: Communicator) -> int:
        start = self.sent()
        action()
        communicator.barrier()
        return self.sent() - start


class TcpCounter(WireCounter):
    """The kernel's counters of all TCP sockets that this process has open (Linux 4.19 and later).

    They count each byte of the stream once, bytes that wait in the kernel included. Headers of TCP
    and below, and bytes that were sent again, do not count. Raises OSError where there are none.
    """

    source = "tcp_info"

    def __init__(self) -> None:
        super().__init__()
        if not (hasattr(socket, "TCP_INFO") and os.path.isdir("/proc/self/fd")):
            raise OSError("no counters of sockets here")

    def sent(self) -> int:
        return sum(map(_written, os.listdir("/proc/self/fd")))


# Offsets in struct tcp_info of linux/tcp.h, which only ever grows at its end.
_NOTSENT_BYTES = struct.Struct("=144xI")
_SENT_AND_RETRANS_BYTES = struct.Struct("=200xQQ")


def _written(descriptor: str) -> int:
    """Bytes that were written to the socket behind a file descriptor; 0 if it is no TCP socket."""
    with contextlib.suppress(OSError):  # closed by now, or no socket
        if not os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:"):
            return 0
        with socket.socket(fileno=os.dup(int(descriptor))) as copy:
            if copy.family not in (socket.AF_INET, socket.AF_INET6):
                return 0
            info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)
        if len(info) >= _SENT_AND_RETRANS_BYTES.size:
            sent, sent_again = _SENT_AND_RETRANS_BYTES.unpack_from(info)
            return int(sent - sent_again + _NOTSENT_BYTES.unpack_from(info)[0])
    return 0


class PmlMonitoringCounter(WireCounter):
    """Open MPI's pml_monitoring through MPI_T: bytes of all messages, those of collectives too.

    Raises OSError where the component is missing or off.
    """

    source = "pml_monitoring"
    _VARIABLE = b"pml_monitoring_messages_size"
    _CLASS_SIZE = 2  # MPI_T_PVAR_CLASS_SIZE in Open MPI, the one library with this variable

    def __init__(self) -> None:
        super().__init__()
        from mpi4py import MPI

        self._library = ctypes.CDLL(MPI.__file__)  # finds what the module is linked with, too
        self._session, self._handle = ctypes.c_void_p(), ctypes.c_void_p()
        index, length = ctypes.c_int(), ctypes.c_int()
        world = ctypes.c_void_p(MPI._addressof(MPI.COMM_WORLD))
        self._call("init_thread", 0, ctypes.byref(ctypes.c_int()))
        self._call("pvar_get_index", self._VARIABLE, self._CLASS_SIZE, ctypes.byref(index))
        self._call("pvar_session_create", ctypes.byref(self._session))
        self._call(
            "pvar_handle_alloc",
            *(self._session, index, world, ctypes.byref(self._handle), ctypes.byref(length)),
        )
        self._call("pvar_start", self._session, self._handle)
        self._bytes_by_peer = (ctypes.c_ulong * length.value)()
        self._world_rank = MPI.COMM_WORLD.Get_rank()

    def sent(self) -> int:
        self._call("pvar_read", self._session, self._handle, self._bytes_by_peer)
        # An alltoall's message to oneself is monitored like the others, but leaves nobody.
        return sum(self._bytes_by_peer) - self._bytes_by_peer[self._world_rank]

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, f"MPI_T_{name}")(*arguments)
        if code != 0:
            raise OSError(f"MPI_T_{name} failed with code {code}")


def open_counter(communicator: Communicator) -> WireCounter:
    """The first counter that sees all bytes of a probe, the same on every process."""
    world_size, seen = communicator.world_size, []
    if world_size == 1:
        return WireCounter("one process moves no bytes")
    kinds: list[Callable[[], WireCounter]] = [TcpCounter]
    if communicator.kind == "mpi":
        kinds.insert(0, PmlMonitoringCounter)
    for kind in kinds:
        try:
            counter = kind()
        except (OSError, AttributeError):  # no such counter; an MPI library without MPI_T
            counter = WireCounter()
        if not all(communicator.gather_bytes(b"x" if counter.source else b"")):
            continue  # absent on some process
        probe = partial(communicator.allgather, torch.zeros(_PROBE_BYTES, dtype=torch.uint8))
        sent = sum(communicator.gather_json(counter.count(probe, communicator)))
        needed = world_size * (world_size - 1) * _PROBE_BYTES
        if sent >= needed:
            return counter
        seen.append(f"{counter.source} saw {sent} of {needed} bytes")
    return WireCounter("; ".join([*(seen or ["no counter here"]), _HINT]))
