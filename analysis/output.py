"""Files that appear in a folder all together, each of them whole, or not at all."""

import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedara_core.errors import InputError


@contextmanager
def together(out_dir: Path) -> Iterator[Path]:
    """A folder whose files move to `out_dir` at the end of the block, in place of older ones.

    Where one cannot be written, none is moved. Raises InputError.
    """
    is_new = False
    try:
        is_new = not out_dir.exists()
        out_dir.mkdir(parents=True, exist_ok=True)
        _remove_left_over(out_dir)
        with tempfile.TemporaryDirectory(
            prefix=f"{_prefix()}{os.getpid()}-", dir=out_dir
        ) as folder:
            yield Path(folder)
            files = sorted(Path(folder).iterdir())
            _require_no_folder_in_the_way(files, out_dir)
            for file in files:
                file.replace(out_dir / file.name)
    except OSError as error:
        if is_new:
            with suppress(OSError):
                out_dir.rmdir()
        raise InputError(
            f"{out_dir}: cannot be written: {error.strerror or error}; allowed: a folder with "
            "enough room, in which you may write"
        ) from None


def _prefix() -> str:
    return f".report-{socket.gethostname()}-"


def _remove_left_over(out_dir: Path) -> None:
    """Remove the folders of earlier reports of this host that were killed."""
    for folder in out_dir.iterdir():
        started = re.fullmatch(rf"{re.escape(_prefix())}(\d{{1,9}})-\w+", folder.name)
        if started is None:
            continue
        try:
            os.kill(int(started[1]), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except PermissionError:  # it runs, for another user
            pass


def _require_no_folder_in_the_way(files: list[Path], out_dir: Path) -> None:
    for file in files:
        if (out_dir / file.name).is_dir():
            raise InputError(f"{out_dir / file.name}: a folder is in the way; allowed: a file")
