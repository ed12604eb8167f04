"""Server-side evaluation: batches sharded over processes, equal for any number of them."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedara_core.comm import Communicator
from fedara_core.train import Encoded


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """confusion[true, predicted] (num_classes, num_classes) int64; mean cross-entropy."""

    confusion: np.ndarray
    loss: float

    @property
    def num_examples(self) -> int:
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.confusion) / self.confusion.sum())

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the classes that occur, as label or as prediction."""
        hits = np.diag(self.confusion)
        occurs = self.confusion.sum(axis=0) + self.confusion.sum(axis=1)  # true + predicted
        return float(np.mean(2 * hits[occurs > 0] / occurs[occurs > 0]))

    def client_accuracies(self, label_counts: np.ndarray) -> np.ndarray:
        """Accuracy on each client's own label mix: label_counts (num_clients, num_classes) -> (k,).

        The recall of each class, weighted by the client's labels; classes that the evaluated
        examples lack are left out, and so is a client that has no other.
        """
        support = self.confusion.sum(axis=1)
        present = support > 0
        recall = np.diag(self.confusion)[present] / support[present]
        counts = label_counts[:, present]
        counts = counts[counts.sum(axis=1) > 0]
        return np.asarray(counts @ recall / counts.sum(axis=1))

    def record(self, label_counts: np.ndarray) -> dict[str, float]:
        """The evaluation's keys of a round record; accuracies and F1 as fractions."""
        clients = self.client_accuracies(label_counts)
        record = {
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "test_loss": self.loss,
            "eval_examples": self.num_examples,
        }
        if not clients.size:
            return record
        return {
            **record,
            "client_accuracy_mean": float(clients.mean()),
            "client_accuracy_std": float(clients.std()),
            "client_accuracy_p10": float(np.percentile(clients, 10)),
        }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Encoded,
    index: torch.Tensor,
    *,
    batch_size: int,
    num_classes: int,
    precision: str,
    device: torch.device,
    communicator: Communicator,
) -> Evaluation:
    """Evaluate the examples `index` (n,); every process calls it and gets the same result.

    Batch i goes to process i mod world_size, so a batch is the same whoever runs it. Counts are
    integers; the losses are added in batch order.
    """
    model.eval()
    # Batches of like length: less padding, and the order is fixed by the data.
    index = index[torch.sort(data.lengths[index], stable=True).indices]
    pieces = index.split(batch_size)
    losses = np.zeros(len(pieces))
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    for number in range(communicator.world_rank, len(pieces), communicator.world_size):
        batch = data.batch(pieces[number], device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(batch["input_ids"], batch["attention_mask"]).float()
        losses[number] = float(functional.cross_entropy(logits, batch["labels"], reduction="sum"))
        predicted = logits.argmax(dim=1).cpu().numpy()
        np.add.at(confusion, (batch["labels"].cpu().numpy(), predicted), 1)
    gathered = communicator.gather_bytes(losses.tobytes() + confusion.tobytes())
    all_losses = np.stack([np.frombuffer(part, np.float64, len(pieces)) for part in gathered])
    counts = [np.frombuffer(part, np.int64, offset=losses.nbytes) for part in gathered]
    # Each batch's loss is zero but on one process, so this sum has one term that counts.
    return Evaluation(
        confusion=np.sum(counts, axis=0).reshape(num_classes, num_classes),
        loss=float(all_losses.sum(axis=0).sum() / len(index)),
    )
