"""The partition: a disjoint cover for every scheme, its skew, its seeds, and what it refuses."""

from typing import Any

import numpy as np
import pytest

from bench.config.sections import AdapterConfig, PartitionConfig
from bench.data.partition import (
    _fill_up,
    draw_client_lora_ranks,
    label_counts,
    partition,
    summary,
)
from fedara_core.errors import InputError

NUM_CLASSES = 10
LABELS = np.random.default_rng(5).integers(0, NUM_CLASSES, size=5000)


def deal(num_clients: int = 20, seed: int = 0, **settings: Any) -> list[np.ndarray]:
    config = PartitionConfig(**settings)
    return partition(LABELS, config, num_clients=num_clients, num_classes=NUM_CLASSES, seed=seed)


def sizes(shards: list[np.ndarray]) -> np.ndarray:
    return np.array([len(shard) for shard in shards])


def label_skew(shards: list[np.ndarray]) -> float:
    """Mean over clients of the share of their most frequent label: 1 / NUM_CLASSES to 1."""
    counts = label_counts(LABELS, shards, NUM_CLASSES)
    return float((counts.max(axis=1) / counts.sum(axis=1)).mean())


@pytest.mark.parametrize("num_clients", [1, 7, 100])
@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "shards", "quantity"])
def test_every_example_goes_to_one_client(scheme: str, num_clients: int) -> None:
    shards = deal(num_clients, scheme=scheme)
    assert len(shards) == num_clients
    assert np.array_equal(np.sort(np.concatenate(shards)), np.arange(len(LABELS)))
    assert all((np.diff(shard) > 0).all() for shard in shards)
    assert all(shard.dtype == np.int64 for shard in shards)
    assert sizes(shards).min() >= 1


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "shards", "quantity"])
def test_the_seed_decides(scheme: str) -> None:
    np.random.seed(0)  # the global generator must not matter
    first = deal(scheme=scheme, seed=1)
    np.random.seed(9)
    again = deal(scheme=scheme, seed=1)
    other = deal(scheme=scheme, seed=2)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_iid_is_even() -> None:
    shards = deal(30, scheme="iid")
    assert set(sizes(shards)) == {166, 167}
    assert label_skew(shards) < 0.2


def test_dirichlet_skew_grows_as_alpha_falls() -> None:
    skews = [label_skew(deal(alpha=alpha)) for alpha in (100.0, 1.0, 0.1, 0.01)]
    assert skews == sorted(skews)
    assert skews[0] < 0.2
    assert skews[-1] > 0.7


def test_dirichlet_proportions_have_the_stated_spread() -> None:
    # A client's share of a class is Beta(alpha, alpha * (K - 1)) distributed, whose variance is
    # (K - 1) / (K^2 (K alpha + 1)).
    num_clients, alpha = 5, 2.0
    class_sizes = np.bincount(LABELS)
    shares = np.concatenate(
        [
            label_counts(LABELS, deal(num_clients, seed, alpha=alpha), NUM_CLASSES) / class_sizes
            for seed in range(60)
        ]
    )
    expected = (num_clients - 1) / (num_clients**2 * (num_clients * alpha + 1))
    assert shares.var() == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("min_examples", [1, 10])
def test_dirichlet_meets_min_examples_at_tiny_alpha(min_examples: int) -> None:
    shards = deal(100, alpha=0.01, min_examples=min_examples)
    assert sizes(shards).min() == min_examples
    assert np.array_equal(np.sort(np.concatenate(shards)), np.arange(len(LABELS)))
    assert sizes(shards).max() > 300


def test_dirichlet_is_redrawn_before_it_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    redrawn = sizes(deal(20, alpha=0.3, min_examples=30))
    monkeypatch.setattr("bench.data.partition.MAX_DRAWS", 1)
    mended = sizes(deal(20, alpha=0.3, min_examples=30))
    assert redrawn.min() >= 30
    assert mended.min() == 30
    assert not np.array_equal(redrawn, mended)


def test_mending_takes_from_the_largest_client() -> None:
    shards = [np.arange(0, 6), np.arange(6, 6), np.arange(6, 11), np.arange(11, 12)]
    filled = _fill_up(shards, 2)
    # Client 1 takes 5 of client 0 (6 examples), then, at 5 and 5, the lower one's next: 4. Then
    # client 3 takes 10 of client 2, which is the largest by then.
    assert [shard.tolist() for shard in filled] == [[0, 1, 2, 3], [5, 4], [6, 7, 8, 9], [11, 10]]


def test_every_example_needed() -> None:
    shards = deal(5000, alpha=0.01)
    assert set(sizes(shards)) == {1}


def test_class_without_examples() -> None:
    config = PartitionConfig(alpha=0.5)
    shards = partition(LABELS[LABELS < 3], config, num_clients=4, num_classes=9, seed=0)
    assert sum(sizes(shards)) == (LABELS < 3).sum()


def test_quantity_skews_sizes_but_not_labels() -> None:
    even, skewed = deal(10, scheme="quantity", alpha=100.0), deal(10, scheme="quantity", alpha=0.3)
    assert sizes(even).std() < 100 < sizes(skewed).std()
    large = [shard for shard in skewed if len(shard) >= 200]
    assert len(large) >= 2
    assert label_skew(large) < 0.2


@pytest.mark.parametrize("labels_per_client", [1, 2, 5])
def test_shards_give_few_labels(labels_per_client: int) -> None:
    shards = deal(10, scheme="shards", labels_per_client=labels_per_client)
    assert set(sizes(shards)) == {500}
    num_labels = (label_counts(LABELS, shards, NUM_CLASSES) > 0).sum(axis=1)
    # Each of the boundaries between labels adds at most one label to one shard.
    assert num_labels.sum() <= 10 * labels_per_client + NUM_CLASSES - 1


def test_shards_of_equal_classes_hold_exactly_their_labels() -> None:
    labels = np.repeat(np.arange(10), 20)
    config = PartitionConfig(scheme="shards", labels_per_client=2)
    shards = partition(labels, config, num_clients=5, num_classes=10, seed=0)
    counts = label_counts(labels, shards, 10)
    assert ((counts == 20).sum(axis=1) == 2).all()
    assert counts.sum() == 200


def test_label_counts_and_summary() -> None:
    labels = np.array([0, 2, 2, 1])
    shards = [np.array([0, 1, 2]), np.array([3])]
    counts = label_counts(labels, shards, 3)
    assert counts.dtype == np.int64
    assert counts.tolist() == [[1, 0, 2], [0, 1, 0]]
    assert summary(labels, shards, ["a", "b", "c"], [4, 2]) == [
        {"client_id": 0, "num_examples": 3, "lora_rank": 4, "label_counts": {"a": 1, "c": 2}},
        {"client_id": 1, "num_examples": 1, "lora_rank": 2, "label_counts": {"b": 1}},
    ]


def test_client_ranks_are_dealt_by_their_shares() -> None:
    entries = [{"lora_rank": 2, "share": 0.3}, {"lora_rank": 8, "share": 0.7}]
    config = AdapterConfig.model_validate({"lora_rank": 8, "client_lora_ranks": entries})
    drawn = draw_client_lora_ranks(config, num_clients=10, seed=0)
    assert sorted(drawn) == [2] * 3 + [8] * 7
    assert drawn == draw_client_lora_ranks(config, num_clients=10, seed=0)
    assert drawn != draw_client_lora_ranks(config, num_clients=10, seed=1)
    assert len(draw_client_lora_ranks(config, num_clients=7, seed=0)) == 7
    assert draw_client_lora_ranks(AdapterConfig(lora_rank=5), num_clients=2, seed=0) == [5, 5]


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "shards", "quantity"])
def test_too_few_examples(scheme: str) -> None:
    with pytest.raises(InputError) as caught:
        deal(20, scheme=scheme, min_examples=251)
    assert str(caught.value) == (
        "partition: 5000 examples are too few for 20 clients with min_examples = 251; "
        "allowed: at least 5020 examples"
    )


def test_more_labels_per_client_than_labels() -> None:
    with pytest.raises(InputError) as caught:
        deal(scheme="shards", labels_per_client=11)
    assert str(caught.value) == (
        "partition.labels_per_client = 11 is more than the 10 labels of the data set; "
        "allowed: 1 to 10"
    )


def test_shards_may_leave_a_client_too_small() -> None:
    # 5000 examples in 1800 shards of 2 or 3: some client gets two shards of 2, below 5.
    with pytest.raises(InputError, match=r"^partition.scheme = 'shards': too small a client: "):
        deal(900, scheme="shards", min_examples=5)


def test_shards_may_leave_a_client_empty() -> None:
    labels = np.arange(4) % 2
    config = PartitionConfig(scheme="shards", labels_per_client=2)
    messages = []
    for seed in range(20):
        try:
            partition(labels, config, num_clients=4, num_classes=2, seed=seed)
        except InputError as error:
            messages.append(str(error))
    # Four of the eight shards are empty, so in most deals some client gets two of those.
    assert messages
    assert all("empty client: client " in message for message in messages)
    assert all("has 0 examples; allowed: at least min_examples = 1" in m for m in messages)
