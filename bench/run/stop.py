"""SIGUSR1 and SIGTERM ask a job to end after its current round."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fedara_core.comm.base import Communicator

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Asked:
    """Whether this process was asked to end. Further signals change nothing, since a launcher may
    pass on the same one more than once; SIGINT and SIGKILL end a job at once."""

    def __init__(self) -> None:
        self.signal_name = ""

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self.signal_name = self.signal_name or signal.Signals(number).name

    def agree(self, communicator: Communicator) -> str:
        """The name of a signal that any process got, the same on all processes; "" if none."""
        names = communicator.gather_bytes(self.signal_name.encode())
        return next((name.decode() for name in names if name), "")


@contextmanager
def listening() -> Iterator[Asked]:
    """Note the signals instead of ending at once. Python allows that in the main thread only."""
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
