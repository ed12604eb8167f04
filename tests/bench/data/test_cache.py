"""The cache on disk: whole files or none, bounded, and silent where it can not be written to."""

import errno
import os
from pathlib import Path

import pytest
import torch

from bench.data import cache
from bench.sealed import seal, unseal
from support.launch import fedara_here


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.FOLDER_KEY, str(tmp_path / "cache"))
    return tmp_path / "cache"


def data(value: int, length: int = 100) -> bytes:
    return seal({"dataset": f"set{value}", "model": "m"}, {"x": torch.full((length,), value)})


def test_what_was_written_is_read(place: Path) -> None:
    assert cache.read("a") is None
    cache.write("a", data(1))
    found = cache.read("a")
    assert found
    facts, tensors = unseal(found)
    assert (facts["dataset"], tensors["x"].tolist()) == ("set1", [1] * 100)
    assert os.listdir(place) == ["a.safetensors"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_a_damaged_file_is_removed(damage: str, place: Path) -> None:
    whole = data(1)
    flipped = whole[:-5] + bytes([whole[-5] ^ 4]) + whole[-4:]
    cases = {"cut": whole[:-50], "flipped": flipped, "empty": b"", "text": b"not tensors at all"}
    cache.write("a", cases[damage])
    assert cache.read("a") is None
    assert os.listdir(place) == []


def test_files_that_were_not_read_for_longest_make_room(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MOST_BYTES", 2 * len(data(0)) + 1)
    for number, key in enumerate("ab"):
        cache.write(key, data(number))
        os.utime(place / f"{key}.safetensors", (number, number))
    assert cache.read("a")  # and so b is older now
    cache.write("c", data(2))
    assert {entry.path.stem for entry in cache.entries()} == {"a", "c"}
    cache.write("large", data(3, 10_000))
    assert {entry.path.stem for entry in cache.entries()} == {"a", "c"}


def test_parts_of_killed_jobs_go_after_a_day(place: Path) -> None:
    place.mkdir()
    for name, age in (("old.part", 90_000), ("new.part", 10)):
        (place / name).touch()
        now = (place / name).stat().st_mtime
        os.utime(place / name, (now - age, now - age))
    (place / "notes.txt").touch()
    cache.write("a", data(1))
    assert sorted(os.listdir(place)) == ["a.safetensors", "new.part", "notes.txt"]
    cache.clear()
    assert os.listdir(place) == ["notes.txt"]


def test_a_full_disk_keeps_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    cache.write("a", data(1))
    assert os.listdir(place) == []
    assert cache.read("a") is None


@pytest.mark.parametrize("kind", ["file", "missing home"])
def test_a_folder_that_can_not_be_made_keeps_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions would not stop root, on whose behalf tests may run."""
    (tmp_path / "file").touch()
    if kind == "file":
        monkeypatch.setenv(cache.FOLDER_KEY, str(tmp_path / "file"))
    else:
        monkeypatch.setenv(cache.FOLDER_KEY, "~nobody-of-this-name/cache")
    cache.write("a", data(1))
    assert cache.read("a") is None
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cache.FOLDER_KEY)
    monkeypatch.setenv("HOME", "/home/someone")
    for xdg, expected in (
        ("/scratch/me", "/scratch/me/fedara"),
        ("relative", "/home/someone/.cache/fedara"),
        ("", "/home/someone/.cache/fedara"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
        assert cache.folder() == Path(expected)
    monkeypatch.setenv(cache.FOLDER_KEY, "/elsewhere")
    assert cache.folder() == Path("/elsewhere")


def test_the_command_lists_and_clears(place: Path) -> None:
    assert "0 files" in fedara_here("cache").out
    cache.write("a", data(1))
    (place / "b.safetensors").write_bytes(b"x" * 2_000_000)
    lines = fedara_here("cache").out.splitlines()
    assert lines[0] == f"{place}: 2 files, 2.0 MB of at most 4295.0 MB"
    assert {line.partition(":")[0].strip() for line in lines[1:]} == {"set1 for m", "damaged"}
    assert fedara_here("cache", "--clear").out == f"{place}: removed 2 files, 2.0 MB\n"
    assert os.listdir(place) == []


def test_the_command_refuses_a_folder_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(cache.FOLDER_KEY, str(tmp_path / "file"))
    said = fedara_here("cache")
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert f"cache folder {tmp_path / 'file'}: Not a directory; allowed:" in said.err
