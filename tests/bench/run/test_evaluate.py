"""Evaluation: metrics against scikit-learn and by hand, and shards against one process."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn
from torch.nn import functional

from bench.run.evaluate import Evaluation, Evaluator
from fedara_core.adapters import AdaptedModel
from fedara_core.comm.base import Communicator
from fedara_core.train import Encoded
from support.rounds import make_tiny_job


def evaluation(confusion: list[list[int]]) -> Evaluation:
    return Evaluation(confusion=np.array(confusion, dtype=np.int64), loss=0.0)


class Script(nn.Module):
    """Says of the example whose first token is i what `logits` (n, num_classes) holds in row i."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.logits[input_ids[:, 0]]


def scripted(num_examples: int, num_classes: int) -> tuple[Script, Encoded]:
    """Examples of mixed lengths, random labels and random answers; no label is the last class."""
    drawn = torch.Generator().manual_seed(4)
    labels = torch.randint(num_classes - 1, (num_examples,), generator=drawn)
    lengths = torch.randint(1, 6, (num_examples,), generator=drawn)
    ids = torch.zeros(num_examples, 5, dtype=torch.int32)
    ids[:, 0] = torch.arange(num_examples)
    logits = torch.randn(num_examples, num_classes, generator=drawn)
    logits[torch.arange(num_examples), labels] += 1.0
    return Script(logits), Encoded(input_ids=ids, lengths=lengths, labels=labels)


def run(
    model: AdaptedModel,
    data: Encoded,
    communicator: Communicator | None = None,
    index: Tensor | None = None,
    num_classes: int = 5,
) -> Evaluation:
    evaluator = Evaluator(
        model=model,
        data=data,
        label_counts=np.ones((1, num_classes), dtype=np.int64),
        batch_size=7,
        precision="fp32",
        device=torch.device("cpu"),
        communicator=communicator or Communicator(),
    )
    return evaluator.shared_model(torch.arange(len(data)) if index is None else index)


def test_metrics_equal_scikit_learn() -> None:
    """One class never occurs as a label, only as a prediction; one occurs as neither."""
    model, data = scripted(60, 5)
    model.logits[:, 3] = -9.0
    data.labels[data.labels == 3] = 2
    result = run(AdaptedModel(model), data)
    labels, predicted = data.labels.numpy(), model.logits.argmax(dim=1).numpy()
    assert set(predicted) == {0, 1, 2, 4}
    assert set(labels) == {0, 1, 2}
    assert result.num_examples == 60
    assert result.accuracy == pytest.approx(accuracy_score(labels, predicted), abs=1e-12)
    assert 0.3 < result.accuracy < 0.9
    macro_f1 = f1_score(labels, predicted, average="macro")
    assert result.macro_f1 == pytest.approx(macro_f1, abs=1e-12)
    assert result.loss == pytest.approx(
        functional.cross_entropy(model.logits, data.labels).item(), rel=1e-6
    )
    for true in range(5):
        for said in range(5):
            expected = ((labels == true) & (predicted == said)).sum()
            assert result.confusion[true, said] == expected


def test_metrics_by_hand() -> None:
    result = evaluation([[3, 1, 0], [2, 2, 0], [0, 0, 0]])
    assert result.accuracy == 5 / 8
    # F1 = 2 hits / (true + predicted): 6 / (4 + 5) and 4 / (4 + 3); the third never occurs.
    assert result.macro_f1 == pytest.approx((6 / 9 + 4 / 7) / 2)


def test_only_the_examples_asked_for_count() -> None:
    model, data = scripted(60, 5)
    index = torch.tensor([5, 59, 0, 17])
    result = run(AdaptedModel(model), data, index=index)
    assert result.num_examples == 4
    right = (model.logits[index].argmax(dim=1) == data.labels[index]).double().mean()
    assert result.accuracy == float(right)
    expected = functional.cross_entropy(model.logits[index], data.labels[index]).item()
    assert result.loss == pytest.approx(expected, rel=1e-6)


def test_client_accuracies_by_hand() -> None:
    """Recalls 3/4, 1/2, none (class 2 is not evaluated), 1."""
    result = evaluation([[3, 1, 0, 0], [2, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 5]])
    label_counts = np.array(
        [
            [10, 0, 0, 0],  # 3/4
            [1, 3, 0, 0],  # (3/4 + 3 / 2) / 4
            [0, 0, 7, 0],  # nothing to judge it by
            [2, 0, 9, 2],  # (2 x 3/4 + 2) / 4: class 2 has no say
        ]
    )
    clients = result.client_accuracies(label_counts)
    assert clients.tolist() == pytest.approx([0.75, 0.5625, 0.875])
    row = result.record(label_counts)
    assert row["client_accuracy_mean"] == pytest.approx((0.75 + 0.5625 + 0.875) / 3)
    assert row["client_accuracy_std"] == pytest.approx(np.std([0.75, 0.5625, 0.875]))
    assert row["client_accuracy_p10"] == pytest.approx(0.5625 + 0.2 * (0.75 - 0.5625))
    assert row["accuracy"] == 10 / 13
    assert row["eval_examples"] == 13


class OneOf(Communicator):
    """One of several processes: keeps what it sends, and receives what was sent before it."""

    def __init__(self, world_rank: int, world_size: int, sent: list[Tensor]) -> None:
        super().__init__()
        self.world_rank, self.world_size, self.sent = world_rank, world_size, sent

    def allgather(self, buffer: Tensor, counts: object = None) -> list[Tensor]:
        if len(self.sent) < self.world_size:
            self.sent.append(buffer)
            return [buffer] * self.world_size
        assert torch.equal(buffer, self.sent[self.world_rank])
        return self.sent


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 12])
def test_shards_equal_one_process(world_size: int) -> None:
    """The same bits on every process; 12 processes leave some without a batch."""
    job = make_tiny_job("method.name=lora")
    job.method.download(job.model, job.state, None)
    data = Encoded(
        input_ids=job.evaluated.input_ids[:60],
        lengths=job.evaluated.lengths[:60],
        labels=job.evaluated.labels[:60],
    )
    alone = run(job.model, data, num_classes=4)
    assert alone.num_examples == 60
    sent: list[Tensor] = []
    for world_rank in range(world_size):
        run(job.model, data, OneOf(world_rank, world_size, sent), num_classes=4)
    assert len(sent) == world_size
    for world_rank in range(world_size):
        together = run(job.model, data, OneOf(world_rank, world_size, sent), num_classes=4)
        assert np.array_equal(together.confusion, alone.confusion)
        assert together.loss == alone.loss


def test_dropout_is_off_and_nothing_gets_a_gradient() -> None:
    job = make_tiny_job("method.name=lora", "model.dropout=0.5")
    job.method.download(job.model, job.state, None)
    job.model.module.train()
    first = run(job.model, job.evaluated, num_classes=4)
    job.model.module.train()
    assert run(job.model, job.evaluated, num_classes=4).loss == first.loss
    assert job.model.gradient.numel()
    assert not any(p.grad is not None and p.grad.any() for p in job.model.module.parameters())


def test_no_client_keys_when_no_client_has_an_evaluated_class() -> None:
    result = Evaluation(confusion=np.array([[3, 0], [0, 0]]), loss=0.5)
    record = result.record(np.array([[0, 4]]))
    assert record["accuracy"] == 1.0
    assert not [key for key in record if key.startswith("client_")]


# ---- clients with models of their own ----


class Chosen(nn.Module):
    """Answers every example with one class."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return 9.0 * functional.one_hot(torch.full((len(input_ids),), self.answer), 3).float()


def client_models(
    label_counts: list[list[int]], num_examples: int, communicator: Communicator, mine: list[int]
) -> dict[str, float]:
    """Client k always answers class k mod 3; a quarter of the examples is class 0, the rest 1."""
    labels = (torch.arange(num_examples) % 4 > 0).long()
    ids = torch.zeros(num_examples, 2, dtype=torch.int32)
    data = Encoded(input_ids=ids, lengths=torch.full((num_examples,), 2), labels=labels)
    model = Chosen()
    evaluator = Evaluator(
        model=AdaptedModel(model),
        data=data,
        label_counts=np.array(label_counts),
        batch_size=5,
        precision="fp32",
        device=torch.device("cpu"),
        communicator=communicator,
    )

    def load_client(client_id: int) -> None:
        model.answer = client_id % 3

    return evaluator.client_models(torch.arange(num_examples), mine, load_client, seed=0)


def test_each_client_is_judged_with_its_own_model() -> None:
    """Clients that only have the class they always say are right, the third never is."""
    record = client_models([[5, 0, 0], [0, 7, 0], [4, 4, 0]], 1200, Communicator(), [0, 1, 2])
    assert record["eval_examples"] == 1200
    # Each judges a third of all examples: right are 1/4 of client 0's, 3/4 of client 1's, none.
    assert record["accuracy"] == pytest.approx((1 / 4 + 3 / 4 + 0) / 3, abs=0.03)
    assert record["client_accuracy_mean"] == pytest.approx(2 / 3)
    assert record["client_accuracy_std"] == pytest.approx((2 / 9) ** 0.5)
    swapped = client_models([[0, 5, 0], [7, 0, 0], [4, 4, 0]], 1200, Communicator(), [0, 1, 2])
    assert swapped["accuracy"] == record["accuracy"]
    assert swapped["client_accuracy_mean"] == 0.0


def test_a_clients_own_mix_is_drawn_by_its_labels() -> None:
    """One client that says class 0 and has it for 3 of 4 examples, in a set with 1 of 4."""
    record = client_models([[75, 25, 0]], 1200, Communicator(), [0])
    assert record["accuracy"] == 0.25
    assert record["client_accuracy_mean"] == pytest.approx(0.75, abs=0.04)


def test_more_clients_than_examples() -> None:
    """Some judge none of the shared examples, all judge one of their own mix."""
    record = client_models([[1, 1, 0]] * 8, 5, Communicator(), list(range(8)))
    assert record["eval_examples"] == 5
    assert record["client_accuracy_mean"] <= 1.0


def test_a_client_whose_labels_are_not_evaluated_has_no_own_accuracy() -> None:
    record = client_models([[5, 0, 0], [0, 0, 3]], 40, Communicator(), [0, 1])
    assert record["client_accuracy_mean"] == 1.0  # of client 0 alone
