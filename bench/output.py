"""Standard output and error that may be full, closed, or too narrow for a name."""

import errno
import io
import os
import sys
from contextlib import suppress
from typing import TextIO

from rich.console import Console

from fedara_core.errors import JobError


class Output(io.TextIOWrapper):
    """Standard output whose failure is a JobError. A reader that leaves (`| head`) stays an
    OSError, of which typer and rich know.

    problem: what has failed; libraries swallow some errors of a write.
    """

    problem = ""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._give_up(error)
            raise

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)
            raise

    def _give_up(self, error: OSError) -> None:
        """Raise JobError. What is still in the buffers goes nowhere: Python's own end would fail
        with it again."""
        if error.errno == errno.EPIPE:
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        self.problem = f"standard output: {error.strerror}"
        raise JobError(self.problem) from None


def console(*, quiet: bool = False) -> Console:
    """Shows texts as they are: a name may hold [bold] or :smile:."""
    return Console(quiet=quiet, highlight=False, markup=False, emoji=False)


def guarded(stream: TextIO) -> TextIO:
    """The same stream, whose failures are JobErrors; another stream as it is."""
    if not isinstance(stream, io.TextIOWrapper):  # closed (None), or a test's
        return stream
    return Output(
        stream.buffer,
        encoding=stream.encoding,
        errors="backslashreplace" if stream.errors == "strict" else stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def close(stream: TextIO) -> str:
    """Write out what is in the buffer; returns what has failed, now or before."""
    with suppress(JobError, BrokenPipeError):
        if stream is not None:
            stream.flush()
    return stream.problem if isinstance(stream, Output) else ""


def say(text: str) -> None:
    """One line on standard error, if that takes it."""
    with suppress(OSError, AttributeError):  # full; closed
        sys.stderr.write(f"fedara: {text}\n")
        sys.stderr.flush()


def not_text(error: UnicodeEncodeError) -> str:
    """A name that this locale can not encode, and what to do."""
    return (
        f"{error.object!r}: the locale's encoding, {sys.getfilesystemencoding()}, has no such "
        "name; allowed: UTF-8 (LC_ALL=C.UTF-8, or PYTHONUTF8=1)"
    )
