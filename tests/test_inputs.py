"""Whole runs on data and models that were once misread: what they say, record and refuse."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from support.launch import CLI, TINY, fedara_here, launch
from support.models import SIZES, WORDS, write_model, write_tokenizer
from support.refused import refuse_here, sets, write_data

pytestmark = pytest.mark.xdist_group("jobs")

CASES = Path(__file__).parent / "cases"


def test_a_run_says_what_its_data_are(tmp_path: Path) -> None:
    args = sets([f"dataset.name=file:{CASES / 'stray2'}", "federation.num_rounds=1"])
    with pytest.warns(RuntimeWarning, match=r"train.csv: line 12: a quoted cell .* for 31 lines"):
        job = fedara_here("run", TINY, "--results", tmp_path / "results", *args)
    assert job.code == 0
    said = "train 70, test 60 examples, 2 labels (train + test): c0 (34 + 30), c1 (36 + 30)"
    assert said in job.out


def test_labels_that_differ_by_a_zero_are_recorded_as_two(tmp_path: Path) -> None:
    args = sets([f"dataset.name=file:{CASES / 'zeros'}", "federation.num_rounds=1"])
    assert fedara_here("run", TINY, "--results", tmp_path, *args).code == 0
    (run,) = tmp_path.glob("*/run.json")
    assert json.loads(run.read_text())["labels"] == ["01", "1"]


@pytest.mark.slow
def test_of_many_processes_one_warns(tmp_path: Path) -> None:
    args = sets([f"dataset.name=file:{CASES / 'stray2'}", "federation.num_rounds=1"])
    job = launch("mpi", 3, *CLI, TINY, "--results", tmp_path, *args)
    assert job.code == 0, job.err
    assert (job.out + job.err).count("a quoted cell goes on") == 1
    assert job.out.count("train 70, test 60 examples") == 1


def test_a_data_folder_of_240_letters_runs(tmp_path: Path) -> None:
    data = tmp_path / (240 * "d")
    data.mkdir()
    args = sets([write_data(data), "federation.num_rounds=1"])
    assert fedara_here("run", TINY, "--results", tmp_path / "results", *args).code == 0
    assert len(list(tmp_path.glob("results/*/DONE"))) == 1


def test_a_byte_order_mark_in_every_file_is_skipped(tmp_path: Path) -> None:
    data, config = tmp_path / "data", tmp_path / "config.toml"
    data.mkdir()
    args = sets([write_data(data), "federation.num_rounds=1"])
    config.write_text(TINY.read_text(encoding="utf-8"), encoding="utf-8-sig")
    for file in data.iterdir():
        file.write_text(file.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert fedara_here("run", config, "--results", tmp_path / "results", *args).code == 0


# ---- the model ----


def model_of(folder: Path, words: list[str], settings: Any) -> list[str]:
    """Overrides for a model of random weights with a tokeniser of these words."""
    write_model(folder, settings)
    write_tokenizer(folder, words)
    return sets([f"model.name={folder}", f"dataset.name=file:{CASES / 'covid'}"])


def test_tokens_beyond_the_embedding_are_refused(tmp_path: Path) -> None:
    words = [*WORDS, *(f"word{i}" for i in range(10, 20)), "covid", "zebra"]
    args = model_of(tmp_path, words, transformers.BertConfig(**SIZES))
    words = ["id 21 ('zebra')", "its embedding has 20 rows", "ids up to 19"]
    refuse_here(TINY, tmp_path / "results", words, "--set", "model.max_length=16", *args)


def test_a_model_without_a_tokeniser_is_refused(tmp_path: Path) -> None:
    args = model_of(tmp_path, WORDS, transformers.BertConfig(**SIZES))
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    words = ["its tokeniser's files are missing", "allowed: a model with vocab.txt"]
    refuse_here(TINY, tmp_path / "results", words, "--set", "model.max_length=16", *args)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    args = model_of(tmp_path, WORDS, transformers.T5Config(vocab_size=20, **sizes))
    words = ["is an encoder-decoder (t5)", "allowed: an encoder such as BERT"]
    refuse_here(TINY, tmp_path / "results", words, *args)
