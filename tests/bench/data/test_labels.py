"""What the values of a label column mean: text, names, indices; and what is told of them."""

import json
import warnings
from pathlib import Path
from typing import Any

import datasets as hub
import pandas as pd
import pytest

from bench.config.sections import DatasetConfig
from bench.data.labels import names_in
from bench.data.texts import TextDataset, load_dataset
from fedara_core.errors import InputError

CASES = Path(__file__).parents[2] / "cases"


def write_csv(folder: Path, train: list[str], test: list[str], names: Any = None) -> DatasetConfig:
    """A set of CSV files with these cells in the label column."""
    for split, labels in (("train", train), ("test", test)):
        rows = "".join(f"text {row},{label}\n" for row, label in enumerate(labels))
        (folder / f"{split}.csv").write_text(f"text,label\n{rows}", encoding="utf-8")
    return with_names(folder, names)


def write_jsonl(folder: Path, train: list[Any], test: list[Any], names: Any = None) -> Any:
    """A set of JSONL files with these labels."""
    for split, labels in (("train", train), ("test", test)):
        rows = [json.dumps({"text": "a", "label": label}) + "\n" for label in labels]
        (folder / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    return with_names(folder, names)


def with_names(folder: Path, names: Any) -> DatasetConfig:
    if names is not None:
        (folder / "labels.json").write_text(json.dumps(names), encoding="utf-8")
    return DatasetConfig(name=f"file:{folder}")


def train_names(dataset: TextDataset) -> list[str]:
    """The name of each train example's label."""
    return [dataset.labels[label_id] for label_id in dataset.train_labels]


def refused(config: DatasetConfig) -> str:
    with pytest.raises(InputError) as caught:
        load_dataset(config)
    message = str(caught.value)
    assert "\n" not in message
    assert "allowed" in message
    return message


def doubts(config: DatasetConfig) -> list[str]:
    """The warnings on loading, each of one line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_dataset(config)
    assert all(item.category is RuntimeWarning for item in caught)
    texts = [str(item.message) for item in caught]
    assert not any("\n" in text for text in texts)
    return texts


# ---- cells of CSV without labels.json ----


def test_01_and_1_are_two_labels() -> None:
    dataset = load_dataset(DatasetConfig(name=f"file:{CASES / 'zeros'}"))
    assert dataset.labels == ("01", "1")
    assert train_names(dataset)[:4] == ["01", "1", "01", "1"]


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        (["10", "9", "-1", "0"], ("-1", "0", "9", "10")),  # integers: by value
        (["10", "9", "x", "a"], ("9", "10", "a", "x")),  # integers first, as it has ever been
        (["007", "10", "9", "7"], ("007", "10", "7", "9")),  # one that is text makes all text
        (["1.0", "1", "1e0"], ("1", "1.0", "1e0")),
        (["-0", "0", "+0"], ("+0", "-0", "0")),
        (["0x1", "True", "true", "\u0661"], ("0x1", "True", "true", "\u0661")),
        (["9" * 5000, "1"], ("1", "9" * 5000)),
    ],
)
def test_cells_that_differ_are_labels_that_differ(
    cells: list[str], labels: tuple[str, ...], tmp_path: Path
) -> None:
    dataset = load_dataset(write_csv(tmp_path, cells, cells[:1]))
    assert dataset.labels == labels
    assert train_names(dataset) == cells


def test_integers_in_csv_are_those_of_a_typed_file(tmp_path: Path) -> None:
    write_csv(tmp_path, ["10", "9"], [])
    (tmp_path / "test.csv").unlink()
    pd.DataFrame({"text": ["a"], "label": [9]}).to_parquet(tmp_path / "test.parquet")
    dataset = load_dataset(DatasetConfig(name=f"file:{tmp_path}"))
    assert dataset.labels == ("9", "10")
    assert dataset.test_labels.tolist() == [0]


# ---- cells of CSV with labels.json ----


@pytest.mark.parametrize("case", ["binary12", "stars"])
def test_cells_that_are_names_are_these_names(case: str) -> None:
    dataset = load_dataset(DatasetConfig(name=f"file:{CASES / case}"))
    cells = pd.read_csv(CASES / case / "train.csv", dtype=str)["label"].tolist()
    assert train_names(dataset) == cells


def test_names_with_zeros_in_front_are_found(tmp_path: Path) -> None:
    dataset = load_dataset(write_csv(tmp_path, ["02", "01"], ["01"], ["01", "02"]))
    assert dataset.train_labels.tolist() == [1, 0]


def test_cells_that_are_no_names_are_indices(tmp_path: Path) -> None:
    dataset = load_dataset(write_csv(tmp_path, ["1", "0"], ["1"], ["no", "yes"]))
    assert dataset.train_labels.tolist() == [1, 0]
    assert dataset.test_labels.tolist() == [1]


def test_both_splits_decide_together(tmp_path: Path) -> None:
    """The test split alone could be indices: 1 and 2 are names only beside the 5 of train."""
    names = ["5", "2", "1"]
    dataset = load_dataset(write_csv(tmp_path, ["5", "2", "1"], ["1", "2"], names))
    assert dataset.test_labels.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("cells", "names", "row", "label"),
    [
        (["1", "2", "0"], ["1", "2", "3"], 2, "0"),  # indices 0 to 2, or a name that is missing
        (["yes", "1"], ["no", "yes"], 1, "1"),
        (["1", "10", "2"], ["1", "2"], 1, "10"),
    ],
)
def test_names_beside_indices_are_refused(
    cells: list[str], names: list[str], row: int, label: str, tmp_path: Path
) -> None:
    message = refused(write_csv(tmp_path, cells, cells[:1], names))
    assert f"train.csv: row {row}: label {label} is no name in labels.json" in message


def test_an_index_with_a_zero_in_front_is_refused(tmp_path: Path) -> None:
    message = refused(write_csv(tmp_path, ["0", "01"], ["0"], ["no", "yes"]))
    assert "row 1: label '01' is not known; allowed: no, yes" in message


# ---- files with types ----


def test_an_integer_column_that_fits_two_readings_is_refused(tmp_path: Path) -> None:
    message = refused(write_jsonl(tmp_path, [1, 2], [1], ["2", "1", "0"]))
    assert "label 2 is the name '2' in labels.json, and as an index it is '0'" in message


def test_an_integer_column_of_names_that_are_no_indices(tmp_path: Path) -> None:
    names = ["1", "2", "3", "4", "5"]
    dataset = load_dataset(write_jsonl(tmp_path, [5, 1], [3], names))
    assert train_names(dataset) == ["5", "1"]


def test_an_integer_column_whose_readings_agree(tmp_path: Path) -> None:
    dataset = load_dataset(write_jsonl(tmp_path, [1, 0], [1], ["0", "1", "2"]))
    assert dataset.train_labels.tolist() == [1, 0]


@pytest.mark.parametrize("labels", [[1, "1"], [True, "True"], [True, 1], [False, 0, 2]])
def test_one_label_in_two_types_is_refused(labels: list[Any], tmp_path: Path) -> None:
    assert "in some rows" in refused(write_jsonl(tmp_path, labels, labels))


def test_truth_values_are_labels_of_their_names(tmp_path: Path) -> None:
    assert load_dataset(write_jsonl(tmp_path, [True, False], [True])).labels == ("False", "True")
    config = write_jsonl(tmp_path, [True, False], [True], ["True", "False"])
    assert "label" in refused(config)
    dataset = load_dataset(write_jsonl(tmp_path, [True, False], [True], ["no", "yes"]))
    assert train_names(dataset) == ["yes", "no"]


def test_class_ids_of_a_hub_set_are_ids_whatever_their_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features = hub.Features(text=hub.Value("string"), label=hub.ClassLabel(names=["1", "0"]))
    rows = hub.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    monkeypatch.setattr(hub, "load_dataset", lambda *_: hub.DatasetDict(train=rows, test=rows))
    assert train_names(load_dataset(DatasetConfig(name="owner/set"))) == ["1", "0"]


# ---- labels.json ----


def test_a_byte_order_mark_before_labels_is_skipped(tmp_path: Path) -> None:
    config = write_csv(tmp_path, ["b", "a"], ["a"])
    (tmp_path / "labels.json").write_text('["b", "a"]', encoding="utf-8-sig")
    assert load_dataset(config).labels == ("b", "a")


def test_half_a_character_in_a_name_is_refused(tmp_path: Path) -> None:
    message = refused(write_csv(tmp_path, ["a"], ["a"], ["a", "b\ud83d"]))
    assert r"labels.json: name 1: 'b\ud83d' holds a lone surrogate" in message


def test_a_folder_for_labels_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.json").mkdir()
    with pytest.raises(InputError, match=r"labels.json: cannot be read: .*Is a directory"):
        names_in(tmp_path / "labels.json")


def test_brackets_without_end_are_refused(tmp_path: Path) -> None:
    config = write_csv(tmp_path, ["a"], ["a"])
    (tmp_path / "labels.json").write_text(100_000 * "[", encoding="utf-8")
    assert "labels.json: cannot be read" in refused(config)


def test_names_in_a_refusal_stay_in_one_line(tmp_path: Path) -> None:
    message = refused(write_jsonl(tmp_path, ["a"], ["z"], ["a\nb", "a", 3000 * "x"]))
    assert len(message) < 600


# ---- what is told at the start ----


def test_summary() -> None:
    dataset = load_dataset(DatasetConfig(name=f"file:{CASES / 'stray2'}"))
    assert dataset.summary() == (
        "train 70, test 60 examples, 2 labels (train + test): c0 (34 + 30), c1 (36 + 30)"
    )


def test_summary_of_many_and_long_names(tmp_path: Path) -> None:
    names = [f"label {index} of a list" + 30 * "." for index in range(20)] + ["", "a\nb"]
    config = write_jsonl(tmp_path, names, names[:3])
    line = load_dataset(config).summary()
    assert line.startswith("train 22, test 3 examples, 22 labels (train + test): '' (1 + 0), ")
    assert line.endswith(", and 14 more")
    assert "\n" not in line
    assert len(line) < 400


def test_a_label_that_means_no_label_is_told_of(tmp_path: Path) -> None:
    config = write_csv(tmp_path, ["0", "-1", "1"], ["-1", "0"])
    assert load_dataset(config).labels == ("-1", "0", "1")
    (text,) = doubts(config)
    assert "label '-1' (1 train, 1 test examples) looks like a missing label" in text


@pytest.mark.parametrize("label", ["nan", "None", "NULL", "n/a", " ", "", "-100"])
def test_other_spellings_of_no_label(label: str, tmp_path: Path) -> None:
    integer = label.startswith("-")
    good = ["0", "1"] if integer else ["a", "b"]
    config = write_jsonl(tmp_path, [*good, label], good)
    (text,) = doubts(config)
    assert f"label {label!r} (1 train, 0 test examples) looks like a missing label" in text


@pytest.mark.parametrize("labels", [["a", "b"], ["-2", "-1", "0"], ["nanny", "nulls"], ["-1", "x"]])
def test_labels_that_are_told_nothing_of(labels: list[str], tmp_path: Path) -> None:
    assert doubts(write_csv(tmp_path, labels, labels)) == []


def test_a_name_without_a_train_example_is_told_of(tmp_path: Path) -> None:
    config = write_csv(tmp_path, ["a", "b"], ["c", "a", "c"], ["a", "b", "c", "d"])
    (text,) = doubts(config)
    assert "no train example has c, which 2 of 3 test examples have" in text


def test_a_label_of_the_test_split_alone_is_refused_as_that(tmp_path: Path) -> None:
    message = refused(write_csv(tmp_path, ["1", "2"], ["3"]))
    assert (
        "test.csv: row 0: label 3 is not known; allowed: 1, 2, which are the labels of" in message
    )


def test_labels_that_differ_in_spaces_are_told_of(tmp_path: Path) -> None:
    (text,) = doubts(write_csv(tmp_path, ["a", " a", "b"], ["a"]))
    assert "labels ' a', 'a' differ only in case or spaces" in text
