"""Errors that the command line tells in one line, and checks of hyperparameters that raise one."""


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


def require_fractions(method: object, *names: str) -> None:
    """InputError unless these hyperparameters are in [0, 1]."""
    for name in names:
        if not 0 <= getattr(method, name) <= 1:
            raise InputError(f"method.{name} = {getattr(method, name)} must be in [0, 1]")


def require_positive(method: object, *names: str) -> None:
    """InputError unless these hyperparameters are above 0."""
    for name in names:
        if getattr(method, name) <= 0:
            raise InputError(f"method.{name} = {getattr(method, name)} must be above 0")


def require_not_negative(method: object, *names: str) -> None:
    """InputError unless these hyperparameters are 0 or above."""
    for name in names:
        if getattr(method, name) < 0:
            raise InputError(f"method.{name} = {getattr(method, name)} must be 0 or above")
