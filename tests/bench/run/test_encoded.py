"""Encoded data: the same bits with and without the cache, on any number of processes, however the
cache's folder is."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from bench.config.sections import DatasetConfig, ModelConfig
from bench.data import cache
from bench.data.texts import load_dataset
from bench.models.tokens import encode
from bench.run import encoded, host
from bench.run.encoded import EncodedSet, load_encoded
from bench.sealed import seal
from fedara_core.comm.base import Communicator
from fedara_core.errors import InputError
from fedara_core.train import Encoded
from support.launch import CLI, ROOT, TINY, Launched, digests_in, launch
from support.refused import write_data

pytestmark = pytest.mark.xdist_group("jobs")

TOY = ModelConfig(name="toy", max_length=16)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.FOLDER_KEY, str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(dataset: str, model: ModelConfig = TOY) -> EncodedSet:
    """As a job does that has read nothing yet."""
    return load_encoded(DatasetConfig(name=dataset), model, Communicator())


def same(one: Encoded, other: Encoded) -> bool:
    parts = ("input_ids", "lengths", "labels")
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in parts)


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: DatasetConfig) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(encoded, "load_dataset", refuse)


@pytest.mark.parametrize("name", ["toy", "docstrings", "file"])
def test_an_entry_holds_what_encoding_gives(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write_data(tmp_path).partition("=")[2] if name == "file" else name
    texts = load_dataset(DatasetConfig(name=name))
    train = encode(TOY, texts.train_texts, texts.train_labels)
    test = encode(TOY, texts.test_texts, texts.test_labels)
    first = load(name)
    forbid_reading(monkeypatch)
    second = load(name)
    for found in (first, second):
        assert same(found.train, train)
        assert same(found.test, test)
        assert (found.labels, found.digest) == (texts.labels, texts.digest)
        assert found.summary == texts.summary()
    assert len(cache.entries()) == 1


def test_points_of_a_sweep_share_what_is_in_memory(place: Path) -> None:
    communicator, dataset = Communicator(), DatasetConfig(name="toy")
    first = load_encoded(dataset, TOY, communicator)
    cache.clear()
    assert load_encoded(dataset, TOY, communicator) is first


def test_other_contents_have_another_entry(place: Path, tmp_path: Path) -> None:
    name = write_data(tmp_path).partition("=")[2]
    first = load(name)
    load(name, ModelConfig(name="toy", max_length=8))
    assert len(cache.entries()) == 2
    text = (tmp_path / "test.jsonl").read_text()
    (tmp_path / "test.jsonl").write_text(text.replace("word3 ", "word4 "))
    assert load(name).digest != first.digest
    assert len(cache.entries()) == 3


def test_data_that_change_while_they_are_read_are_not_kept(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write_data(tmp_path).partition("=")[2]

    def change(config: DatasetConfig) -> object:
        dataset = load_dataset(config)
        (tmp_path / "labels.json").write_text('["b", "a"]')
        return dataset

    monkeypatch.setattr(encoded, "load_dataset", change)
    assert load(name).labels == ("a", "b")
    assert cache.entries() == []


def test_a_damaged_entry_is_made_anew(place: Path) -> None:
    first = load("toy")
    (entry,) = cache.entries()
    whole = entry.path.read_bytes()
    entry.path.write_bytes(whole[:-3] + b"???")
    assert same(load("toy").train, first.train)
    assert cache.entries()[0].num_bytes == len(whole)


def test_warnings_are_told_from_the_cache_too(place: Path, tmp_path: Path) -> None:
    labels = ["a", "b", "None"]
    rows = [f'{{"text": "word{i} word", "label": "{labels[i % 3]}"}}' for i in range(30)]
    files = {"train_jsonl": "\n".join(rows), "test_jsonl": "\n".join(rows), "labels_json": ""}
    name = write_data(tmp_path, **files).partition("=")[2]
    (tmp_path / "labels.json").unlink()
    told = []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load(name)
        told.append([str(warning.message) for warning in caught])
    assert len(cache.entries()) == 1
    assert told[0] == told[1] != []


def test_wrong_data_are_refused_each_time(place: Path, tmp_path: Path) -> None:
    name = write_data(tmp_path, labels_json='["a", "c"]').partition("=")[2]
    for _ in range(2):
        with pytest.raises(InputError, match="label 'b'"):
            load(name)
    assert cache.entries() == []


def test_a_file_of_the_host_is_mapped_and_its_pages_are_own(tmp_path: Path) -> None:
    path = host._written(seal({"name": "x"}, {"x": torch.arange(3)}))
    first, second = host._mapped(path), host._mapped(path)
    assert first
    assert second
    Path(path).unlink()
    first[1]["x"][0] = 7
    assert first[1]["x"].tolist() == [7, 1, 2]
    assert (second[0]["name"], second[1]["x"].tolist()) == ("x", [0, 1, 2])
    assert host._mapped(path) is None


def test_no_room_for_a_file_of_the_host_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    assert host._written(b"data") == ""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Path("/dev/full").open("wb") as full:
        monkeypatch.setattr("os.fdopen", lambda descriptor, mode: full)
        assert host._written(b"data") == ""
    assert list(tmp_path.iterdir()) == []


# ---- whole jobs ----


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The state digests of the run on one process."""
    results = tmp_path_factory.mktemp("one")
    job = launch("plain", 1, *CLI, TINY, "--results", results)
    assert job.code == 0, job.err
    return digests_in(results)


def test_two_jobs_start_together_on_an_empty_cache(
    place: Path, tmp_path: Path, expected: list[str]
) -> None:
    results = [tmp_path / "first", tmp_path / "second"]
    jobs = [Launched("mpi", 2, *CLI, TINY, "--results", folder) for folder in results]
    for job, folder in zip(jobs, results, strict=True):
        finished = job.wait()
        assert finished.code == 0, finished.err
        assert digests_in(folder) == expected
    assert [path.suffix for path in place.iterdir()] == [".safetensors"]


@pytest.mark.parametrize("launcher", ["mpi", "torch"])
def test_a_job_runs_on_without_its_cache_and_temporary_folder(
    launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: list[str]
) -> None:
    """Neither can be written to: no process has what another has made."""
    (tmp_path / "file").touch()
    monkeypatch.setenv(cache.FOLDER_KEY, str(tmp_path / "file" / "cache"))
    code = (
        "import bench.run.host as host; host._written = lambda data: ''\n"
        "from bench.cli import main; main()"
    )
    script = tmp_path / "job.py"
    script.write_text(code)
    job = launch(launcher, 2, script, "run", TINY, "--results", tmp_path / "out")
    assert (job.code, job.refusals) == (0, []), job.err
    assert digests_in(tmp_path / "out") == expected


def test_the_cache_may_go_while_a_job_runs(
    place: Path, tmp_path: Path, expected: list[str]
) -> None:
    code = (
        "import shutil, os, bench.run.rounds as rounds, bench.run.runner as runner\n"
        "def run(*args):\n"
        "    shutil.rmtree(os.environ['FEDARA_CACHE'], ignore_errors=True)\n"
        "    return rounds.run(*args)\n"
        "runner.run = run\n"
        "from bench.cli import main; main()"
    )
    script = tmp_path / "job.py"
    script.write_text(code)
    job = launch("mpi", 2, script, "run", TINY, "--results", tmp_path / "out")
    assert job.code == 0, job.err
    assert not place.exists()
    assert digests_in(tmp_path / "out") == expected


def test_what_one_process_refuses_ends_all_in_one_line(place: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path, labels_json='["a", "c"]')
    job = launch("mpi", 2, *CLI, TINY, "--results", tmp_path / "out", "--set", data)
    assert (job.code, len(job.refusals)) == (2, 1), job.err
    assert "label 'b'" in job.refusals[0]


@pytest.mark.parametrize("model", ["toy", pytest.param("minilm", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["toy", "file"])
def test_a_worker_holds_no_library_of_tables(
    model: str, kind: str, place: Path, tmp_path: Path
) -> None:
    """A set in files needs one where it is read, which is once; the next job does not."""
    data = "dataset.name=toy" if kind == "toy" else write_data(tmp_path)
    words = ["run", str(TINY), "--no-energy", "--set", data, "--set", f"model.name={model}"]
    words += ["--set", "federation.num_rounds=1", "--comm", "serial", "--results"]
    code = (
        "import sys; from bench.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "print(sorted({'datasets', 'matplotlib', 'pandas', 'pyarrow'} & set(sys.modules)))"
    )
    said = []
    for number in range(2):
        job = [sys.executable, "-c", code, *words, str(tmp_path / f"out{number}")]
        done = subprocess.run(job, cwd=ROOT, capture_output=True, text=True, check=True)
        said.append(done.stdout.splitlines()[-1])
    assert said[1] == "[]"
    assert kind == "file" or said[0] == "[]"


@pytest.mark.parametrize("launcher", ["mpi", "torch"])
def test_shared_weights_change_no_bit(launcher: str, tmp_path: Path, expected: list[str]) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import bench.run.frozen as frozen; frozen._LEAST_BYTES = 0\n"
        "from bench.cli import main; main()"
    )
    job = launch(launcher, 3, script, "run", TINY, "--results", tmp_path / "out")
    assert job.code == 0, job.err
    assert digests_in(tmp_path / "out") == expected
