"""Errors that the command line tells in one line, and checks of hyperparameters that raise one."""

from collections.abc import Callable


class InputError(ValueError):
    """A wrong setting, file or data value; its text is one line: the value and what is allowed.

    The command line prints it without a traceback and exits with code 2 on every process.
    """


class JobError(Exception):
    """What ends a whole job and is nobody's bug, such as a full disk; its text is one line.

    The command line prints it without a traceback and ends all processes with code 1.
    """


class Interrupted(Exception):
    """The job was asked to end, and has after a whole round; raised on every process alike."""

    exit_code = 75  # sysexits.h, EX_TEMPFAIL: start it again


class Diverged(InputError):
    """Training left the finite numbers; raised on every process at the same place."""


_RULES: dict[str, Callable[[float], bool]] = {
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in (0, 1]": lambda value: 0 < value <= 1,
    "above 0 and at most 1": lambda value: 0 < value <= 1,
    "above 0": lambda value: value > 0,
    "0 or above": lambda value: value >= 0,
}


def require(method: object, rule: str, *names: str) -> None:
    """InputError unless these hyperparameters keep a rule, such as "in [0, 1]"."""
    for name in names:
        value = getattr(method, name)
        if not _RULES[rule](value):
            raise InputError(f"method.{name} = {value} must be {rule}")
