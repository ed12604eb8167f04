"""The records of a round and the Method protocol: init, download, local_step, upload, aggregate.

The base class is weighted FedAvg (arXiv 1602.05629) of the live rows and the head. A method
overrides what its paper changes; it lives in methods/<name>.py and is found by that file name.
"""

import contextlib
import hashlib
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedara_core import methods
from fedara_core.adapters import Form, Masks, Rows, Shape, adapter_shapes, read_rows, write_rows
from fedara_core.errors import InputError
from fedara_core.wire import Upload, message_bytes

Batch = Mapping[str, Tensor]  # input_ids, attention_mask (n, length); labels (n,)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What the methods of a comparison share. scale = lora_alpha / lora_rank, for good."""

    lora_rank: int
    lora_alpha: float
    shapes: Mapping[str, Shape]  # adapter name -> (d_out, d_in), in name order

    def __post_init__(self) -> None:
        for name, shape in self.shapes.items():
            if self.lora_rank > min(shape):
                raise InputError(
                    f"adapter.lora_rank = {self.lora_rank} is larger than layer {name} "
                    f"({shape[0]} x {shape[1]}); allowed: 1 to {min(shape)}"
                )

    @property
    def scale(self) -> float:
        return self.lora_alpha / self.lora_rank

    @classmethod
    def of(cls, model: nn.Module, *, lora_rank: int, lora_alpha: float) -> "AdapterConfig":
        """The config for a model that `inject` has been over."""
        shapes = adapter_shapes(model)
        return cls(lora_rank=lora_rank, lora_alpha=lora_alpha, shapes=shapes)


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """What all processes agree on after a round; together with the config it is the checkpoint.

    rows: name -> (r, width) float32, zeros where rank_masks (r,) bool is False. head: name ->
    tensor. round_index: the next round to run.
    """

    adapter: AdapterConfig
    seed: int
    num_rounds: int
    rows: Rows
    rank_masks: Masks
    head: Mapping[str, Tensor]
    round_index: int = 0

    @property
    def live_triplets(self) -> dict[str, int]:
        """Number of live triplets by adapter, in name order."""
        return {name: int(self.rank_masks[name].sum()) for name in sorted(self.rank_masks)}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under a unique name, in a fixed order; `with_tensors` is the inverse."""
        parts = {"rows": self.rows, "rank_mask": self.rank_masks, "head": self.head}
        return {
            f"{kind}/{name}": part[name] for kind, part in parts.items() for name in sorted(part)
        }

    def with_tensors(self, tensors: Mapping[str, Tensor], round_index: int) -> "ServerState":
        """This state with the tensors and the round of a saved one."""
        parts: dict[str, dict[str, Tensor]] = {"rows": {}, "rank_mask": {}, "head": {}}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            parts[kind][name] = tensor
        return replace(
            self,
            rows=parts["rows"],
            rank_masks=parts["rank_mask"],
            head=parts["head"],
            round_index=round_index,
        )

    def digest(self) -> str:
        """SHA-256 over names, shapes and bits of all tensors, in hex."""
        sha = hashlib.sha256()
        for name, tensor in self.tensors().items():
            sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            sha.update(tensor.contiguous().numpy().tobytes())
        return sha.hexdigest()


@dataclass(kw_only=True)
class Client:
    """One client during its local training of one round; nothing of it outlives the round."""

    client_id: int
    num_examples: int
    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    max_grad_norm: float | None = None
    autocast: bool = False
    losses: list[Tensor] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)  # what a method gathers while it trains

    def backward(self, batch: Batch) -> None:
        """Mean cross-entropy of the batch and its gradients; the loss is kept."""
        device = batch["input_ids"].device.type
        with torch.autocast(device, torch.bfloat16) if self.autocast else contextlib.nullcontext():
            logits = self.model(batch["input_ids"], batch["attention_mask"])  # (n, num_classes)
        loss = functional.cross_entropy(logits.float(), batch["labels"])
        loss.backward()  # type: ignore[no-untyped-call]
        self.losses.append(loss.detach())

    def step(self) -> None:
        """Clip the gradients, move the parameters, forget the gradients."""
        assert self.optimizer is not None
        if self.max_grad_norm is not None:
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def train_loss(self) -> float:
        """Mean loss over the round's local steps."""
        return float(torch.stack(self.losses).double().mean())


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Both halves of a method, client and server. Fields are its paper's hyperparameters."""

    @abstractmethod
    def init(
        self, model: nn.Module, adapter: AdapterConfig, *, seed: int, num_rounds: int
    ) -> ServerState:
        """The state before round 0, the same on every process."""

    @abstractmethod
    def form(self, state: ServerState) -> Form:
        """How the state's rows act on a layer."""

    def lr_factor(self, part: str) -> float:
        """Factor on the learning rate of one part of the rows, such as "A" or "E"."""
        return 1.0

    def download(self, model: nn.Module, state: ServerState, client: Client | None) -> int:
        """Put the state into the model, for a client's training or (None) for evaluation.

        Returns the bytes that a server would send for it.
        """
        write_rows(model, state.rows, state.rank_masks, self.form(state))
        write_head(model, state.head)
        return message_bytes(num_live_values(state))

    def local_step(self, client: Client, batch: Batch) -> None:
        """One optimiser step on one batch."""
        client.backward(batch)
        client.step()

    def upload(self, client: Client, state: ServerState) -> Upload:
        """The live rows and the head after local training."""
        return make_upload(client, live_values(client.model, state))

    def aggregate(self, state: ServerState, uploads: Sequence[Upload]) -> ServerState:
        """The next state. Pure: needs no model; `uploads` come in client_id order."""
        rows, head, _ = split_values(weighted_mean(uploads), state)
        return replace(state, rows=rows, head=head, round_index=state.round_index + 1)


def start_state(
    model: nn.Module, adapter: AdapterConfig, rows: Rows, *, seed: int, num_rounds: int
) -> ServerState:
    """A state before round 0 in which every row is live and the head is the model's."""
    return ServerState(
        adapter=adapter,
        seed=seed,
        num_rounds=num_rounds,
        rows=rows,
        rank_masks={name: torch.ones(len(rows[name]), dtype=torch.bool) for name in rows},
        head={name: p.detach().cpu().clone() for name, p in head_parameters(model).items()},
    )


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The classification head's parameters by name: all that train outside the adapters."""
    named = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".parts." not in name
    }
    return dict(sorted(named.items()))


def write_head(model: nn.Module, head: Mapping[str, Tensor]) -> None:
    """Copy a state's head into the model."""
    with torch.no_grad():
        for name, parameter in head_parameters(model).items():
            parameter.copy_(head[name])


def num_live_values(state: ServerState) -> int:
    """Floats in the live rows and the head."""
    rows = sum(state.rows[name].shape[1] * n for name, n in state.live_triplets.items())
    return rows + sum(tensor.numel() for tensor in state.head.values())


def live_values(model: nn.Module, state: ServerState) -> Tensor:
    """The model's live rows in name order, then its head in name order: (num_live_values,)."""
    rows = read_rows(model)
    head = {name: p.detach().cpu() for name, p in head_parameters(model).items()}
    parts = [rows[name] for name in sorted(rows)] + [head[name] for name in sorted(state.head)]
    return torch.cat([part.reshape(-1) for part in parts])


def make_upload(client: Client, values: Tensor, bits: Tensor | None = None) -> Upload:
    """An upload of these values (n,) float32 and bits (m,) bool in the client's name."""
    return Upload(
        client_id=client.client_id,
        num_examples=client.num_examples,
        train_loss=client.train_loss,
        values=values,
        bits=torch.zeros(0, dtype=torch.bool) if bits is None else bits,
    )


def weighted_mean(uploads: Sequence[Upload]) -> Tensor:
    """FedAvg's sum_k p_k values_k, p_k = n_k / sum n, added in order in float64; float32 out."""
    num_examples = sum(upload.num_examples for upload in uploads)
    total = torch.zeros(uploads[0].values.numel(), dtype=torch.float64)
    for upload in uploads:
        total += upload.values.double() * (upload.num_examples / num_examples)
    return total.float()


def split_values(values: Tensor, state: ServerState) -> tuple[Rows, dict[str, Tensor], Tensor]:
    """Inverse of `live_values` for a state's masks: rows (zero where dead), head, the rest."""
    start = 0

    def take(count: int) -> Tensor:
        nonlocal start
        start += count
        return values[start - count : start]

    rows: Rows = {}
    for name, live in state.live_triplets.items():
        rows[name] = torch.zeros_like(state.rows[name])
        width = rows[name].shape[1]
        rows[name][state.rank_masks[name]] = take(live * width).reshape(live, width)
    head = {
        name: take(state.head[name].numel()).reshape(state.head[name].shape)
        for name in sorted(state.head)
    }
    return rows, head, values[start:]


def method_names() -> list[str]:
    """The methods there are: the files of fedara_core/methods."""
    return sorted(module.name for module in pkgutil.iter_modules(methods.__path__))


def load_method(name: str) -> type[Method]:
    """The one Method class that methods/<name>.py defines."""
    if name not in method_names():
        raise InputError(f"method.name = {name!r} is unknown; allowed: {', '.join(method_names())}")
    module = importlib.import_module(f"{methods.__name__}.{name}")
    found = [
        item
        for item in vars(module).values()
        if isinstance(item, type)
        and issubclass(item, Method)
        and item.__module__ == module.__name__
    ]
    assert len(found) == 1, f"methods/{name}.py must define exactly one Method, not {len(found)}"
    return found[0]
