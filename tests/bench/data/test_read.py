"""One file of a set: stray quotes, byte order marks, half characters, columns that occur twice."""

import json
import warnings
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench.config.sections import DatasetConfig
from bench.data.texts import TextDataset, load_dataset
from fedara_core.errors import InputError

CASES = Path(__file__).parents[2] / "cases"


def load(folder: Path, train: str | bytes, suffix: str = "csv") -> tuple[TextDataset, list[str]]:
    """The set with this train file and a small test file, and the warnings."""
    content = train.encode() if isinstance(train, str) else train
    (folder / f"train.{suffix}").write_bytes(content)
    (folder / "test.csv").write_text("text,label\nsome words,a\n", encoding="utf-8")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = load_dataset(DatasetConfig(name=f"file:{folder}"))
    return dataset, [str(item.message) for item in caught]


def refused(folder: Path, train: str | bytes, suffix: str = "csv") -> str:
    with pytest.raises(InputError) as caught:
        load(folder, train, suffix)
    message = str(caught.value)
    assert "\n" not in message
    assert f"train.{suffix}" in message
    return message


# ---- rows that stray quotes swallow ----


def test_a_cell_with_rows_in_it_is_told_of_by_its_line() -> None:
    with pytest.warns(RuntimeWarning, match=r"train.csv: line 12: a quoted cell .* for 31 lines"):
        dataset = load_dataset(DatasetConfig(name=f"file:{CASES / 'stray2'}"))
    assert len(dataset.train_texts) == 70


@pytest.mark.parametrize("blank", ["", "\n"])
def test_the_line_counts_headers_and_blank_lines(blank: str, tmp_path: Path) -> None:
    rows = [f"words {i},a" for i in range(6)]
    rows[2], rows[4] = '"he said,a', 'and left",a'  # rows 2 to 4 become one
    dataset, texts = load(tmp_path, f"text,label\n{blank}" + "\n".join(rows) + "\n")
    assert len(dataset.train_texts) == 4
    (text,) = texts
    assert f"line {4 + len(blank)}: a quoted cell goes on for 3 lines, where most have 1" in text
    assert "cells like it in this file: 1" in text


def test_a_swallowed_row_is_seen_where_the_label_comes_first(tmp_path: Path) -> None:
    train = 'label,text\na,one\na,"two\na,three"\na,four\n'
    _, (text,) = load(tmp_path, train)
    assert "line 3: a quoted cell goes on for 2 lines" in text


def test_many_lines_without_rows_among_short_texts(tmp_path: Path) -> None:
    long = "\n".join(f"line {i}" for i in range(12))
    _, (text,) = load(tmp_path, f'text,label\none,a\ntwo,a\n"{long}",a\n')
    assert "line 4: a quoted cell goes on for 12 lines" in text


def test_texts_of_several_lines_are_told_nothing_of(tmp_path: Path) -> None:
    rows = "".join(f'"Dear {i},\nhow are you,\nyours, a",a\n' for i in range(5))
    dataset, texts = load(tmp_path, f"text,label\n{rows}short,a\n")
    assert len(dataset.train_texts) == 6
    assert texts == []


def test_a_cell_longer_than_the_csv_module_likes(tmp_path: Path) -> None:
    _, (text,) = load(tmp_path, f'text,label\none,a\n"{200_000 * "x"}\ntwo,a",a\n')
    assert "line 3" in text


# ---- half characters ----


def test_half_a_character_in_a_text_is_refused_by_its_row() -> None:
    with pytest.raises(InputError, match=r"surrogate/train.jsonl: row 7: text = 'rain \\ud83d cl"):
        load_dataset(DatasetConfig(name=f"file:{CASES / 'surrogate'}"))


def test_half_a_character_in_a_label_is_refused_by_its_row(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": "a"}, {"text": "x", "label": "a\udc00"}]
    message = refused(tmp_path, "\n".join(map(json.dumps, rows)), "jsonl")
    assert r"row 1: label = 'a\udc00' holds a lone surrogate" in message


def test_two_halves_are_one_character(tmp_path: Path) -> None:
    dataset, _ = load(tmp_path, r'{"text": "\ud83d\ude00", "label": "a"}', "jsonl")
    assert dataset.train_texts == ["\U0001f600"]


def test_parquet_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    data = pa.array([b"fine", b"\xff\xfe"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 2, data.buffers())
    pq.write_table(pa.table({"text": texts, "label": ["a", "a"]}), tmp_path / "x.parquet")
    assert "cannot be read" in refused(tmp_path, (tmp_path / "x.parquet").read_bytes(), "parquet")


def test_surrogates_written_as_bytes_are_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refused(tmp_path, b"text,label\n\xed\xa0\x80,a\n")


# ---- byte order marks, and columns that occur twice ----


@pytest.mark.parametrize(
    ("suffix", "content"),
    [("csv", "text,label\nx,a\n"), ("jsonl", '{"text": "x", "label": "a"}\n')],
)
def test_a_byte_order_mark_is_skipped(suffix: str, content: str, tmp_path: Path) -> None:
    dataset, _ = load(tmp_path, b"\xef\xbb\xbf" + content.encode(), suffix)
    assert dataset.train_texts == ["x"]


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        ("csv", "text,label,label\nx,a,b\n"),
        ("csv", "text,text,label\nx,y,a\n"),
        ("jsonl", '{"text": "x", "label": "a", "label": "b"}\n'),
    ],
)
def test_a_column_that_occurs_twice_is_refused(suffix: str, content: str, tmp_path: Path) -> None:
    assert "occurs 2 times" in refused(tmp_path, content, suffix)


def test_a_parquet_column_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    columns = [pa.array(["x"]), pa.array(["a"]), pa.array(["b"])]
    table = pa.Table.from_arrays(columns, names=["text", "label", "label"])
    pq.write_table(table, tmp_path / "x.parquet")
    assert "label" in refused(tmp_path, (tmp_path / "x.parquet").read_bytes(), "parquet")


def test_other_columns_may_occur_twice(tmp_path: Path) -> None:
    dataset, _ = load(tmp_path, "text,label,x,x\nwords,a,1,2\n")
    assert dataset.train_texts == ["words"]


@pytest.mark.parametrize("label", ["NaN", "0.5", "1e400", "[1]", '{"a": 1}', "null"])
def test_json_labels_that_are_none(label: str, tmp_path: Path) -> None:
    message = refused(tmp_path, f'{{"text": "x", "label": {label}}}\n', "jsonl")
    assert "row 0: label" in message


@pytest.mark.parametrize("value", [5000 * "9", 100_000 * "["])
def test_json_that_no_reader_takes(value: str, tmp_path: Path) -> None:
    assert "cannot be read" in refused(tmp_path, f'{{"text": "x", "label": {value}}}\n', "jsonl")


@pytest.mark.parametrize("values", [[b"a"], [1.0], [pd.Timestamp("2020-01-01")]])
def test_parquet_labels_of_other_types(values: list[object], tmp_path: Path) -> None:
    pd.DataFrame({"text": ["x"], "label": values}).to_parquet(tmp_path / "x.parquet")
    message = refused(tmp_path, (tmp_path / "x.parquet").read_bytes(), "parquet")
    assert "row 0: label = " in message


@pytest.mark.parametrize("name", [300 * "x", "~nobody-here/x", "a" + 3000 * "/b"])
def test_a_folder_that_can_not_be(name: str) -> None:
    with pytest.raises(InputError, match="no folder"):
        load_dataset(DatasetConfig(name=f"file:{name}"))
