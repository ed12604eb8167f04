"""Ask another program, but not for ever; and how this suite starts itself."""

import shutil
import subprocess
import sys
from pathlib import Path

from fedara_core.errors import InputError

SECONDS = 10.0  # for an answer
NO_ANSWER, MISSING = 124, 127  # exit codes, as a shell and timeout(1) have them


def ask(*words: str, seconds: float = SECONDS) -> subprocess.CompletedProcess[str]:
    """What a program answers. One that is missing or gives no answer in time fails with a text."""
    try:
        return subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        code, text = NO_ANSWER, f"no answer in {seconds:g} s"
    except OSError as error:
        code, text = MISSING, str(error.strerror)
    return subprocess.CompletedProcess(words, code, "", f"{words[0]}: {text}")


def own_command(python: str = sys.executable) -> list[str]:
    """The words that start this very suite: in any folder, whatever programs and packages named
    `fedara`, `bench` or `analysis` lie there or on PATH."""
    return [python, "-P", str(Path(__file__).with_name("__main__.py"))]


def beside(python: str, name: str) -> str:
    """A program from the folder of this Python, else from PATH. Raises InputError."""
    found = shutil.which(name, path=str(Path(python).parent)) or shutil.which(name)
    if found is None:
        raise InputError(f"{name} is neither beside {python} nor on PATH")
    return found
