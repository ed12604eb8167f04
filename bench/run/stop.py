"""SIGUSR1 and SIGTERM ask a job to end after the round that it is in."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fedara_core.comm.base import Communicator

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Asked:
    """Whether this process was asked to end. A launcher may pass on the same signal more than
    once, so that a second one says nothing new; SIGINT and SIGKILL end a job at once."""

    def __init__(self) -> None:
        self.signal_name = ""

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self.signal_name = self.signal_name or signal.Signals(number).name

    def agree(self, communicator: Communicator) -> str:
        """The name of a signal that any process got, the same on all of them; "" if none did."""
        told = communicator.gather_bytes(self.signal_name.encode())
        return next((name.decode() for name in told if name), "")


@contextmanager
def listening() -> Iterator[Asked]:
    """Note the signals instead of ending at once. Only a main thread can; others hear nothing."""
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, asked.note) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
