"""The scaling model: seconds of an exchange on up to 10^6 processes. They are modelled.

    seconds = overhead + alpha messages + beta bytes

overhead: seconds of a call without messages. alpha: latency of a message in seconds. beta: seconds
of a byte that a process receives, its part of the local sum included. The messages that follow each
other and the bytes, for P processes, K clients, k bytes of a client's rows, U of the union of the
masks, n of the layout, m of one client's mask:

masks       first on every path, by recursive doubling, their sizes before them:
            2 ceil(log2 P) messages; (P-1)/P K m bytes
allgather   recursive doubling: ceil(log2 P) messages; (P-1)/P K k bytes
split       pairwise alltoallv, then recursive doubling: P - 1 + ceil(log2 P) messages;
            (P-1)/P (K k / P + U) bytes
allreduce   recursive halving, then doubling: 2 ceil(log2 P) messages; (P-1)/P 2 U bytes
dense       the same with n for U

Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH" (2005).
A ring moves the same bytes in P - 1 messages; for it the latency here is a lower bound.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from fedara_core.errors import InputError
from fedara_core.merge.cost import moved_values
from fedara_core.schema import PATHS


@dataclass(frozen=True, kw_only=True)
class ExchangeSizes:
    """Sizes of one exchange; its clients are spread evenly over the processes."""

    num_clients: int
    world_size: int
    part_bytes: float  # of one client's rows
    union_bytes: float
    layout_bytes: float
    mask_bytes: float = 0.0  # of one client's rank_mask


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The constants of one path on one machine."""

    overhead_seconds: float = 0.0
    alpha_seconds: float  # a message
    beta_seconds_per_byte: float


def num_messages(path: str, world_size: int) -> int:
    """Messages that follow each other, masks included, by the algorithms at the top of the file."""
    doubling = (world_size - 1).bit_length()  # ceil(log2 P)
    of_rows = {"allgather": doubling, "split": world_size - 1 + doubling}
    return 2 * doubling + of_rows.get(path, 2 * doubling)


def moved_bytes(path: str, exchange: ExchangeSizes) -> float:
    """Bytes that one process receives."""
    moved = moved_values(
        num_parts=exchange.num_clients,
        world_size=exchange.world_size,
        part_values=exchange.part_bytes,
        union_values=exchange.union_bytes,
        layout_values=exchange.layout_bytes,
    )
    others = (exchange.world_size - 1) / exchange.world_size
    return moved[path] + others * exchange.num_clients * exchange.mask_bytes


def predict(path: str, exchange: ExchangeSizes, cost: Cost) -> float:
    """Modelled seconds of one exchange."""
    return (
        cost.overhead_seconds
        + cost.alpha_seconds * num_messages(path, exchange.world_size)
        + cost.beta_seconds_per_byte * moved_bytes(path, exchange)
    )


def union_bytes(
    *, num_clients: int, part_bytes: float, layout_bytes: float, overlap: float
) -> float:
    """Of the union of masks that share `overlap` of their rows, the others being disjoint."""
    shared = overlap * part_bytes
    return shared + min(layout_bytes - shared, num_clients * (part_bytes - shared))


def fit(path: str, measured: Sequence[tuple[ExchangeSizes, float]]) -> Cost:
    """The cost with the least sum of squared relative errors; none of its numbers is negative.

    measured: exchanges of `path` over two processes or more, and their seconds. If all have as many
    messages, overhead cannot be told from latency and is taken as 0. Raises InputError for fewer
    than two exchanges.
    """
    if len(measured) < 2:
        raise InputError(f"{path}: {len(measured)} measured exchanges; allowed: 2 or more")
    seconds = np.array([s for _, s in measured])
    messages = np.array([num_messages(path, e.world_size) for e, _ in measured], float)
    num_bytes = np.array([moved_bytes(path, e) for e, _ in measured])
    known = len(set(messages)) > 1
    terms = np.stack([np.full_like(seconds, known), messages, num_bytes], axis=1) / seconds[:, None]
    scales = np.linalg.norm(terms, axis=0)  # seconds and bytes are ten decades apart
    scales[scales == 0] = 1.0
    found, _ = nnls(terms / scales, np.ones(len(terms)))
    overhead, alpha, beta = (found / scales).tolist()
    return Cost(overhead_seconds=overhead, alpha_seconds=alpha, beta_seconds_per_byte=beta)


def relative_errors(
    path: str, measured: Sequence[tuple[ExchangeSizes, float]], cost: Cost
) -> list[float]:
    """|modelled / measured - 1| of each exchange."""
    return [abs(predict(path, exchange, cost) / seconds - 1) for exchange, seconds in measured]


def read_costs(file: Path) -> dict[str, Cost]:
    """Costs from a TOML file with a table for each path; the table "all" is for the other paths.

    Keys of a table: alpha_seconds, beta_seconds_per_byte and, if it is not 0, overhead_seconds.
    Raises InputError.
    """
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: not readable as TOML: {error}") from None
    unknown = set(tables) - {"all", *PATHS}
    if unknown or not tables:
        named = ", ".join(sorted(unknown)) or "nothing"
        raise InputError(f"{file}: it has {named}; allowed: tables all, {', '.join(PATHS)}")
    costs = {name: _cost(table, f"{file}: [{name}]") for name, table in tables.items()}
    everywhere = {path: costs["all"] for path in PATHS if "all" in costs}
    return everywhere | {path: costs[path] for path in PATHS if path in costs}


def _cost(table: object, place: str) -> Cost:
    needed = {"alpha_seconds", "beta_seconds_per_byte"}
    allowed = {"overhead_seconds", *needed}
    if not isinstance(table, Mapping) or not (
        needed <= set(table) <= allowed
        and all(isinstance(v, int | float) and 0 <= v < float("inf") for v in table.values())
    ):
        raise InputError(f"{place}: {table}; allowed: {', '.join(sorted(allowed))}, 0 or above")
    return Cost(**table)
