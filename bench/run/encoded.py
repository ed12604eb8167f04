"""A run's data as token ids and labels: made once per host, and kept on disk for later jobs.

An entry of the cache belongs to the contents of all that it is made of: the set's files, the
tokeniser, and the versions of the libraries that read them.
"""

import hashlib
import json
import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

import bench
from bench.config.sections import DatasetConfig, ModelConfig
from bench.data import cache
from bench.data.texts import load_dataset, source_files
from bench.models.source import DRAWN, load_config, load_tokenizer, padding_id
from bench.models.tokens import encode
from bench.run.host import once_per_host
from bench.run.identity import tokenizer_digest
from bench.sealed import seal
from fedara_core.comm.base import Communicator
from fedara_core.train import Encoded

# It grows with every change of what this suite makes of the same files.
FORMAT = 1
_LIBRARIES = ("numpy", "pandas", "pyarrow", "tokenizers", "transformers")
_PARTS = ("input_ids", "lengths", "labels")  # of Encoded


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedSet:
    """A text classification set without its texts; label id i is named labels[i].

    digest: that of the texts and labels. summary: sizes and labels in one line.
    """

    labels: tuple[str, ...]
    digest: str
    summary: str
    train: Encoded
    test: Encoded


@lru_cache(maxsize=1)
def load_encoded(
    dataset: DatasetConfig, model: ModelConfig, communicator: Communicator
) -> EncodedSet:
    """The set, encoded for the model; every process calls it. The last one is kept, since the
    points of a sweep mostly share it. Raises InputError on every process alike."""
    facts, tensors = once_per_host(communicator, lambda: _encoded_file(dataset, model))
    if communicator.world_rank == 0:  # all have the same, and one tells
        for note in json.loads(facts["notes"]):
            warnings.warn(note, RuntimeWarning, stacklevel=1)
    return EncodedSet(
        labels=tuple(json.loads(facts["labels"])),
        digest=facts["digest"],
        summary=facts["summary"],
        train=_split(tensors, "train"),
        test=_split(tensors, "test"),
    )


def _split(tensors: dict[str, Tensor], name: str) -> Encoded:
    input_ids, lengths, labels = (tensors[f"{name}/{part}"] for part in _PARTS)
    return Encoded(input_ids=input_ids, lengths=lengths, labels=labels)


def _encoded_file(dataset: DatasetConfig, model: ModelConfig) -> bytes:
    """The bytes of the encoded set's sealed file, from the cache where it is there. Raises
    InputError."""
    files = source_files(dataset)
    if files is None:
        return _encode(dataset, model)
    source = _digest(files)
    key = _key(source, dataset, model)
    data = cache.read(key)
    if data is None:
        data = _encode(dataset, model)
        if _digest(files) == source:  # else they changed while they were read
            cache.write(key, data)
    return data


def _key(source: str, dataset: DatasetConfig, model: ModelConfig) -> str:
    """SHA-256 in hex over what an encoded set depends on. Names are in it because warnings say
    them."""
    depends_on: dict[str, Any] = {
        "format": FORMAT,
        "source": source,
        "dataset": dataset.model_dump(exclude={"validation_fraction"}),
        "model": model.name,
        "max_length": model.max_length,
        "tokenizer": tokenizer_digest(model),
        "python": platform.python_version(),
        "libraries": {name: metadata.version(name) for name in _LIBRARIES},
    }
    if model.name not in DRAWN:
        settings = load_config(model)
        depends_on["num_rows"] = getattr(settings.get_text_config(), "vocab_size", None)
        depends_on["padding_id"] = padding_id(settings, load_tokenizer(model))
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()


def _digest(files: Sequence[Path]) -> str:
    """SHA-256 in hex over the contents of files, of which some need not exist."""
    sha = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                sha.update(hashlib.file_digest(file, "sha256").digest())
        except OSError:  # who reads it says why
            sha.update(b"none")
    return sha.hexdigest()


def _encode(dataset: DatasetConfig, model: ModelConfig) -> bytes:
    """Load, tokenise, and seal with the warnings of this suite. Raises InputError."""
    with warnings.catch_warnings(record=True) as caught:
        loaded = load_dataset(dataset)
        splits = {
            "train": encode(model, loaded.train_texts, loaded.train_labels),
            "test": encode(model, loaded.test_texts, loaded.test_labels),
        }
    ours = Path(bench.__file__).parent
    notes = []
    for warning in caught:
        if ours in Path(warning.filename).parents:
            notes.append(str(warning.message))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    facts = {
        "dataset": dataset.name,
        "model": f"{model.name}, max_length {model.max_length}",
        "labels": json.dumps(loaded.labels),
        "digest": loaded.digest,
        "summary": loaded.summary(),
        "notes": json.dumps(notes),
    }
    tensors = {
        f"{name}/{part}": getattr(split, part) for name, split in splits.items() for part in _PARTS
    }
    return seal(facts, tensors)
