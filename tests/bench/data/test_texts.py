"""The set "toy", the digest of a set, and the part that is held out."""

import numpy as np

from bench.config.sections import DatasetConfig
from bench.data.texts import TextDataset, holdout, load_dataset


def test_toy_is_small_balanced_and_deterministic() -> None:
    dataset = load_dataset(DatasetConfig(name="toy"))
    assert (len(dataset.train_texts), len(dataset.test_texts)) == (400, 120)
    assert np.bincount(dataset.train_labels).tolist() == [100] * 4
    assert np.bincount(dataset.test_labels).tolist() == [30] * 4
    assert dataset.train_labels.dtype == np.int64
    assert {len(text.split()) for text in dataset.train_texts} == {8}
    assert dataset.digest == load_dataset(DatasetConfig(name="toy")).digest


def test_toy_is_learnable_from_word_counts() -> None:
    dataset = load_dataset(DatasetConfig(name="toy"))
    counts: dict[str, np.ndarray] = {}
    for text, label_id in zip(dataset.train_texts, dataset.train_labels, strict=True):
        for word in text.split():
            counts.setdefault(word, np.zeros(4))[label_id] += 1
    votes = [sum(counts[w] / counts[w].sum() for w in text.split()) for text in dataset.test_texts]
    assert (np.argmax(votes, axis=1) == dataset.test_labels).mean() > 0.9


def test_digest_sees_every_part_and_no_two_framings_agree() -> None:
    def digest(labels: str, train: list[str], test: list[str], ids: list[int]) -> str:
        return TextDataset(
            name="x",
            labels=tuple(labels),
            train_texts=train,
            train_labels=np.array(ids[: len(train)]),
            test_texts=test,
            test_labels=np.array(ids[len(train) :]),
        ).digest

    variants = [
        digest("ab", ["one", "two"], ["three"], [0, 1, 0]),
        digest("ac", ["one", "two"], ["three"], [0, 1, 0]),
        digest("ab", ["onet", "wo"], ["three"], [0, 1, 0]),
        digest("ab", ["one"], ["two", "three"], [0, 1, 0]),
        digest("ab", ["one", "two"], ["three"], [0, 1, 1]),
        digest("ab", ["one", "two"], ["threE"], [0, 1, 0]),
    ]
    assert len(set(variants)) == len(variants)


def test_holdout_is_seeded_sorted_and_disjoint() -> None:
    train, validation = holdout(400, 0.1, seed=3)
    again = holdout(400, 0.1, seed=3)
    assert (len(train), len(validation)) == (360, 40)
    assert sorted([*train, *validation]) == list(range(400))
    assert (np.diff(train) > 0).all()
    assert (np.diff(validation) > 0).all()
    assert np.array_equal(validation, again[1])
    assert not np.array_equal(validation, holdout(400, 0.1, seed=4)[1])


def test_holdout_of_nothing_keeps_all() -> None:
    train, validation = holdout(400, 0.0, seed=0)
    assert np.array_equal(train, np.arange(400))
    assert validation.size == 0
