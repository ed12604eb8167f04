"""The one error type that means "the user can fix this"."""


class InputError(ValueError):
    """A wrong setting, file or data value; its text is one line: the value and what is allowed.

    The command line prints it without a traceback and exits with code 2 on every process.
    """


class Diverged(InputError):
    """Training left the finite numbers; raised on every process at the same place."""
