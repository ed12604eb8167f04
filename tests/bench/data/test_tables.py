"""Sets in files and on the hub, and each way in which one can be wrong."""

import json
from pathlib import Path
from typing import Any

import datasets as hub
import numpy as np
import pandas as pd
import pytest

from bench.config.sections import DatasetConfig
from bench.data.texts import load_dataset
from fedara_core.errors import InputError

SHARED_DATA = Path(__file__).resolve().parents[4] / "shared" / "data"


def write_set(folder: Path, train: Any, test: Any, labels: Any = None) -> DatasetConfig:
    """A file set with columns text and label; train and test are lists of (text, label)."""
    for name, rows in (("train", train), ("test", test)):
        pd.DataFrame(rows, columns=["text", "label"]).to_parquet(folder / f"{name}.parquet")
    if labels is not None:
        (folder / "labels.json").write_text(json.dumps(labels), encoding="utf-8")
    return DatasetConfig(name=f"file:{folder}")


def refused(config: DatasetConfig) -> str:
    """The text of the InputError that loading raises: one line that says what is allowed."""
    with pytest.raises(InputError) as caught:
        load_dataset(config)
    message = str(caught.value)
    assert "\n" not in message
    assert "allowed" in message
    return message


# ---- file:DIR ----


def test_file_set_with_integer_labels(tmp_path: Path) -> None:
    config = write_set(tmp_path, [("a b", 1), ("c d", 0)], [("e f", 1)], ["no", "yes"])
    dataset = load_dataset(config)
    assert dataset.labels == ("no", "yes")
    assert dataset.train_texts == ["a b", "c d"]
    assert dataset.train_labels.tolist() == [1, 0]
    assert dataset.test_labels.tolist() == [1]
    assert dataset.test_labels.dtype == np.int64


def test_file_set_with_named_labels(tmp_path: Path) -> None:
    rows = [("a", "yes"), ("b", "no")]
    assert load_dataset(
        write_set(tmp_path, rows, rows, {"labels": ["yes", "no"]})
    ).train_labels.tolist() == [0, 1]
    (tmp_path / "labels.json").unlink()
    dataset = load_dataset(DatasetConfig(name=f"file:{tmp_path}"))
    assert dataset.labels == ("no", "yes")
    assert dataset.train_labels.tolist() == [1, 0]


def test_file_set_with_integer_labels_and_no_names(tmp_path: Path) -> None:
    dataset = load_dataset(write_set(tmp_path, [("a", 10), ("b", 2)], [("c", 10)]))
    assert dataset.labels == ("2", "10")
    assert dataset.test_labels.tolist() == [1]


def test_all_suffixes_give_the_same_set(tmp_path: Path) -> None:
    # Texts that readers like to turn into something else: nulls, numbers, dates, line ends.
    texts = ["NA", "12", "2020-01-01", 'say "hi",\nthen go', "null", "caf\u00e9 \u2028 end"]
    frame = pd.DataFrame({"body": texts, "kind": [0, 1, 0, 1, 0, 1]})
    digests = set()
    for suffix in ("parquet", "csv", "jsonl"):
        folder = tmp_path / suffix
        folder.mkdir()
        for split in ("train", "test"):
            path = folder / f"{split}.{suffix}"
            if suffix == "parquet":
                frame.to_parquet(path)
            elif suffix == "csv":
                frame.to_csv(path, index=False)
            else:
                frame.to_json(path, orient="records", lines=True, force_ascii=False)
        config = DatasetConfig(name=f"file:{folder}", text_column="body", label_column="kind")
        dataset = load_dataset(config)
        assert dataset.train_texts == texts
        digests.add(dataset.digest)
    assert len(digests) == 1


def test_relative_and_home_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    write_set(tmp_path / "set", [("a", "x")], [("b", "x")])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    digest = load_dataset(DatasetConfig(name="file:set")).digest
    assert load_dataset(DatasetConfig(name="file:~/set")).digest == digest


def test_missing_folder(tmp_path: Path) -> None:
    assert f"no folder '{tmp_path}/none'" in refused(DatasetConfig(name=f"file:{tmp_path}/none"))
    assert "no folder ''" in refused(DatasetConfig(name="file:"))


def test_missing_split_file(tmp_path: Path) -> None:
    config = write_set(tmp_path, [("a", "x")], [("b", "x")])
    (tmp_path / "test.parquet").unlink()
    assert "none of test.parquet, test.csv, test.jsonl" in refused(config)


def test_two_files_of_one_split(tmp_path: Path) -> None:
    config = write_set(tmp_path, [("a", "x")], [("b", "x")])
    (tmp_path / "train.csv").write_text("text,label\na,x\n", encoding="utf-8")
    assert "several train files (train.parquet, train.csv)" in refused(config)


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        ("parquet", b"PAR1 this is no parquet file"),
        ("parquet", b""),
        ("csv", b"text,label\na,x,more\n"),
        ("csv", b"text,label\na,x\nb,x,more\n"),
        ("csv", b"text,label\n\xff\xfe,x\n"),
        ("csv", b""),
        ("jsonl", b'{"text": "a", "label": '),
        ("jsonl", b'["a", "x"]\n'),
    ],
)
def test_corrupt_file(tmp_path: Path, suffix: str, content: bytes) -> None:
    config = write_set(tmp_path, [("a", "x")], [("b", "x")])
    (tmp_path / "test.parquet").unlink()
    (tmp_path / f"test.{suffix}").write_bytes(content)
    message = refused(config)
    assert f"{tmp_path / 'test'}.{suffix}: cannot be read" in message
    assert f"a valid .{suffix} file" in message


def test_missing_columns(tmp_path: Path) -> None:
    config = write_set(tmp_path, [("a", "x")], [("b", "x")])
    message = refused(config.model_copy(update={"text_column": "body"}))
    assert "dataset.text_column = 'body'" in message
    assert "allowed: text, label" in message
    message = refused(config.model_copy(update={"label_column": "kind"}))
    assert "dataset.label_column = 'kind'" in message
    assert "train.parquet" in message


@pytest.mark.parametrize(("label", "shown"), [("maybe", "'maybe'"), (2, "2"), (-1, "-1")])
def test_label_outside_labels_json(tmp_path: Path, label: int | str, shown: str) -> None:
    good = "no" if isinstance(label, str) else 0
    rows = [("a", good), ("b", good), ("c", label)]
    message = refused(write_set(tmp_path, [("a", good)], rows, ["no", "yes"]))
    assert f"test.parquet: row 2: label {shown} is not known" in message
    assert "allowed: no, yes" in message


def test_test_label_that_train_does_not_have(tmp_path: Path) -> None:
    message = refused(write_set(tmp_path, [("a", "x")], [("b", "y")]))
    assert "test.parquet: row 0: label 'y' is not known; allowed: x" in message


def test_label_of_another_type(tmp_path: Path) -> None:
    message = refused(write_set(tmp_path, [("a", 0.5)], [("b", 0.5)]))
    assert "row 0: label = 0.5; allowed: an integer or a string" in message


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_empty_split(tmp_path: Path, suffix: str) -> None:
    config = write_set(tmp_path, [("a", "x")], [])
    if suffix != "parquet":
        (tmp_path / "test.parquet").unlink()
        header = "text,label\n" if suffix == "csv" else ""
        (tmp_path / f"test.{suffix}").write_text(header, encoding="utf-8")
    assert f"test.{suffix}: no rows; allowed: at least one" in refused(config)


def test_null_text_and_null_label(tmp_path: Path) -> None:
    message = refused(write_set(tmp_path, [("a", "x"), (None, "x")], [("b", "x")]))
    assert "train.parquet: row 1: text is null" in message
    message = refused(write_set(tmp_path, [("a", 0)], [("b", 0), ("c", None)], ["x"]))
    assert "test.parquet: row 1: label is null" in message


def test_empty_csv_cell_and_missing_json_key_are_null(tmp_path: Path) -> None:
    for suffix, content in (
        ("csv", "text,label\na,0\n,0\n"),
        ("jsonl", '{"text": "a", "label": 0}\n{"label": 0}\n'),
    ):
        folder = tmp_path / suffix
        folder.mkdir()
        for split in ("train", "test"):
            (folder / f"{split}.{suffix}").write_text(content, encoding="utf-8")
        message = refused(DatasetConfig(name=f"file:{folder}"))
        assert f"train.{suffix}: row 1: text is null" in message


def test_text_that_is_no_string(tmp_path: Path) -> None:
    message = refused(write_set(tmp_path, [(7, "x")], [(8, "x")]))
    assert "row 0: text = 7; allowed: a string" in message


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "cannot be read"),
        ('{"names": ["x"]}', "holds no list of names"),
        ("[0, 1]", "holds no list of names"),
        ("[]", "holds no list of names"),
        ('["x", "y", "x"]', "'x' occurs more than once"),
    ],
)
def test_bad_labels_json(tmp_path: Path, content: str, problem: str) -> None:
    config = write_set(tmp_path, [("a", "x")], [("b", "x")])
    (tmp_path / "labels.json").write_text(content, encoding="utf-8")
    message = refused(config)
    assert "labels.json" in message
    assert problem in message


def test_trec6_from_the_shared_folder() -> None:
    if not (SHARED_DATA / "trec6").is_dir():
        pytest.skip("no shared/data/trec6 next to the repository")
    dataset = load_dataset(DatasetConfig(name=f"file:{SHARED_DATA / 'trec6'}"))
    assert dataset.labels == ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")
    assert (len(dataset.train_texts), len(dataset.test_texts)) == (5452, 500)
    assert np.bincount(dataset.train_labels).tolist() == [86, 1250, 1162, 1223, 835, 896]


# ---- Hugging Face sets ----


def hub_split(texts: list[str], ids: list[int]) -> hub.Dataset:
    features = hub.Features(text=hub.Value("string"), label=hub.ClassLabel(names=["neg", "pos"]))
    return hub.Dataset.from_dict({"text": texts, "label": ids}, features=features)


def fake_hub(monkeypatch: pytest.MonkeyPatch, **splits: hub.Dataset) -> list[tuple[Any, ...]]:
    """Replace the download by these splits; returns the list of calls."""
    calls: list[tuple[Any, ...]] = []

    def fake(*arguments: Any, **options: Any) -> hub.DatasetDict:
        calls.append((*arguments, options))
        return hub.DatasetDict(splits)

    monkeypatch.setattr(hub, "load_dataset", fake)
    return calls


def test_hub_set_with_class_names(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = hub_split(["good", "bad"], [1, 0]), hub_split(["fine"], [1])
    calls = fake_hub(monkeypatch, train=train, test=test)
    dataset = load_dataset(DatasetConfig(name="owner/set"))
    assert calls == [("owner/set", None, {})]
    assert dataset.labels == ("neg", "pos")
    assert dataset.train_labels.tolist() == [1, 0]
    assert dataset.test_texts == ["fine"]


def test_hub_set_whose_test_split_has_no_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_hub(
        monkeypatch,
        train=hub_split(["good", "bad"], [1, 0]),
        validation=hub_split(["so so"], [0]),
        test=hub_split(["hidden"], [-1]),
    )
    dataset = load_dataset(DatasetConfig(name="glue:sst2"))
    assert calls == [("glue", "sst2", {})]
    assert dataset.test_texts == ["so so"]


def test_hub_set_with_string_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    train = hub.Dataset.from_dict({"text": ["a", "b"], "label": ["x", "w"]})
    fake_hub(monkeypatch, train=train, test=train)
    assert load_dataset(DatasetConfig(name="owner/set")).labels == ("w", "x")


def test_hub_set_without_the_splits_or_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = hub_split(["a"], [0])
    fake_hub(monkeypatch, test=rows)
    assert "no train split among test" in refused(DatasetConfig(name="owner/set"))
    fake_hub(monkeypatch, train=rows, test=hub_split(["a"], [-1]))
    message = refused(DatasetConfig(name="owner/set"))
    assert "no test or validation split with labels among train, test" in message
    fake_hub(monkeypatch, train=rows, test=rows)
    message = refused(DatasetConfig(name="owner/set", text_column="sentence"))
    assert "'sentence' is not in owner/set train; allowed: text, label" in message


def test_name_that_can_not_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: Any, **options: Any) -> hub.DatasetDict:
        raise ConnectionError("Couldn't reach the Hub\n(no network)")

    monkeypatch.setattr(hub, "load_dataset", unreachable)
    message = refused(DatasetConfig(name="docstring"))
    assert "dataset.name = 'docstring' cannot be fetched" in message
    assert "docstrings, toy, file:DIR, or a Hugging Face name" in message
