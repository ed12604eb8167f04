"""Checkpoints: the same bits back, or a clear no; never another run's, never a damaged one."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save
from torch import Tensor

from bench.run.checkpoint import (
    FILE,
    PREVIOUS,
    Found,
    find_checkpoint,
    restore,
    save_checkpoint,
    write_atomically,
)
from bench.run.record import append_row
from fedara_core.adapters import AdapterSpec, LowRank
from fedara_core.errors import InputError
from fedara_core.state import ServerState, with_parts
from fedara_core.values import EMPTY
from support.launch import TINY, Finished, digests_in, fedara_here, launch, rounds_of
from support.models import SIZES, write_model
from support.refused import sets

pytestmark = pytest.mark.xdist_group("jobs")

OWN = {"config": {"train": {"lr": 0.1}, "seed": 0}, "dataset_digest": "ab"}
CONFIG = (
    *("run", TINY, "--set", "federation.num_rounds=4", "--set", "train.local_steps=1"),
    *("--set", "method.name=full"),  # its checkpoints are far larger than its records
)


def state(round_index: int, fill: float = 1.0, num_live: int = 1) -> ServerState:
    adapter = AdapterSpec(
        lora_rank=2, lora_alpha=2.0, client_lora_ranks=(2, 2), shapes={"layer": (3, 4)}
    )
    empty = ServerState(
        adapter=adapter,
        seed=0,
        num_rounds=5,
        vector=torch.zeros(0),
        index=EMPTY,
        rank_masks={"layer": torch.tensor([i < num_live for i in range(2)])},
        fixed={"delta": {"layer": torch.full((3, 4), fill)}},
        extra={"history": torch.tensor([round_index])},
        last_round=torch.tensor([-1, round_index - 1]),
        round_index=round_index,
    )
    parts = {
        "A": {"layer": torch.full((num_live, 4), fill)},
        "B": {"layer": torch.full((num_live, 3), fill)},
    }
    whole = {"head.weight": torch.arange(6.0).reshape(2, 3)}
    return with_parts(empty, LowRank(scale=1.0, frozen=("A",)), parts, whole)


def test_write_atomically_leaves_no_part(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (tmp_path / "file.part").write_bytes(b"what a killed process left, and longer")
    for data in (b"old", b"new"):
        write_atomically(path, data)
        assert path.read_bytes() == data
        assert list(tmp_path.iterdir()) == [path]


def test_write_atomically_keeps_the_old_file_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    seen = []

    def look(descriptor: int) -> None:
        seen.append((path.read_bytes(), path.with_name("file.part").read_bytes()))

    monkeypatch.setattr("os.fsync", look)
    write_atomically(path, b"new")
    assert seen == [(b"old", b"new")]
    assert path.read_bytes() == b"new"


def test_a_checkpoint_gives_back_the_same_bits(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, state(1), {}, OWN)
    save_checkpoint(tmp_path, state(3, fill=0.1), {7: {"layer": torch.ones(2, 3)}}, OWN)
    assert {path.name for path in tmp_path.iterdir()} == {FILE, PREVIOUS}
    before = state(0, num_live=2)  # since then a triplet has died
    found, kept = restore(before, newest(tmp_path).data, OWN)
    assert found.round_index == 3
    assert found.index == state(3).index != before.index
    assert list(kept) == [7]
    assert torch.equal(kept[7]["layer"], torch.ones(2, 3))
    assert found.digest() == state(3, fill=0.1).digest() != state(0).digest()


def newest(run_dir: Path) -> Found:
    found = find_checkpoint(run_dir)
    assert found is not None
    return found


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with the checkpoints after rounds 1 and 2."""
    for round_index in (1, 2):
        save_checkpoint(tmp_path, state(round_index), {3: {"layer": torch.ones(2)}}, OWN)
    return tmp_path


def test_of_a_truncated_checkpoint_the_previous_one_is_used(two: Path) -> None:
    whole = (two / FILE).read_bytes()
    for length in (0, 1, 7, 8, 20, len(whole) // 2, len(whole) - 1):
        (two / FILE).write_bytes(whole[:length])
        check_previous(two)


def test_every_flipped_bit_is_found(two: Path) -> None:
    whole = (two / FILE).read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        (two / FILE).write_bytes(flipped)
        check_previous(two)


def check_previous(two: Path) -> None:
    found = newest(two)
    assert found.data == (two / PREVIOUS).read_bytes()
    assert found.notice.startswith(f"{FILE} is damaged (")
    assert restore(state(0), found.data, OWN)[0].digest() == state(1).digest()


def test_two_damaged_checkpoints_are_both_named(two: Path) -> None:
    for name in (FILE, PREVIOUS):
        (two / name).write_bytes(b"x")
    with pytest.raises(InputError, match=rf"{FILE} is damaged .*{PREVIOUS} is damaged .*allowed"):
        find_checkpoint(two)


def test_a_job_that_dies_between_the_two_renames_loses_nothing(two: Path) -> None:
    (two / FILE).replace(two / PREVIOUS)
    found = newest(two)
    assert (found.notice, restore(state(0), found.data, OWN)[0].round_index) == ("", 2)


def test_another_runs_checkpoint_is_refused_with_what_differs(two: Path) -> None:
    other = {"config": {"train": {"lr": 0.2}, "seed": 0}, "dataset_digest": "cd"}
    with pytest.raises(InputError) as refused:
        restore(state(0), newest(two).data, other)
    said = str(refused.value)
    assert "config.train.lr is 0.1 there and 0.2 here" in said
    assert 'dataset_digest is "ab" there and "cd" here' in said
    assert "seed" not in said


@pytest.mark.parametrize("metadata", [None, {"round_index": "1"}])
def test_an_older_version_s_checkpoint_is_refused(
    metadata: dict[str, str] | None, tmp_path: Path
) -> None:
    tensors: dict[str, Tensor] = {"rows/layer": torch.ones(2)}
    (tmp_path / FILE).write_bytes(save(tensors, metadata=metadata))
    with pytest.raises(InputError, match="has format None; allowed: 2"):
        find_checkpoint(tmp_path)


def test_a_write_that_fails_leaves_both_as_they_were(
    two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in two.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(two, state(3), {}, OWN)
    assert {path.name: path.read_bytes() for path in two.iterdir()} == before


# ---- whole runs ----


def run_here(results: Path, *more: str) -> Finished:
    return fedara_here(*CONFIG, *more, "--results", results)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a run that nothing has disturbed."""
    results = tmp_path_factory.mktemp("whole")
    assert run_here(results).code == 0
    return results


def not_done(results: Path) -> Path:
    """Make the finished run one that ended after its last round, before DONE; its folder."""
    (run_dir,) = results.glob("toy-*")
    (run_dir / "DONE").unlink()
    return run_dir


def test_a_run_goes_on_from_the_previous_checkpoint_and_says_so(
    whole: Path, tmp_path: Path
) -> None:
    assert run_here(tmp_path).code == 0
    run_dir = not_done(tmp_path)
    data = bytearray((run_dir / FILE).read_bytes())
    data[-1] ^= 1
    (run_dir / FILE).write_bytes(data)
    again = run_here(tmp_path)
    assert again.code == 0
    assert f"{FILE} is damaged (its checksum is not that of its contents)" in again.out
    assert "resuming from the one before, after round 3" in again.out
    assert digests_in(tmp_path) == digests_in(whole)


def test_rounds_after_the_last_checkpoint_run_again(whole: Path, tmp_path: Path) -> None:
    every = ("--set", "system.checkpoint_every=3")
    assert run_here(tmp_path, *every).code == 0
    run_dir = not_done(tmp_path)
    (run_dir / FILE).unlink()  # the end's; the one before it is round 3's
    again = run_here(tmp_path, *every)
    assert again.code == 0
    assert "round 4/4" in again.out
    assert "round 3/4" not in again.out
    assert digests_in(tmp_path) == digests_in(whole)


def test_dropout_of_a_model_from_a_folder_is_the_same_after_a_resume(tmp_path: Path) -> None:
    """transformers hands models over with their dropout off."""
    settings = transformers.BertConfig(**SIZES, hidden_dropout_prob=0.5)
    write_model(tmp_path / "model", settings, pad_token="!")
    here = ("run", TINY, "--results", tmp_path / "out")
    model = f"model.name={tmp_path / 'model'}"
    shown = sets([model, "federation.num_rounds=3", "system.checkpoint_every=2"])
    assert fedara_here(*here, *shown).code == 0
    (run_dir,) = (tmp_path / "out").iterdir()
    whole = rounds_of(run_dir)
    (run_dir / "DONE").unlink()
    (run_dir / FILE).unlink()
    assert "round 2/3" not in fedara_here(*here, *shown).out
    for row, wanted in zip(rounds_of(run_dir), whole, strict=True):
        for key in ("train_loss", "state_digest"):
            assert row[key] == wanted[key]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, whose size `resize` sets."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def resize(disk: Path, num_bytes: int) -> None:
    options = f"remount,size={num_bytes}"
    subprocess.run(["mount", "-o", options, str(disk)], check=True)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_costs_one_line_and_no_round(
    world_size: int, whole: Path, small_disk: Path
) -> None:
    """Room for two checkpoints and a half: the third round's, beside those, is too much."""
    (run_dir,) = whole.glob("toy-*")
    resize(small_disk, int(2.5 * os.path.getsize(run_dir / FILE)) + 50_000)
    if world_size == 1:
        job = run_here(small_disk)
    else:
        job = launch("mpi", world_size, "-m", "bench", *CONFIG, "--results", small_disk)
    assert job.code != 0
    (line,) = job.refusals
    assert "No space left on device; rounds 1 to 2 are on disk; make room there" in line
    assert "Traceback" not in job.err
    assert digests_in(small_disk)[:2] == digests_in(whole)[:2]
    resize(small_disk, 50_000_000)
    assert run_here(small_disk).code == 0
    assert digests_in(small_disk) == digests_in(whole)


def test_a_record_that_is_cut_off_by_a_full_disk_costs_one_line_and_no_round(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, row: dict[str, Any]) -> None:
        if row["round_index"] == 2:
            with path.open("a") as file:
                file.write('{"round_index": 2, "train_l')
            raise OSError(errno.ENOSPC, "No space left on device")
        append_row(path, row)

    monkeypatch.setattr("bench.run.record.append_row", full)
    job = run_here(tmp_path)
    assert job.code == 1
    (line,) = job.refusals
    assert "No space left on device; rounds 1 to 2 are on disk" in line
    monkeypatch.undo()
    assert run_here(tmp_path).code == 0
    assert digests_in(tmp_path) == digests_in(whole)
