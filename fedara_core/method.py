"""The Method protocol: init, download, local_step, upload, aggregate; and the client's half of it.

The base class is LoRA (arXiv 2106.09685) under weighted FedAvg (arXiv 1602.05629) of the live rows
and of the parameters that train whole, the head first of all. A method overrides what its paper
changes; it lives in methods/<name>.py and is found by that file name.
"""

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from fedara_core import methods
from fedara_core.adapters import AdaptedModel, AdapterForm, LowRank
from fedara_core.codec import payload_bytes
from fedara_core.errors import InputError
from fedara_core.factors import lora_parts
from fedara_core.merge.received import Received
from fedara_core.state import ServerState, Start, relaid, truncated
from fedara_core.wire import Header, Upload, make_upload, message_bytes

_NORM_VALUES = 1 << 16  # of a chunk of the gradient's norm
Batch = Mapping[str, Tensor]  # input_ids, attention_mask (n, length); labels, texts (n,)


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a message holds. num_values: float32 values that a lossy codec may code; num_exact:
    those that it leaves as they are; num_bits: single bits, such as a rank_mask's."""

    num_values: int
    num_exact: int = 0
    num_bits: int = 0

    def num_bytes(self, codec: str) -> int:
        """Length of the message, header included, with its values under this codec."""
        exact = payload_bytes("fp32", self.num_exact)
        return message_bytes(self.num_values, self.num_bits, codec) + exact


@dataclass(kw_only=True)
class Client:
    """One client during its local training of one round; of it only `kept` outlives the round.

    kept: tensors that stay at the client until it takes part again; only for stateful methods.
    decay: factor on the learning rates by the number of steps taken; None: 1. start: where the
    proximal term pulls to, (num_trained,). notes: what a method gathers while it trains.
    """

    client_id: int
    num_examples: int
    model: AdaptedModel
    kept: dict[str, Tensor] = field(default_factory=dict)
    make_optimizer: Callable[[], torch.optim.Optimizer] | None = None
    decay: Callable[[int], float] | None = None
    num_steps: int = 0  # taken
    proximal_mu: float = 0.0
    start: Tensor | None = None
    max_grad_norm: float | None = None
    autocast: bool = False
    losses: list[Tensor] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def vector(self) -> Tensor:
        """All that the client trains (num_trained,), to read or to change in place."""
        return self.model.vector[: self.model.index.num_trained]

    @property
    def gradient(self) -> Tensor:
        """Its gradient (num_trained,), to read or to change in place."""
        return self.model.gradient

    def backward(self, batch: Batch) -> None:
        """Mean cross-entropy of the batch and its gradient, in place of the last one's; the loss is
        kept."""
        self.gradient.zero_()
        device = batch["input_ids"].device.type
        with torch.autocast(device, torch.bfloat16) if self.autocast else contextlib.nullcontext():
            logits = self.model.logits(batch)
        loss = functional.cross_entropy(logits.float(), batch["labels"])  # logits (n, num_classes)
        loss.backward()  # type: ignore[no-untyped-call]
        self.losses.append(loss.detach())

    def step(self) -> None:
        """Add the proximal term to the gradient, clip it, and move the vector.

        The term is FedProx's mu / 2 ||w - w_start||^2 (arXiv 1812.06127, eq. 2) over all that
        trains; its gradient is mu (w - w_start).
        """
        if self.start is not None:
            self.gradient.add_(self.vector - self.start, alpha=self.proximal_mu)
        if self.max_grad_norm is not None:
            # By chunks: torch's float32 norm of one long vector is off by up to a per cent.
            norms = torch._foreach_norm(torch.split(self.gradient, _NORM_VALUES))
            total = torch.linalg.vector_norm(torch.stack(norms))
            self.gradient.mul_((self.max_grad_norm / (total + 1e-6)).clamp(max=1.0))
        if self.decay is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.decay(self.num_steps)
        self.optimizer.step()
        self.num_steps += 1

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """A fresh one, made for the first step."""
        assert self.make_optimizer is not None
        return self.make_optimizer()

    @property
    def train_loss(self) -> float:
        """Mean loss over the round's local steps; 0 without any."""
        if not self.losses:
            return 0.0
        return float(torch.stack(self.losses).double().mean())

    def make_upload(self, values: Tensor, bits: Tensor | None = None) -> Upload:
        """An upload of these values (n,) float32 and bits (m,) bool in the client's name."""
        return make_upload(
            client_id=self.client_id,
            num_examples=self.num_examples,
            train_loss=self.train_loss,
            values=values,
            bits=torch.zeros(0, dtype=torch.bool) if bits is None else bits,
        )

    @property
    def sent_values(self) -> Tensor:
        """A copy of what travels of the vector (num_sent,), on the CPU."""
        sent = self.model.vector[: self.model.index.num_sent].cpu()
        return torch.from_numpy(sent.numpy().copy())  # NumPy asks for huge pages: half the time


@dataclass(frozen=True, kw_only=True)
class Method:
    """Both halves of a method, client and server. Fields are its paper's hyperparameters.

    combine: how uploads come together. "mean": all clients send the same rows, and `aggregate` uses
    their mean alone; "masked": clients send rows of their own choice, which `sent_bits` tells, and
    `aggregate` uses their sum; "gather": `aggregate` uses every client's upload.
    stateful: clients keep tensors between rounds (`Client.kept`); personal: and so each has a model
    of its own, with which it is evaluated. uses_client_lora_ranks: clients may have unequal
    lora_rank. coded: what a lossy codec may touch besides uploads: "down", the server's message;
    "feedback", the next message, by what was left out of this one (a place in one message must be
    the same place in the next). plain_mean: the next state is the clients' mean in the place of
    what they sent, in the same layout and with the same `fixed`, round after round, so that a
    server optimiser can go on along it. low_rank: whether its layers have a low-rank branch, whose
    input adapter.dropout acts on. younger: hyperparameters that came after the method's first
    records; at their defaults they are no part of run_id. version: grows when the method's results
    change beyond rounding.
    """

    combine: ClassVar[Literal["mean", "masked", "gather"]] = "mean"
    stateful: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    uses_client_lora_ranks: ClassVar[bool] = False
    coded: ClassVar[tuple[Literal["down", "feedback"], ...]] = ()
    plain_mean: ClassVar[bool] = False
    low_rank: ClassVar[bool] = True
    younger: ClassVar[tuple[str, ...]] = ()
    version: ClassVar[int] = 1

    def init(self, start: Start) -> ServerState:
        """The state before round 0. May mark more of the model's parameters as trained whole."""
        return start.state(self, lora_parts(start.adapter, start.seed))

    def form(self, state: ServerState) -> AdapterForm:
        """How the state's rows act on a layer. May go by round_index and last_round."""
        return LowRank(scale=state.adapter.scale)

    def lr_factor(self, part: str) -> float:
        """Factor on the learning rate of one part of the rows, such as "A" or "E"."""
        return 1.0

    def download(self, model: AdaptedModel, state: ServerState, client: Client | None) -> Size:
        """Put the state into the model, for a client's training or (None) for evaluation.

        Returns what a server would send for it.
        """
        model.load(state.vector, state.index, self.form(state), fixed=state.fixed)
        return self.message_size(state, client)

    def message_size(self, state: ServerState, client: Client | None) -> Size:
        """What a server would send to the client, by one rule for all methods: what the seed and
        the pretrained model give is free. Before the first upload that is the whole start, its
        head and rank_masks too."""
        if client is None or state.is_start:
            return Size(num_values=0)
        return self.downlink(state, client.client_id)

    def downlink(self, state: ServerState, client_id: int) -> Size:
        """What a server would send to a client once an upload has come."""
        return Size(num_values=state.index.num_sent)

    def local_step(self, client: Client, batch: Batch) -> None:
        """One optimiser step on one batch."""
        client.backward(batch)
        client.step()

    def upload(self, client: Client, state: ServerState) -> Upload:
        """What trained and travels: the live rows and the whole parameters."""
        return client.make_upload(client.sent_values)

    def sent_bits(self, state: ServerState, header: Header) -> Tensor:
        """Which live triplets a client has sent, where it chooses: (live triplets,) bool."""
        return header.bits

    def row_weight(self, state: ServerState, upload: Upload) -> float | None:
        """What a client's rows weigh in a masked sum, a float32; None: its num_examples, as its
        whole parameters always do."""
        return None

    def aggregate(self, state: ServerState, received: Received) -> ServerState:
        """The next state. Pure: needs no model."""
        after = next_state(state, received, vector=with_mean(state, received.mean))
        return self._laid_out(after, self.form(state))

    def skip(self, state: ServerState) -> ServerState:
        """The next state where no upload came: the same values, in the next round's layout."""
        return self._laid_out(replace(state, round_index=state.round_index + 1), self.form(state))

    def _laid_out(self, after: ServerState, form: AdapterForm) -> ServerState:
        """A state that lies in this form, in its own."""
        own = self.form(after)
        return after if own == form else relaid(after, own)

    def own_state(self, state: ServerState, client_id: int) -> ServerState:
        """What a client of its lora_rank gets of the state."""
        return truncated(state, self.form(state), state.adapter.client_lora_ranks[client_id])

    @property
    def own_rows(self) -> bool:
        """Whether clients upload rows of their own choice or capacity, so that server and client
        have no common reference for a codec's difference."""
        return self.combine == "masked" or self.uses_client_lora_ranks


class Alternating(Method):
    """LoRA whose halves train in turn: B in even rounds (from 0), A in odd ones."""

    def form(self, state: ServerState) -> LowRank:
        resting = "B" if state.round_index % 2 else "A"
        return LowRank(scale=state.adapter.scale, frozen=(resting,))

    def downlink(self, state: ServerState, client_id: int) -> Size:
        """The half that rests in this round, which the last one trained; both to a client that
        missed that, as soon as both have trained."""
        if state.round_index > 1 and state.rounds_behind(client_id) > 1:
            return Size(num_values=state.index.size)
        rested = sum(t.numel() for p in self.form(state).frozen for t in state.parts[p].values())
        return Size(num_values=rested + state.index.num_sent - state.index.num_row_values)


def next_state(state: ServerState, received: Received, **changes: Any) -> ServerState:
    """The state of the next round: `changes` to its fields, and who took part."""
    last_round = state.last_round.clone()
    last_round[received.client_ids] = state.round_index
    return replace(state, last_round=last_round, round_index=state.round_index + 1, **changes)


def with_mean(state: ServerState, mean: Tensor) -> Tensor:
    """The state's vector with the clients' mean (num_sent or more,) in place of what they sent."""
    num_sent = state.index.num_sent
    rest = state.vector[num_sent:]
    return torch.cat([mean[:num_sent], rest]) if len(rest) else mean[:num_sent]


def with_unsent(
    state: ServerState, received: Received, share: Tensor, *, zero: str = ""
) -> Received:
    """A masked mean in which a row that a client did not send counts as unchanged, not as zero.

    share: (live triplets,) float64, of the examples whose clients have sent each. zero: the part of
    a row that counts as zero all the same.
    """
    absent = state.index.per_value(1 - share, whole=0.0)
    if zero in state.index.runs:
        absent[state.index.runs[zero]] = 0
    mean = (received.mean.double() + absent * state.sent.double()).float()
    return Received(received.headers, mean=mean)


def missed_values(state: ServerState, client_id: int) -> int:
    """Floats that bring a client's copy of a change of W0 up to date, over all adapters.

    extra["stacked_rows"] (num_rounds,): rows of the factors whose product was added to each adapter
    in each round. The client gets the factors of the rounds since it last took part, or the dense
    change of an adapter (d_out d_in) where that is less.
    """
    first = max(0, state.round_index - state.rounds_behind(client_id))
    num_rows = int(state.extra["stacked_rows"][first : state.round_index].sum())
    shapes = state.adapter.shapes.values()
    return sum(min(num_rows * (d_in + d_out), d_in * d_out) for d_out, d_in in shapes)


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
