"""One client's local training: encoded examples, batches, the optimiser and its learning rate."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fedara_core.adapters import AdaptedModel
from fedara_core.method import Batch, Client, Method
from fedara_core.seeds import derive, generator
from fedara_core.state import ServerState

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """Shared settings of local training; exactly one of local_steps and local_epochs is set."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float
    weight_decay: float = 0.0
    warmup_rounds: int = 0
    schedule: Schedule = "constant"
    round_schedule: Schedule = "constant"
    proximal_mu: float = 0.0
    max_grad_norm: float | None = 1.0
    local_steps: int | None = None
    local_epochs: int | None = None
    batch_size: int = 16
    precision: Literal["fp32", "bf16"] = "fp32"
    frozen_prefix: Literal["recompute", "cache"] = "recompute"

    def num_steps(self, num_examples: int) -> int:
        """Optimiser steps of a client with so many examples in one round."""
        if self.local_steps is not None:
            return self.local_steps
        assert self.local_epochs is not None
        return self.local_epochs * -(-num_examples // self.batch_size)

    def lr_at(self, round_index: int, num_rounds: int) -> float:
        """Learning rate that a round starts with: linear growth over the first warmup_rounds, then
        round_schedule over the rest of num_rounds."""
        since = round_index - self.warmup_rounds
        if since < 0:
            return self.lr * ((round_index + 1) / (self.warmup_rounds + 1))
        return self.lr * decay(self.round_schedule, since, num_rounds - self.warmup_rounds)


def decay(schedule: Schedule, done: int, total: int) -> float:
    """Factor on the learning rate after a share p of the steps or rounds, p = done / total:

    constant 1; linear 1 - p; cosine (1 + cos(pi p)) / 2: those of transformers' get_scheduler.
    """
    if schedule == "constant":
        return 1.0
    share = min(1.0, done / total)
    return 1 - share if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Tokenised examples: input_ids (n, max_length) int32, padded; lengths, labels (n,) int64.

    first_text: the number of the first of them among all texts of a run.
    """

    input_ids: Tensor
    lengths: Tensor
    labels: Tensor
    first_text: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> "Encoded":
        """Copies of the examples `index` (n,)."""
        return Encoded(
            input_ids=self.input_ids[index],
            lengths=self.lengths[index],
            labels=self.labels[index],
        )

    def batch(self, index: Tensor, device: torch.device) -> Batch:
        """The examples `index` (n,), cut to the longest of them, on the device."""
        lengths = self.lengths[index]
        longest = int(lengths.max())
        positions = torch.arange(longest)
        return {
            "input_ids": self.input_ids[index, :longest].long().to(device),  # (n, longest)
            "attention_mask": (positions < lengths[:, None]).long().to(device),  # (n, longest)
            "labels": self.labels[index].to(device),  # (n,)
            "texts": index + self.first_text,  # (n,)
        }


def start_client(
    client: Client, method: Method, settings: LocalTraining, state: ServerState
) -> None:
    """Give a client that has downloaded `state` a fresh optimiser, and seed its dropout."""
    lr = settings.lr_at(state.round_index, state.num_rounds)
    client.make_optimizer = partial(_optimizer, client.model, method, settings, lr)
    if settings.schedule != "constant":
        num_steps = settings.num_steps(client.num_examples)
        client.decay = partial(decay, settings.schedule, total=num_steps)
    if settings.proximal_mu:
        client.proximal_mu, client.start = settings.proximal_mu, client.vector.clone()
    client.max_grad_norm = settings.max_grad_norm
    client.autocast = settings.precision == "bf16"
    # Every module: transformers hands over models whose inner modules have their dropout off.
    client.model.module.train()
    seed = derive(state.seed, "dropout", state.round_index, client.client_id)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # else nothing there draws
        torch.cuda.manual_seed(seed)


def _optimizer(
    model: AdaptedModel, method: Method, settings: LocalTraining, lr: float
) -> torch.optim.Optimizer:
    """Over the runs of the vector that train, neighbours of one learning rate together."""
    runs: list[tuple[float, int, int]] = []  # learning rate, start, stop
    for part, run in model.index.runs.items():
        own_lr = lr * method.lr_factor(part) if part else lr
        if run.start >= model.index.num_trained:
            continue
        if runs and runs[-1][0] == own_lr:
            runs[-1] = (own_lr, runs[-1][1], run.stop)
        else:
            runs.append((own_lr, run.start, run.stop))
    groups = []
    for own_lr, start, stop in runs:
        parameter = nn.Parameter(model.vector[start:stop])
        parameter.grad = model.gradient[start:stop]
        groups.append({"params": [parameter], "lr": own_lr, "initial_lr": own_lr})
    cls = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.SGD
    return cls(groups, lr=lr, weight_decay=settings.weight_decay, fused=True)


def batches(
    data: Encoded,
    shard: np.ndarray,
    settings: LocalTraining,
    *,
    seed: int,
    round_index: int,
    client_id: int,
    device: torch.device,
) -> Iterator[Batch]:
    """A client's batches of one round: its shard (n,) of example indices, reshuffled every pass.

    Batches hold batch_size examples, the last one of a pass what is left.
    """
    order = generator(seed, "batches", round_index, client_id)
    examples = torch.from_numpy(shard)
    left = settings.num_steps(len(shard))
    while left:
        passed = examples[torch.randperm(len(examples), generator=order)]
        for index in torch.split(passed, settings.batch_size)[:left]:
            yield data.batch(index, device)
            left -= 1
