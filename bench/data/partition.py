"""Splits the training examples among the clients, and draws each client's lora_rank."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.config.sections import AdapterConfig, PartitionConfig
from fedara_core.errors import InputError

# Keeps the partition apart from other streams that start from the same seed.
PARTITION_TAG = 0x70617274
CLIENT_LORA_RANKS_TAG = 0x72616E6B
MAX_DRAWS = 1000
# Bounds the numbers drawn in all: with ten thousand clients 1000 draws would take minutes.
MAX_DRAWN_NUMBERS = 20_000_000


def partition(
    labels: np.ndarray, config: PartitionConfig, *, num_clients: int, num_classes: int, seed: int
) -> list[np.ndarray]:
    """Split the examples with these labels (int64, shape (num_examples,)) among the clients.

    Returns one sorted int64 index array per client. Every example belongs to exactly one client.
    Equal arguments give equal arrays.

    iid: a random equal split; sizes differ by at most one.
    dirichlet: label skew. For each class, proportions over clients from Dirichlet(alpha), as in Li
        et al., "Federated Learning on Non-IID Data Silos" (arXiv:2102.02079), without the size cap
        of their code; Hsu et al. (arXiv:1909.06335) draw per client over classes instead.
    quantity: size skew. One draw of sizes from Dirichlet(alpha), labels iid (arXiv:2102.02079).
    shards: examples sorted by label are cut into num_clients * labels_per_client shards of equal
        size, and each client gets labels_per_client of them (McMahan et al., arXiv:1602.05629). A
        shard on a boundary holds two or more labels.

    dirichlet and quantity are redrawn, at most MAX_DRAWS times, until each client has
    config.min_examples. If no draw succeeds (with alpha = 0.01 and 100 clients none would), the
    last one is filled up: clients with too few examples, in client_id order, get one at a time from
    the client that has most at that moment (of equals, the lowest client_id).

    Raises InputError if there are fewer than num_clients * min_examples examples, if
    labels_per_client is above num_classes, or if a client is left with less than min_examples.
    """
    assert labels.ndim == 1
    assert num_clients >= 1
    assert np.isin(labels, np.arange(num_classes)).all()
    if len(labels) < num_clients * config.min_examples:
        raise InputError(
            f"partition: {len(labels)} examples are too few for {num_clients} clients with "
            f"min_examples = {config.min_examples}; "
            f"allowed: at least {num_clients * config.min_examples} examples"
        )
    if config.scheme == "shards" and config.labels_per_client > num_classes:
        raise InputError(
            f"partition.labels_per_client = {config.labels_per_client} is more than the "
            f"{num_classes} labels of the data set; allowed: 1 to {num_classes}"
        )
    generator = np.random.default_rng(np.random.SeedSequence([seed, PARTITION_TAG]))
    if config.scheme == "iid":
        shards = np.array_split(generator.permutation(len(labels)), num_clients)
    elif config.scheme == "shards":
        shards = _by_label_shards(labels, config.labels_per_client, num_clients, generator)
    else:
        # Size skew is label skew where all examples have the same label.
        groups = labels if config.scheme == "dirichlet" else np.zeros_like(labels)
        shards = _by_dirichlet(groups, config, num_clients, generator)
    for client_id, shard in enumerate(shards):
        if len(shard) < config.min_examples:
            problem = "empty client" if not len(shard) else "too small a client"
            raise InputError(
                f"partition.scheme = {config.scheme!r}: {problem}: client {client_id} has "
                f"{len(shard)} examples; allowed: at least min_examples = {config.min_examples}"
            )
    return [np.sort(shard) for shard in shards]


def label_counts(labels: np.ndarray, shards: Sequence[np.ndarray], num_classes: int) -> np.ndarray:
    """Examples of each label at each client: int64, shape (num_clients, num_classes)."""
    counts = [np.bincount(labels[shard], minlength=num_classes) for shard in shards]
    return np.array(counts, dtype=np.int64).reshape(len(shards), num_classes)


def draw_client_lora_ranks(config: AdapterConfig, *, num_clients: int, seed: int) -> list[int]:
    """The lora_rank of each client, drawn from the seed; without client_lora_ranks the full one."""
    if not config.client_lora_ranks:
        return [config.lora_rank] * num_clients
    shares = [entry.share for entry in config.client_lora_ranks]
    groups = deal_shares(shares, num_clients, np.random.default_rng([CLIENT_LORA_RANKS_TAG, seed]))
    return [config.client_lora_ranks[group].lora_rank for group in groups]


def deal_shares(
    shares: Sequence[float], num_clients: int, generator: np.random.Generator
) -> list[int]:
    """The group of each client, where group i has shares[i] of the clients, rounded to whole
    clients and shuffled; the shares add up to 1."""
    ends = np.rint(np.cumsum(shares) * num_clients).astype(int)
    groups = np.repeat(np.arange(len(shares)), np.diff(ends, prepend=0))
    return [int(group) for group in generator.permutation(groups)]


def summary(
    labels: np.ndarray,
    shards: Sequence[np.ndarray],
    label_names: Sequence[str],
    client_lora_ranks: Sequence[int],
) -> list[dict[str, Any]]:
    """partition.json: client_id, num_examples, lora_rank and label_counts (by name, without zeros)
    of each client, in client_id order."""
    counts = label_counts(labels, shards, len(label_names))
    return [
        {
            "client_id": client_id,
            "num_examples": int(row.sum()),
            "lora_rank": client_lora_ranks[client_id],
            "label_counts": {
                name: int(count) for name, count in zip(label_names, row, strict=True) if count
            },
        }
        for client_id, row in enumerate(counts)
    ]


def _by_label_shards(
    labels: np.ndarray, labels_per_client: int, num_clients: int, generator: np.random.Generator
) -> list[np.ndarray]:
    shuffled = generator.permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    pieces = np.array_split(by_label, num_clients * labels_per_client)
    deal = generator.permutation(len(pieces)).reshape(num_clients, labels_per_client)
    return [np.concatenate([pieces[piece] for piece in row]) for row in deal]


def _by_dirichlet(
    groups: np.ndarray, config: PartitionConfig, num_clients: int, generator: np.random.Generator
) -> list[np.ndarray]:
    """Deal each group (shape (num_examples,), ids from 0) by Dirichlet(alpha) proportions."""
    members = [generator.permutation(np.flatnonzero(groups == i)) for i in range(groups.max() + 1)]
    group_sizes = np.array([len(member) for member in members])
    cuts = _draw_cuts(group_sizes, config, num_clients, generator)
    dealt = [np.split(member, cut) for member, cut in zip(members, cuts, strict=True)]
    shards = [np.concatenate(parts) for parts in zip(*dealt, strict=True)]
    return _fill_up(shards, config.min_examples)


def _draw_cuts(
    group_sizes: np.ndarray,
    config: PartitionConfig,
    num_clients: int,
    generator: np.random.Generator,
) -> np.ndarray:
    """Where each group is cut: (num_groups, num_clients - 1); the first good draw or the last."""
    concentration = np.full(num_clients, config.alpha)
    max_draws = MAX_DRAWN_NUMBERS // (num_clients * len(group_sizes))
    for _ in range(min(MAX_DRAWS, max(1, max_draws))):
        proportions = generator.dirichlet(concentration, size=len(group_sizes))
        ends = np.cumsum(proportions, axis=1)  # (num_groups, num_clients)
        # A cumulative sum may round to above 1.
        ends = np.minimum(ends[:, :-1], 1.0)
        cuts: np.ndarray = (ends * group_sizes[:, None]).astype(np.int64)
        sizes = np.diff(cuts, axis=1, prepend=0, append=group_sizes[:, None]).sum(axis=0)
        if sizes.min() >= config.min_examples:
            break
    return cuts


def _fill_up(shards: list[np.ndarray], min_examples: int) -> list[np.ndarray]:
    """Move examples from the largest clients to those below min_examples."""
    sizes = np.array([len(shard) for shard in shards])
    needy = np.flatnonzero(sizes < min_examples)
    taken: dict[int, list[int]] = {int(client_id): [] for client_id in needy}
    for client_id, received in taken.items():
        while sizes[client_id] < min_examples:
            donor = int(np.argmax(sizes))
            sizes[donor] -= 1
            sizes[client_id] += 1
            received.append(int(shards[donor][sizes[donor]]))
    # A donor gives from its end and never falls below min_examples, so that none also receives.
    return [
        np.concatenate([shard[: sizes[i]], np.array(taken.get(i, []), dtype=np.int64)])
        for i, shard in enumerate(shards)
    ]
