"""The set "docstrings": enough texts, none that names its topic, the same each time."""

import re
import sysconfig
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bench.config.sections import DatasetConfig
from bench.data.docstrings import TOPICS
from bench.data.texts import TextDataset, load_dataset
from fedara_core.errors import InputError


@pytest.fixture(scope="module")
def docstrings() -> tuple[TextDataset, float]:
    start = time.process_time()
    dataset = load_dataset(DatasetConfig(name="docstrings"))
    return dataset, time.process_time() - start


def test_docstrings_has_enough_texts_in_each_class(docstrings: tuple[TextDataset, float]) -> None:
    dataset, seconds = docstrings
    counts = np.bincount(dataset.train_labels, minlength=len(dataset.labels))
    counts += np.bincount(dataset.test_labels, minlength=len(dataset.labels))
    assert dataset.labels == tuple(TOPICS)
    assert len(dataset.labels) == 22
    assert counts.sum() > 4000
    assert counts.min() >= 60
    assert 0.17 < len(dataset.test_texts) / counts.sum() < 0.25
    assert set(dataset.test_labels) == set(range(22))
    assert seconds < 8  # of this process; about 2.5


def test_docstrings_texts_do_not_name_their_topic(docstrings: tuple[TextDataset, float]) -> None:
    dataset, _ = docstrings
    stdlib = Path(sysconfig.get_path("stdlib"))
    for label_id, modules in enumerate(TOPICS.values()):
        names = {module.strip("_") for module in modules}
        for module in modules:
            names |= {path.stem.strip("_") for path in (stdlib / module).glob("[!_]*.py")}
        pattern = re.compile(rf"(?<![^\W_])({'|'.join(map(re.escape, names))})(?![^\W_])", re.I)
        for texts, label_ids in (
            (dataset.train_texts, dataset.train_labels),
            (dataset.test_texts, dataset.test_labels),
        ):
            for text, text_label in zip(texts, label_ids, strict=True):
                found = pattern.search(text) if text_label == label_id else None
                assert found is None, f"{found} in {text!r}"


def test_docstrings_texts_are_clean_and_unique(docstrings: tuple[TextDataset, float]) -> None:
    dataset, _ = docstrings
    texts = dataset.train_texts + dataset.test_texts
    assert all(text == " ".join(text.split()) and len(text.split()) >= 4 for text in texts)
    assert max(Counter(text.lower() for text in texts).values()) == 1


@pytest.mark.slow
def test_docstrings_are_the_same_twice(docstrings: tuple[TextDataset, float]) -> None:
    dataset, _ = docstrings
    assert load_dataset(DatasetConfig(name="docstrings")).digest == dataset.digest


def test_docstrings_rules_on_a_small_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for label in TOPICS:
        body = f'"""Only {label[::-1]} is written about here."""\n'
        (tmp_path / f"{label}.py").write_text(body, encoding="utf-8")
    (tmp_path / "asyncio" / "tests").mkdir(parents=True)
    (tmp_path / "asyncio" / "base_loop.py").write_text(
        """
class First:
    '''The same words   at both places.'''
    if True:
        async def method(self):
            '''Ask asyncio.Task, my_asyncio_loop, xml or
            _ASYNCIO about base_loop and asyncioTask.'''
def short():
    '''Three words asyncio remain.'''
""",
        encoding="utf-8",
    )
    hidden = tmp_path / "asyncio" / "tests" / "hidden.py"
    hidden.write_text("'''Nobody reads this text here.'''", encoding="utf-8")
    with (tmp_path / "xml.py").open("a", encoding="utf-8") as file:
        file.write("def same(): '''the same words at both PLACES.'''\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    dataset = load_dataset(DatasetConfig(name="docstrings"))
    expected = {f"Only {label[::-1]} is written about here." for label in TOPICS}
    expected.add("Ask Task, , or about and asyncioTask.")
    assert {*dataset.train_texts, *dataset.test_texts} == expected
    assert len(dataset.train_texts) + len(dataset.test_texts) == len(expected)


def test_docstrings_without_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match=r"no docstrings of argparse, asyncio.*; allowed"):
        load_dataset(DatasetConfig(name="docstrings"))
