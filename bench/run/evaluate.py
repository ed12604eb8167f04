"""Evaluation sharded over processes, with the same result for any number of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bench.run.clients import home, load_client
from bench.run.job import Job
from fedara_core.adapters import AdaptedModel
from fedara_core.comm.base import Communicator
from fedara_core.seeds import generator
from fedara_core.state import ServerState
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
        return {
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "test_loss": self.loss,
            "eval_examples": self.num_examples,
            **client_spread(self.client_accuracies(label_counts)),
        }


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates models on `data`; every process calls it and gets the same result.

    label_counts: (num_clients, num_classes), each client's own label mix.
    """

    model: AdaptedModel
    data: Encoded
    label_counts: np.ndarray
    batch_size: int
    precision: str
    device: torch.device
    communicator: Communicator

    @property
    def num_classes(self) -> int:
        return int(self.label_counts.shape[1])

    def shared_model(self, index: Tensor) -> Evaluation:
        """One model that all clients share, on the examples `index` (n,).

        Batch i goes to process i mod world_size, so a batch is the same whoever runs it.
        """
        # Batches of like length: less padding, and the order is fixed by the data.
        index = index[torch.sort(self.data.lengths[index], stable=True).indices]
        pieces = torch.split(index, self.batch_size)
        losses = np.zeros(len(pieces))
        confusion = np.zeros((self.num_classes, self.num_classes), dtype=np.int64)
        communicator = self.communicator
        for number in range(communicator.world_rank, len(pieces), communicator.world_size):
            losses[number], counts = self._evaluate(pieces[number])
            confusion += counts
        return self._sum_up(losses, confusion, len(index))

    def client_models(
        self, index: Tensor, mine: Sequence[int], load_client: Callable[[int], object], *, seed: int
    ) -> dict[str, float]:
        """The record's keys where each client has a model of its own.

        load_client(client_id) makes it the one that is evaluated.
        index: (n,) examples to evaluate; mine: the client_ids that live on this process.
        Example j of a seeded shuffle is evaluated by client j mod num_clients, so accuracy and loss
        estimate the mean over clients without bias, in one pass. For client_accuracy_* each
        client evaluates as many examples again, drawn by its own label mix.
        """
        num_clients = len(self.label_counts)
        shuffled = index[torch.randperm(len(index), generator=generator(seed, "judges"))]
        losses, own = np.zeros(num_clients), np.full(num_clients, np.nan)
        confusion = np.zeros((self.num_classes, self.num_classes), dtype=np.int64)
        for client_id in mine:
            load_client(client_id)
            own_share = shuffled[client_id::num_clients]  # none if there are more clients
            for piece in torch.split(own_share, self.batch_size) if len(own_share) else ():
                loss, counts = self._evaluate(piece)
                losses[client_id] += loss
                confusion += counts
            own[client_id] = self._own_accuracy(index, client_id, seed)
        result = self._sum_up(losses, confusion, len(index))
        gathered = [np.frombuffer(p) for p in self.communicator.gather_bytes(own.tobytes())]
        by_client = np.fmax.reduce(gathered)  # NaN but on the client's process
        return result.record(self.label_counts) | client_spread(by_client[~np.isnan(by_client)])

    def _own_accuracy(self, index: Tensor, client_id: int, seed: int) -> float:
        """Accuracy of the loaded model on examples drawn, with replacement, by a client's labels.

        NaN if no evaluated example has a label of the client's.
        """
        labels = self.data.labels[index]
        present = torch.bincount(labels, minlength=self.num_classes)
        share = torch.from_numpy(self.label_counts[client_id]) / present.clamp(min=1)
        weights = share[labels]
        if not weights.any():
            return float("nan")
        count = -(-len(index) // len(self.label_counts))
        own = generator(seed, "own_mix", client_id)
        drawn = index[torch.multinomial(weights, count, replacement=True, generator=own)]
        pieces = torch.split(drawn, self.batch_size)
        return float(sum(np.trace(self._evaluate(piece)[1]) for piece in pieces)) / count

    @torch.no_grad()
    def _evaluate(self, piece: Tensor) -> tuple[float, np.ndarray]:
        """Sum of losses and confusion counts of one batch."""
        self.model.module.eval()
        batch = self.data.batch(piece, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self.model.logits(batch).float()
        loss = float(functional.cross_entropy(logits, batch["labels"], reduction="sum"))
        counts = np.zeros((self.num_classes, self.num_classes), dtype=np.int64)
        predicted = logits.argmax(dim=1).cpu().numpy()
        np.add.at(counts, (batch["labels"].cpu().numpy(), predicted), 1)
        return loss, counts

    def _sum_up(self, losses: np.ndarray, confusion: np.ndarray, num_examples: int) -> Evaluation:
        """The evaluation from every process's part: sums of losses (n,), of which each is zero but
        on one process, and confusion counts."""
        gathered = self.communicator.gather_bytes(losses.tobytes() + confusion.tobytes())
        all_losses = np.stack([np.frombuffer(part, np.float64, len(losses)) for part in gathered])
        counts = [np.frombuffer(part, np.int64, offset=losses.nbytes) for part in gathered]
        # The order of the sum is that of the batches or clients, for any number of processes.
        return Evaluation(
            confusion=np.sum(counts, axis=0).reshape(confusion.shape),
            loss=float(all_losses.sum(axis=0).sum() / num_examples),
        )


def evaluate_round(job: Job, state: ServerState, communicator: Communicator) -> dict[str, float]:
    """The evaluation's record keys; none in a round that is not evaluated."""
    settings = job.config.evaluate
    last = state.round_index == state.num_rounds
    if not last and state.round_index % settings.every:
        return {}
    index = torch.arange(len(job.evaluated))
    if settings.eval_examples is not None and not last:
        drawn = torch.randperm(len(index), generator=generator(state.seed, "eval_examples"))
        index = drawn[: settings.eval_examples]
    evaluator = Evaluator(
        model=job.model,
        data=job.evaluated,
        label_counts=job.label_counts,
        batch_size=settings.batch_size,
        precision=job.training.precision,
        device=job.device,
        communicator=communicator,
    )
    if not job.method.personal:
        job.method.download(job.model, state, None)
        return evaluator.shared_model(index).record(job.label_counts)
    homes = [home(client_id, communicator.world_size) for client_id in range(len(job.shards))]
    mine = [i for i, rank in enumerate(homes) if rank == communicator.world_rank]
    return evaluator.client_models(index, mine, partial(load_client, job, state), seed=state.seed)


def client_spread(accuracies: np.ndarray) -> dict[str, float]:
    """Record keys for accuracies (num_clients,) on the clients' own label mixes; none for none."""
    if not accuracies.size:
        return {}
    return {
        "client_accuracy_mean": float(accuracies.mean()),
        "client_accuracy_std": float(accuracies.std()),
        "client_accuracy_p10": float(np.percentile(accuracies, 10)),
    }
