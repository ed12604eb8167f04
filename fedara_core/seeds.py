"""Random generators from (seed, purpose, numbers...), never from world_rank."""

import hashlib

import torch


def derive(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit integer that depends on all arguments and on nothing else (SHA-256)."""
    text = ":".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator; drawn on the CPU everywhere, so that a GPU starts from the same numbers."""
    return torch.Generator().manual_seed(derive(seed, purpose, *numbers))
