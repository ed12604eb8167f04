"""What is made of data once and read by later jobs: sealed files in one folder, one for each key.

The folder is FEDARA_CACHE, else fedara in the user's cache directory (XDG_CACHE_HOME, ~/.cache).
A file is written beside its place and renamed: jobs may start together, and the last one's stays.
It is only ever read whole, with its checksum, so it may vanish at any time. Where the folder can
not be written to, or the disk is full, nothing is kept.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bench.sealed import Damaged, metadata, unseal

FOLDER_KEY = "FEDARA_CACHE"
MOST_BYTES = 4 << 30  # of all files; those that were not read for longest are removed
_MOST_HEADER_BYTES = 100_000_000  # safetensors' own limit
_SUFFIX, _PART = ".safetensors", ".part"
_PART_SECONDS = 24 * 3600  # a part that is older was left by a job that was killed


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file of the cache. read_time: when it was last read, in seconds since 1970."""

    path: Path
    num_bytes: int
    read_time: float

    def facts(self) -> dict[str, str]:
        """Its metadata; empty for a damaged file."""
        with suppress(OSError, ValueError, RecursionError), self.path.open("rb") as file:
            size = file.read(8)
            length = int.from_bytes(size, "little")
            return metadata(size + file.read(min(length, _MOST_HEADER_BYTES)))
        return {}


def folder() -> Path | None:
    """Where the files lie; None for a user without a home."""
    with suppress(RuntimeError):  # from expanduser
        if chosen := os.environ.get(FOLDER_KEY):
            return Path(chosen).expanduser().absolute()
        home = Path(os.environ.get("XDG_CACHE_HOME", ""))  # relative ones do not count, by XDG
        return (home if home.is_absolute() else Path("~/.cache").expanduser()) / "fedara"
    return None


def read(key: str) -> bytes | None:
    """A file's bytes, which are whole; None where there is none. A damaged one is removed."""
    place = folder()
    if place is None:
        return None
    path = place / f"{key}{_SUFFIX}"
    try:
        data = path.read_bytes()
        unseal(data)
    except OSError:
        return None
    except Damaged:
        _remove(path)
        return None
    with suppress(OSError):
        os.utime(path)
    return data


def write(key: str, data: bytes) -> None:
    """Keep the bytes of a sealed file, if there is a place for them; older files make room."""
    place = folder()
    if place is None or len(data) > MOST_BYTES:
        return
    part = None
    try:
        place.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f"{key}.", suffix=_PART, dir=place)
        part = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(place / f"{key}{_SUFFIX}")
        _make_room()
    except OSError:
        if part is not None:
            _remove(part)


def entries() -> list[Entry]:
    """The whole files, those first that were read last. Raises OSError."""
    found = [entry for entry in _files() if entry.path.suffix == _SUFFIX]
    return sorted(found, key=lambda entry: -entry.read_time)


def clear() -> list[Entry]:
    """Remove all files, and parts of files; what was removed. Raises OSError."""
    return [entry for entry in list(_files()) if _remove(entry.path)]


def _make_room() -> None:
    """Remove what is beyond MOST_BYTES, and parts that nobody writes any more."""
    total = 0
    for entry in entries():
        total += entry.num_bytes
        if total > MOST_BYTES:
            _remove(entry.path)
    for entry in _files():
        if entry.path.suffix == _PART and time.time() - entry.read_time > _PART_SECONDS:
            _remove(entry.path)


def _files() -> Iterator[Entry]:
    """The folder's files that this module has written. Raises OSError."""
    place = folder()
    if place is None or not place.exists():
        return
    for path in place.iterdir():
        if path.suffix in (_SUFFIX, _PART):
            with suppress(FileNotFoundError):  # another job has removed it
                status = path.stat()
                yield Entry(path=path, num_bytes=status.st_size, read_time=status.st_mtime)


def _remove(path: Path) -> bool:
    with suppress(OSError):
        path.unlink()
        return True
    return False
