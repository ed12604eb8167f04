"""What a result belongs to, by content: settings, data, frozen weights, tokeniser, and the code.

A folder's name says little: what lies in it may have been replaced. So a run records digests, and
they are compared over the processes before round 1, and before the run is resumed, exported,
reproduced, or skipped because it is finished.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from bench.config.schema import RunConfig, make_method
from bench.config.sections import ModelConfig
from bench.models.encoders import Classifier
from bench.models.source import DRAWN, load_tokenizer
from fedara_core.comm.base import Communicator
from fedara_core.errors import InputError
from fedara_core.schema import RESULTS_VERSION

Digests = Mapping[str, str | int]

KEYS = ("dataset_digest", "weights_digest", "tokenizer_digest", "results_version", "method_version")


def digests(config: RunConfig, *, dataset: str, weights: str) -> Digests:
    """The values of KEYS, for run.json and the checkpoint; no tokenizer_digest where it is none of
    files. dataset, weights: digests of what was loaded."""
    tokenizer = tokenizer_digest(config.model)
    return {
        "dataset_digest": dataset,
        "weights_digest": weights,
        **({"tokenizer_digest": tokenizer} if tokenizer else {}),
        "results_version": RESULTS_VERSION,
        "method_version": make_method(config.method).version,
    }


def weights_digest(classifier: Classifier) -> str:
    """SHA-256 in hex over the names, shapes and values of a model's tensors but for its head."""
    sha = hashlib.sha256()
    for name, tensor in sorted(classifier.model.state_dict().items()):
        if name not in classifier.head:
            sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            sha.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


@lru_cache(maxsize=8)
def tokenizer_digest(config: ModelConfig) -> str:
    """SHA-256 in hex over all that a tokeniser is; empty for a built-in one, which has no files."""
    if config.name in DRAWN:
        return ""
    tokenizer = load_tokenizer(config)
    if tokenizer.is_fast:
        text = tokenizer.backend_tokenizer.to_str()
    else:
        text = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{type(tokenizer).__name__} {text}".encode()).hexdigest()


def identity(
    config: RunConfig, found: Digests, device_profiles: Mapping[str, Any]
) -> dict[str, Any]:
    """What a checkpoint belongs to: another one's would change the result. found: KEYS among other
    keys, such as those of run.json."""
    belongs_to = {"config": config.result_settings()} | {k: found[k] for k in KEYS if k in found}
    if config.clients.timed:
        belongs_to |= {f"device {name}": device_profiles[name] for name in config.devices.shares}
    return belongs_to


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Each key that differs, with both values; sections by their keys."""
    differing = []
    for key in sorted(theirs.keys() | ours.keys()):
        old, new = theirs.get(key), ours.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            differing += [f"{key}.{text}" for text in differences(old, new)]
        elif old != new:
            differing.append(f"{key} is {json.dumps(old)} there and {json.dumps(new)} here")
    return differing


def require_same(own: Mapping[str, Any], communicator: Communicator) -> None:
    """Raise InputError on every process unless all of them have the same values."""
    everyone = communicator.gather_json(own)
    problems = []
    for key in own:
        ranks: dict[str, list[str]] = {}
        for world_rank, values in enumerate(everyone):
            ranks.setdefault(json.dumps(values.get(key), sort_keys=True), []).append(
                str(world_rank)
            )
        if len(ranks) > 1:
            said = ", ".join(f"{value} on {', '.join(where)}" for value, where in ranks.items())
            problems.append(f"{key} is {said}")
    if problems:
        raise InputError(
            f"the processes differ, by world_rank: {'; '.join(problems)}; allowed: the same data, "
            "model and device profiles on every host"
        )
