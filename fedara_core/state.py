"""The server's state between rounds: what all processes agree on, and what a checkpoint holds."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedara_core.adapters import NOTHING_FIXED, AdaptedModel, AdapterForm, AdapterSpec, Fixed
from fedara_core.values import (
    EMPTY,
    Index,
    Masks,
    Parts,
    Piece,
    Tensors,
    count_live,
    first_rows,
    make_index,
)

if TYPE_CHECKING:
    from fedara_core.method import Method


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """What all processes agree on after a round.

    vector: (index.size,) float32, the live rows and the whole parameters. rank_masks: (r,) bool by
    adapter. fixed: part -> adapter name -> tensor that clients need and do not train. extra: what
    only the server keeps. last_round: (num_clients,) int64, the last round each client took part
    in, -1 before its first. round_index: the next round to run.
    """

    adapter: AdapterSpec
    seed: int
    num_rounds: int
    vector: Tensor
    index: Index
    rank_masks: Masks
    fixed: Fixed = field(default_factory=lambda: NOTHING_FIXED)
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    last_round: Tensor
    round_index: int = 0

    @cached_property
    def parts(self) -> dict[str, Tensors]:
        """Views of the vector: part -> live adapter's name -> (r_live, width)."""
        return self.index.parts(self.vector)

    @cached_property
    def whole(self) -> Tensors:
        """Views of the vector: the parameters that train whole, by name."""
        return self.index.whole(self.vector)

    @property
    def sent(self) -> Tensor:
        """What a client would upload that did not train: (num_sent,)."""
        return self.vector[: self.index.num_sent]

    @cached_property
    def live_triplets(self) -> dict[str, int]:
        """Number of live triplets by adapter, in name order."""
        return count_live(self.rank_masks)

    @property
    def num_live(self) -> int:
        """Live triplets of all adapters: the bits that say something of each."""
        return sum(self.live_triplets.values())

    @cached_property
    def num_triplets(self) -> int:
        """All triplets, live or dead: the bits of a rank_mask message."""
        return sum(len(mask) for mask in self.rank_masks.values())

    @property
    def is_start(self) -> bool:
        """Whether no upload has come yet, so that all values are those before round 0."""
        return int(self.last_round.max()) < 0

    def rounds_behind(self, client_id: int) -> int:
        """Rounds since the client last downloaded: 1 if it was in the last round's cohort,
        round_index + 1 if it never took part (so 1 for all in round 0). What a method that sends
        updates must catch up on."""
        return self.round_index - int(self.last_round[client_id])

    def first_time(self, client_id: int) -> bool:
        """Whether the client has never taken part."""
        return int(self.last_round[client_id]) < 0

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under a unique name, in a fixed order; `with_tensors` is the inverse."""
        groups: dict[str, Mapping[str, Tensor]] = {
            "server": {"vector": self.vector, "last_round": self.last_round},
            "rank_mask": self.rank_masks,
            **{f"fixed-{part}": self.fixed[part] for part in sorted(self.fixed)},
            "extra": self.extra,
        }
        return {f"{kind}/{n}": group[n] for kind, group in groups.items() for n in sorted(group)}

    def with_tensors(
        self, tensors: Mapping[str, Tensor], index: Index, round_index: int
    ) -> "ServerState":
        """This state with the tensors, the index and the round of a saved one."""
        groups: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            groups.setdefault(kind, {})[name] = tensor
        fixed = {kind: group for kind, group in groups.items() if kind.startswith("fixed-")}
        return replace(
            self,
            vector=groups["server"]["vector"],
            index=index,
            rank_masks=groups.get("rank_mask", {}),
            fixed={kind.removeprefix("fixed-"): group for kind, group in fixed.items()},
            extra=groups.get("extra", {}),
            last_round=groups["server"]["last_round"],
            round_index=round_index,
        )

    def digest(self) -> str:
        """SHA-256 over the index, and names, shapes and bits of all tensors, in hex."""
        sha = hashlib.sha256(repr([(p.name, p.part, p.shape) for p in self.index.pieces]).encode())
        for name, tensor in self.tensors().items():
            sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            sha.update(tensor.contiguous().numpy().tobytes())
        return sha.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Start:
    """What the state before round 0 is made from."""

    model: AdaptedModel
    adapter: AdapterSpec
    seed: int
    num_rounds: int

    def state(self, method: "Method", parts: Parts) -> ServerState:
        """A state before round 0: every row live, the whole parameters as they are in the model.

        parts: the first rows, part -> adapter name -> (r, width); none where no adapter has a row.
        """
        rows = next(iter(parts.values()), {})
        masks = {name: torch.ones(len(rows[name]), dtype=torch.bool) for name in sorted(rows)}
        state = ServerState(
            adapter=self.adapter,
            seed=self.seed,
            num_rounds=self.num_rounds,
            vector=torch.zeros(0),
            index=EMPTY,
            rank_masks=masks,
            last_round=torch.full((len(self.adapter.client_lora_ranks),), -1),
        )
        whole = {name: p.detach().cpu() for name, p in self.model.whole_parameters.items()}
        return with_parts(state, method.form(state), parts, whole)


def with_parts(
    state: ServerState, form: AdapterForm, parts: Parts, whole: Mapping[str, Tensor]
) -> ServerState:
    """The state with this form and these live rows, as its rank_masks count them."""
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.items()}
    index = make_index(form, state.adapter.shapes, state.live_triplets, shapes)
    return replace(state, index=index, vector=index.pack(parts, whole))


def relaid(state: ServerState, form: AdapterForm, rank_masks: Masks | None = None) -> ServerState:
    """The state in the layout of this form, with only those of its live triplets that are in
    rank_masks (by default all); rows keep their values."""
    masks = state.rank_masks if rank_masks is None else rank_masks
    parts = {
        part: {name: rows[masks[name][state.rank_masks[name]]] for name, rows in views.items()}
        for part, views in state.parts.items()
    }
    return with_parts(replace(state, rank_masks=masks), form, parts, state.whole)


def truncated(state: ServerState, form: AdapterForm, lora_rank: int) -> ServerState:
    """The state with the first lora_rank triplets of each adapter: what a client of that capacity
    trains."""
    if lora_rank >= state.adapter.lora_rank:
        return state
    return relaid(state, form, first_rows(state.rank_masks, lora_rank))


def with_zero_delta(state: ServerState) -> ServerState:
    """The state with a change of W0 that is zero so far (fixed["delta"]) and the history that
    `missed_values` needs of what was added to it (extra["stacked_rows"], (num_rounds,) int64)."""
    delta = {name: torch.zeros(shape) for name, shape in state.adapter.shapes.items()}
    stacked_rows = torch.zeros(state.num_rounds, dtype=torch.int64)
    return replace(state, fixed={"delta": delta}, extra={"stacked_rows": stacked_rows})


def added_delta(state: ServerState, terms: Iterable[tuple[Parts, float]]) -> Fixed:
    """The state's change of W0, with factor scale B A added for each (A and B^T, factor)."""
    delta = {name: change.double() for name, change in state.fixed["delta"].items()}
    for parts, factor in terms:
        for name in delta:
            a, b = parts["A"][name].double(), parts["B"][name].double().T
            delta[name] += factor * state.adapter.scale * (b @ a)  # (d_out, d_in)
    return {"delta": {name: change.float() for name, change in delta.items()}}


def with_added_delta(
    after: ServerState, terms: Iterable[tuple[Parts, float]], num_rows: int
) -> ServerState:
    """The next state with these terms added to the change of W0; num_rows: rows of the factors that
    a client needs for it."""
    stacked_rows = after.extra["stacked_rows"].clone()
    stacked_rows[after.round_index - 1] = num_rows
    return replace(after, fixed=added_delta(after, terms), extra={"stacked_rows": stacked_rows})


def pieces_as_lists(index: Index) -> list[list[Any]]:
    """The index as JSON values; `index_from_lists` is the inverse."""
    head: list[Any] = [index.num_sent, index.num_trained]
    return [head, *([p.name, p.part, list(p.shape), p.start] for p in index.pieces)]


def index_from_lists(values: list[list[Any]]) -> Index:
    """Inverse of `pieces_as_lists`."""
    (num_sent, num_trained), *pieces = values
    return Index(
        pieces=tuple(
            Piece(name=name, part=part, shape=tuple(shape), start=start)
            for name, part, shape, start in pieces
        ),
        num_sent=num_sent,
        num_trained=num_trained,
    )
