"""A text classification set in memory, the sets by name, and the part that is held out to tune."""

import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from bench.config.sections import DatasetConfig

BUILT_IN_SETS = ("docstrings", "toy")  # need no file and no network
# Keeps the draw of the validation part apart from other streams that start from the same seed.
HOLDOUT_TAG = 0x686F6C64

SHOWN_LABELS, SHOWN_LETTERS = 8, 24  # of the labels and of each name, in a line

TOY_WORDS: dict[str, str] = {
    "weather": "rain storm cloud wind snow frost thunder sunny humid fog hail breeze",
    "kitchen": "bread butter oven flour sugar pepper soup onion garlic cheese pan salt",
    "music": "guitar melody drum chord singer piano violin rhythm choir song tempo bass",
    "sport": "goal referee match score player coach stadium race tennis medal league ball",
}
TOY_COMMON = "the a and very new old today people with some they said good long over much"


@dataclass(frozen=True, kw_only=True, eq=False)
class TextDataset:
    """A text classification set in memory; label id i is named labels[i]. train_labels and
    test_labels are int64 arrays of shape (num_train,) and (num_test,)."""

    name: str
    labels: tuple[str, ...]
    train_texts: list[str]
    train_labels: np.ndarray
    test_texts: list[str]
    test_labels: np.ndarray

    @cached_property
    def label_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Examples of each label in the train and in the test split: int64, (num_labels,) each."""
        num_labels = len(self.labels)
        return (
            np.bincount(self.train_labels, minlength=num_labels),
            np.bincount(self.test_labels, minlength=num_labels),
        )

    def summary(self) -> str:
        """One line: the sizes of both splits, and the labels with how many examples each has."""
        train, test = self.label_counts
        counts = [
            f"{shown(name, SHOWN_LETTERS)} ({num_train} + {num_test})"
            for name, num_train, num_test in zip(self.labels, train, test, strict=True)
        ]
        labels = "1 label" if len(counts) == 1 else f"{len(counts)} labels"
        listing = ", ".join(counts[:SHOWN_LABELS])
        if len(counts) > SHOWN_LABELS:
            listing += f", and {len(counts) - SHOWN_LABELS} more"
        return (
            f"train {len(self.train_texts)}, test {len(self.test_texts)} examples, {labels} "
            f"(train + test): {listing}"
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex over label names, texts and label ids of both splits; each list goes with
        its length and each string with its number of UTF-8 bytes, so no two sets feed the same
        bytes."""
        hasher = hashlib.sha256()
        for strings in (self.labels, self.train_texts, self.test_texts):
            hasher.update(len(strings).to_bytes(8, "little"))
            for string in strings:
                data = string.encode("utf-8", errors="surrogatepass")
                hasher.update(len(data).to_bytes(8, "little") + data)
        for ids in (self.train_labels, self.test_labels):
            hasher.update(len(ids).to_bytes(8, "little") + ids.astype("<i8").tobytes())
        return hasher.hexdigest()


def shown(name: str, letters: int = 40) -> str:
    """A name in a line of text: cut to so many letters, and quoted where it does not show whole."""
    short = name if len(name) <= letters else name[: letters - 3] + "..."
    plain = short.isprintable() and short.strip() == short and short
    return short if plain else ascii(short)


def listed(names: Iterable[str]) -> str:
    """Names in a line of text: at most 50, long ones cut."""
    names = list(names)
    return ", ".join(map(shown, names[:50])) + (", ..." if len(names) > 50 else "")


def load_dataset(config: DatasetConfig) -> TextDataset:
    """Load the set that config.name names. Raises InputError for one that can not be fetched or
    read, or has missing or wrong texts or labels."""
    from bench.data import docstrings, tables  # they import this module

    if config.name == "docstrings":
        return docstrings.load(Path(sysconfig.get_path("stdlib")))
    if config.name == "toy":
        return _toy()
    if config.name.startswith("file:"):
        return tables.load_folder(config)
    return tables.load_from_hub(config)


def source_files(config: DatasetConfig) -> list[Path] | None:
    """The files that `load_dataset` reads, of which some need not exist; None for a set that a
    library fetches. Raises InputError."""
    from bench.data import docstrings, tables

    if config.name == "docstrings":
        return docstrings.source_files(Path(sysconfig.get_path("stdlib")))
    if config.name == "toy":
        return []
    return list(tables.folder_files(config)) if config.name.startswith("file:") else None


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """What a set is, without its texts."""

    labels: tuple[str, ...]
    digest: str


@lru_cache(maxsize=8)
def dataset_facts(config: DatasetConfig) -> DatasetFacts:
    """Those of `load_dataset`; kept, since the points of a sweep mostly share a set."""
    dataset = load_dataset(config)
    return DatasetFacts(labels=dataset.labels, digest=dataset.digest)


def holdout(num_examples: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split the train examples for tuning: (train_index, validation_index), sorted and disjoint.

    Both are int64 arrays of indices below num_examples; the validation part has
    floor(fraction * num_examples) examples drawn without regard to their label, none at fraction 0.
    """
    assert 0 <= fraction < 1, fraction
    generator = np.random.default_rng(np.random.SeedSequence([seed, HOLDOUT_TAG]))
    order = generator.permutation(num_examples)
    num_validation = int(fraction * num_examples)
    return np.sort(order[num_validation:]), np.sort(order[:num_validation])


def _toy() -> TextDataset:
    """400 train and 120 test texts of 8 words, about half of them typical of one of 4 classes."""
    generator = np.random.default_rng(0)
    label_ids = np.arange(520, dtype=np.int64) % len(TOY_WORDS)
    vocabularies = [words.split() for words in TOY_WORDS.values()]
    common = TOY_COMMON.split()
    texts = []
    for label_id in label_ids:
        typical = generator.choice(vocabularies[label_id], size=8)
        anything = generator.choice(common, size=8)
        texts.append(" ".join(np.where(generator.random(8) < 0.5, typical, anything)))
    return TextDataset(
        name="toy",
        labels=tuple(TOY_WORDS),
        train_texts=texts[:400],
        train_labels=label_ids[:400],
        test_texts=texts[400:],
        test_labels=label_ids[400:],
    )
