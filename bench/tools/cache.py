"""What `fedara cache` shows and removes."""

from collections.abc import Iterator, Sequence
from datetime import datetime

from bench.data import cache
from fedara_core.errors import InputError


def show(*, clear: bool) -> Iterator[str]:
    """A line for the whole cache and one for each set; with `clear`, what was removed. Raises
    InputError for a folder that can not be read."""
    place = cache.folder()
    if place is None:
        yield f"no cache: this user has no home, and {cache.FOLDER_KEY} is not set"
        return
    try:
        found = cache.clear() if clear else cache.entries()
    except OSError as error:
        raise InputError(
            f"cache folder {place}: {error.strerror}; allowed: a folder that can be read "
            f"({cache.FOLDER_KEY} names another)"
        ) from None
    if clear:
        yield f"{place}: removed {_sizes(found)}"
        return
    yield f"{place}: {_sizes(found)} of at most {_megabytes(cache.MOST_BYTES)}"
    for entry in found:
        facts = entry.facts()
        what = f"{facts['dataset']} for {facts['model']}" if "dataset" in facts else "damaged"
        when = datetime.fromtimestamp(entry.read_time)
        yield f"  {what}: {_megabytes(entry.num_bytes)}, last read {when:%Y-%m-%d %H:%M}"


def _sizes(entries: Sequence[cache.Entry]) -> str:
    number = f"{len(entries)} file" + ("" if len(entries) == 1 else "s")
    return f"{number}, {_megabytes(sum(entry.num_bytes for entry in entries))}"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
