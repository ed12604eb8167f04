"""The records of a round and the Method protocol: init, download, local_step, upload, aggregate.

The base class is LoRA (arXiv 2106.09685) under weighted FedAvg (arXiv 1602.05629) of the live rows
and of the parameters that train whole, the head first of all. A method overrides what its paper
changes; it lives in methods/<name>.py and is found by that file name.
"""

import contextlib
import hashlib
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedara_core import methods
from fedara_core.adapters import (
    AdapterConfig,
    Fixed,
    Form,
    Layout,
    LowRank,
    Masks,
    Rows,
    columns,
    count_live,
    named_adapters,
    write_rows,
)
from fedara_core.errors import InputError
from fedara_core.factors import lora_rows
from fedara_core.wire import Upload, message_bytes

_CHUNK = 1 << 18  # values summed at a time: their float64 sum stays in the cache
Batch = Mapping[str, Tensor]  # input_ids, attention_mask (n, length); labels (n,)


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """What all processes agree on after a round; together with the config it is the checkpoint.

    rows: name -> (r, width) float32, zeros where rank_masks (r,) bool is False. whole: parameters
    of the model that train whole, by name: the head, and in some methods others. fixed: part ->
    adapter name -> tensor that clients need and do not train. extra: what only the server keeps.
    last_round: (num_clients,) int64, the last round each client took part in, -1 before its first.
    round_index: the next round to run.
    """

    adapter: AdapterConfig
    seed: int
    num_rounds: int
    rows: Rows
    rank_masks: Masks
    whole: Mapping[str, Tensor]
    fixed: Fixed = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    last_round: Tensor
    round_index: int = 0

    @cached_property
    def live_triplets(self) -> dict[str, int]:
        """Number of live triplets by adapter, in name order."""
        return count_live(self.rank_masks)

    @cached_property
    def num_triplets(self) -> int:
        """All triplets, live or dead: the bits of a rank_mask message."""
        return sum(len(mask) for mask in self.rank_masks.values())

    @cached_property
    def counted_values(self) -> dict[object, int]:
        """What `num_values` has found so far, by form and parts."""
        return {}

    def rounds_behind(self, client_id: int) -> int:
        """Rounds since the client last downloaded: 1 if it was in the last round's cohort,
        round_index + 1 if it never took part (so 1 for all in round 0). What a method that sends
        updates must catch up on."""
        return self.round_index - int(self.last_round[client_id])

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under a unique name, in a fixed order; `with_tensors` is the inverse."""
        parts: dict[str, Mapping[str, Tensor]] = {
            "rows": self.rows,
            "rank_mask": self.rank_masks,
            "whole": self.whole,
            **{f"fixed-{part}": self.fixed[part] for part in sorted(self.fixed)},
            "extra": self.extra,
            "server": {"last_round": self.last_round},
        }
        return {
            f"{kind}/{name}": part[name] for kind, part in parts.items() for name in sorted(part)
        }

    def with_tensors(self, tensors: Mapping[str, Tensor], round_index: int) -> "ServerState":
        """This state with the tensors and the round of a saved one."""
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            parts.setdefault(kind, {})[name] = tensor
        fixed = {kind: part for kind, part in parts.items() if kind.startswith("fixed-")}
        return replace(
            self,
            rows=parts.get("rows", {}),
            rank_masks=parts.get("rank_mask", {}),
            whole=parts.get("whole", {}),
            fixed={kind.removeprefix("fixed-"): part for kind, part in fixed.items()},
            extra=parts.get("extra", {}),
            last_round=parts["server"]["last_round"],
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
    """One client during its local training of one round; of it only `kept` outlives the round.

    kept: tensors that stay at the client until it takes part again; only for stateful methods.
    """

    client_id: int
    num_examples: int
    model: nn.Module
    kept: dict[str, Tensor] = field(default_factory=dict)
    make_optimizer: Callable[[], torch.optim.Optimizer] | None = None
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
        if self.max_grad_norm is not None:
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

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


@dataclass(frozen=True, kw_only=True)
class Method:
    """Both halves of a method, client and server. Fields are its paper's hyperparameters.

    stateful: clients keep tensors between rounds (`Client.kept`), and each is evaluated with its
    own. uses_client_lora_ranks: the method has a use for clients of unequal lora_rank.
    needs_factors: `aggregate` uses each client's values, not only their weighted mean. own_rows:
    clients choose or are dealt the rows that they upload. sends_trained: a server sends what trains
    (not, say, factors of a change of W0), so that it can be coded. steady_rows: a place in one
    round's upload is the same place in the last one's, so that an error can be fed back.
    """

    stateful: ClassVar[bool] = False
    uses_client_lora_ranks: ClassVar[bool] = False
    needs_factors: ClassVar[bool] = False
    own_rows: ClassVar[bool] = False
    sends_trained: ClassVar[bool] = True
    steady_rows: ClassVar[bool] = True

    def init(
        self, model: nn.Module, adapter: AdapterConfig, *, seed: int, num_rounds: int
    ) -> ServerState:
        """The state before round 0. May mark more of the model's parameters as trained whole."""
        rows = lora_rows(adapter, seed)
        return start_state(model, adapter, rows, seed=seed, num_rounds=num_rounds)

    def form(self, state: ServerState) -> Form:
        """How the state's rows act on a layer."""
        return LowRank(scale=state.adapter.scale)

    def lr_factor(self, part: str) -> float:
        """Factor on the learning rate of one part of the rows, such as "A" or "E"."""
        return 1.0

    def download(self, model: nn.Module, state: ServerState, client: Client | None) -> int:
        """Put the state into the model, for a client's training or (None) for evaluation.

        Returns the bytes that a server would send for it.
        """
        form = self.form(state)
        write_rows(model, state.rows, state.rank_masks, form, fixed=state.fixed)
        write_whole(model, state.whole)
        return message_bytes(num_values(state, form))

    def local_step(self, client: Client, batch: Batch) -> None:
        """One optimiser step on one batch."""
        client.backward(batch)
        client.step()

    def upload(self, client: Client, state: ServerState) -> Upload:
        """What trained: the live rows and the whole parameters."""
        return make_upload(client, live_values(client.model, state))

    def reference(self, state: ServerState) -> Tensor:
        """What a client would upload that did not train (n,): what lossy codecs code the difference
        from. Empty where clients upload rows of their own: then they code the values."""
        if self.own_rows:
            return torch.zeros(0)
        return join_values(state.rows, state.whole, state, self.form(state))

    def aggregate(self, state: ServerState, uploads: Sequence[Upload]) -> ServerState:
        """The next state. Pure: needs no model; `uploads` come in client_id order."""
        rows, whole, _ = split_values(weighted_mean(uploads), state, self.form(state))
        return next_state(state, uploads, rows=rows, whole=whole)


def start_state(
    model: nn.Module,
    adapter: AdapterConfig,
    rows: Rows,
    *,
    seed: int,
    num_rounds: int,
    fixed: Fixed | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> ServerState:
    """A state before round 0: every row live, the whole parameters as they are in the model."""
    return ServerState(
        adapter=adapter,
        seed=seed,
        num_rounds=num_rounds,
        rows=rows,
        rank_masks={name: torch.ones(len(rows[name]), dtype=torch.bool) for name in rows},
        whole={name: p.detach().cpu().clone() for name, p in whole_parameters(model).items()},
        fixed=fixed or {},
        extra=extra or {},
        last_round=torch.full((len(adapter.client_lora_ranks),), -1),
    )


def start_with_delta(
    model: nn.Module, adapter: AdapterConfig, *, seed: int, num_rounds: int
) -> ServerState:
    """LoRA's start, with a change of W0 that is zero so far (fixed["delta"]) and the history that
    `missed_values` needs of what was added to it (extra["stacked_rows"], (num_rounds,) int64)."""
    return start_state(
        model,
        adapter,
        lora_rows(adapter, seed),
        seed=seed,
        num_rounds=num_rounds,
        fixed={"delta": {name: torch.zeros(shape) for name, shape in adapter.shapes.items()}},
        extra={"stacked_rows": torch.zeros(num_rounds, dtype=torch.int64)},
    )


def next_state(state: ServerState, uploads: Sequence[Upload], **changes: Any) -> ServerState:
    """The state of the next round: `changes` to its fields, and who took part."""
    last_round = state.last_round.clone()
    last_round[[upload.client_id for upload in uploads]] = state.round_index
    new = replace(state, last_round=last_round, round_index=state.round_index + 1, **changes)
    if new.rank_masks is state.rank_masks:  # counting them takes longer than all of the above
        vars(new)["live_triplets"] = state.live_triplets
    return new


def whole_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train outside the adapters' rows, by name: the head's, and more where a
    method says so."""
    return {name: p for name, p in _base_parameters(model).items() if p.requires_grad}


def _base_parameters(model: nn.Module) -> Mapping[str, nn.Parameter]:
    """The parameters outside the adapters' rows, by name, in name order."""
    found: dict[str, nn.Parameter] | None = getattr(model, "base_parameters", None)
    if found is None:
        found = dict(sorted(p for p in model.named_parameters() if ".parts." not in p[0]))
    return found


def freeze_head(model: nn.Module) -> None:
    """Leave the head as it is: it no longer trains, and so does not travel."""
    for parameter in whole_parameters(model).values():
        parameter.requires_grad_(False)


def write_whole(model: nn.Module, whole: Mapping[str, Tensor]) -> None:
    """Copy a state's whole parameters into the model."""
    parameters = _base_parameters(model)
    with torch.no_grad():
        for name, values in whole.items():
            parameters[name].copy_(values)


def num_values(
    state: ServerState,
    form: Form,
    *,
    parts: Sequence[str] | None = None,
    rank_masks: Masks | None = None,
) -> int:
    """Floats in these parts (by default all) of the live rows, and in the whole parameters."""
    if rank_masks is not None:
        return _count_values(state, form, parts, count_live(rank_masks))
    key = form, None if parts is None else tuple(parts)
    if key not in state.counted_values:  # every client's download asks
        state.counted_values[key] = _count_values(state, form, parts, state.live_triplets)
    return state.counted_values[key]


def _count_values(
    state: ServerState, form: Form, parts: Sequence[str] | None, num_live: Mapping[str, int]
) -> int:
    rows = 0
    for name, count in num_live.items():
        shape = state.adapter.shapes[name]
        rows += count * (form.width(shape) if parts is None else len(columns(form, shape, parts)))
    return rows + sum(tensor.numel() for tensor in state.whole.values())


def first_rows(rank_masks: Masks, lora_rank: int) -> Masks:
    """The live rows among the first lora_rank ones: what a client of that capacity trains."""
    return {name: mask & (torch.arange(len(mask)) < lora_rank) for name, mask in rank_masks.items()}


def live_values(
    model: nn.Module, state: ServerState, *, parts: Sequence[str] | None = None
) -> Tensor:
    """The parts (by default those that train) of the model's live rows in name order, then its
    whole parameters in name order: (num_values,)."""
    parameters = _base_parameters(model)
    whole = [parameters[name] for name in sorted(state.whole)]
    layout: Layout | None = getattr(model, "layout", None)
    if layout is not None and layout.intact:
        return layout.read(parts, whole)
    pieces = []
    for _, adapter in named_adapters(model):
        if adapter.num_live:
            assert adapter.form is not None
            pieces.append(adapter.read()[:, columns(adapter.form, adapter.shape, parts)])
    pieces += [parameter.detach().cpu() for parameter in whole]
    return torch.cat([piece.reshape(-1) for piece in pieces])


def make_upload(client: Client, values: Tensor, bits: Tensor | None = None) -> Upload:
    """An upload of these values (n,) float32 and bits (m,) bool in the client's name."""
    return Upload(
        client_id=client.client_id,
        num_examples=client.num_examples,
        train_loss=client.train_loss,
        values=values,
        bits=torch.zeros(0, dtype=torch.bool) if bits is None else bits,
    )


def client_shares(uploads: Sequence[Upload]) -> list[float]:
    """p_k = n_k / sum n of each upload."""
    num_examples = sum(upload.num_examples for upload in uploads)
    return [upload.num_examples / num_examples for upload in uploads]


def weighted_mean(uploads: Sequence[Upload]) -> Tensor:
    """FedAvg's sum_k n_k values_k / sum_k n_k of equally long values: float32, added in float64 in
    client_id order.

    Uploads that share one tensor of values already hold their mean. ValueError for unequal lengths.
    """
    first = uploads[0].values
    if all(upload.values is first for upload in uploads):
        return first
    if any(upload.values.numel() != first.numel() for upload in uploads):
        lengths = {upload.client_id: upload.values.numel() for upload in uploads}
        raise ValueError(f"uploads differ in length, so they have no mean; by client_id: {lengths}")
    num_examples = sum(upload.num_examples for upload in uploads)
    mean = torch.empty_like(first)
    for start in range(0, mean.numel(), _CHUNK):
        piece = mean[start : start + _CHUNK]
        total = torch.zeros(piece.numel(), dtype=torch.float64)
        for upload in uploads:  # float32 by a whole number: exact in float64
            total.add_(upload.values[start : start + _CHUNK], alpha=upload.num_examples)
        piece.copy_(total / num_examples)
    return mean


def mean_whole(uploads: Sequence[Upload], state: ServerState) -> dict[str, Tensor]:
    """FedAvg of the whole parameters, which end the uploads, however many values precede them."""
    num_whole = sum(tensor.numel() for tensor in state.whole.values())
    ends = [replace(u, values=u.values[u.values.numel() - num_whole :]) for u in uploads]
    means = torch.split(weighted_mean(ends), [state.whole[n].numel() for n in sorted(state.whole)])
    named = zip(sorted(state.whole), means, strict=True)
    return {name: mean.reshape(state.whole[name].shape) for name, mean in named}


def alternating_bytes(state: ServerState, form: Form, client: Client | None) -> int:
    """What a server sends where the halves of LoRA's pairs train in turn: the half that rests in
    this round, which the last one trained; both to a client that missed that, and in round 0."""
    fresh = client is None or state.round_index == 0 or state.rounds_behind(client.client_id) > 1
    return message_bytes(num_values(state, form, parts=None if fresh else form.frozen))


def missed_values(state: ServerState, client_id: int, stacked_rows: Tensor) -> int:
    """Floats that bring a client's copy of a change of W0 up to date, over all adapters.

    stacked_rows (num_rounds,): rows of the factors whose product was added to each adapter in each
    round. The client gets the factors of the rounds since it last took part, or the dense change of
    an adapter (d_out d_in) where that is less.
    """
    first = max(0, state.round_index - state.rounds_behind(client_id))
    num_rows = int(stacked_rows[first : state.round_index].sum())
    shapes = state.adapter.shapes.values()
    return sum(min(num_rows * (d_in + d_out), d_in * d_out) for d_out, d_in in shapes)


def split_values(
    values: Tensor,
    state: ServerState,
    form: Form,
    *,
    parts: Sequence[str] | None = None,
    rank_masks: Masks | None = None,
) -> tuple[Rows, dict[str, Tensor], Tensor]:
    """Inverse of `live_values`: the state's rows with these values written over the parts (by
    default those that train) of the live rows; the whole parameters; the values that are left.

    `rank_masks` says which rows the values are of, if not of all live ones of the state.
    """
    live = state.live_triplets if rank_masks is None else count_live(rank_masks)
    rank_masks = state.rank_masks if rank_masks is None else rank_masks
    names = sorted(state.rows)
    sent = {name: columns(form, state.adapter.shapes[name], parts) for name in names}
    sizes = [live[name] * len(sent[name]) for name in names]
    whole_sizes = [state.whole[name].numel() for name in sorted(state.whole)]
    end = sum(sizes)
    # The rows are the caller's to change, so that they are copied; in one go, which is faster.
    new_rows = torch.split(values[:end].clone(), sizes)
    rows: Rows = {}
    for name, new, size in zip(names, new_rows, sizes, strict=True):
        old = state.rows[name]
        if size == old.numel():
            rows[name] = new.view_as(old)
            continue
        rows[name] = old.clone()
        if live[name]:
            rows[name][rank_masks[name].nonzero(), sent[name]] = new.view(live[name], -1)
    new_whole = torch.split(values[end : end + sum(whole_sizes)], whole_sizes)
    whole = {
        name: new.view(state.whole[name].shape)
        for name, new in zip(sorted(state.whole), new_whole, strict=True)
    }
    return rows, whole, values[end + sum(whole_sizes) :]


def join_values(rows: Rows, whole: Mapping[str, Tensor], state: ServerState, form: Form) -> Tensor:
    """Inverse of `split_values`: what trains of the state's live rows, then what trains whole."""
    pieces = []
    for name in sorted(rows):
        trained = columns(form, state.adapter.shapes[name])
        live = rows[name][state.rank_masks[name]]
        pieces.append((live if len(trained) == live.shape[1] else live[:, trained]).reshape(-1))
    return torch.cat([*pieces, *(whole[name].reshape(-1) for name in sorted(whole))])


def bits_to_masks(bits: Tensor, state: ServerState) -> Masks:
    """rank_masks of those live triplets whose bit is set: bits (live triplets,) bool."""
    live = state.live_triplets
    pieces = torch.split(bits, list(live.values()))
    masks = {name: state.rank_masks[name] for name in live}
    return {
        name: mask.masked_scatter(mask, piece)
        for (name, mask), piece in zip(masks.items(), pieces, strict=True)
    }


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
