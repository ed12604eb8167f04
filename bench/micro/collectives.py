"""`fedara micro collectives`: seconds and bytes of the merge paths, beside the bare library call.

For each combination of the axes every process makes the same clients from seeds, so that each can
add up all of them by itself and check the result of every timed call. An iteration's seconds are
the maximum over processes. What a bare allgather of the same bytes takes is measured in the same
run, turn about.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from bench.micro.bare import bare_allgather
from bench.micro.masks import (
    VALUE_BYTES,
    Layout,
    check_buffers,
    check_sum,
    make_layout,
)
from bench.micro.record import MicroRecord, names, numbers, quantiles, slowest
from bench.micro.wire_counter import WireCounter, open_counter
from bench.run.runner import set_threads
from fedara_core.codec import CODECS, row_bytes
from fedara_core.comm.base import Communicator
from fedara_core.errors import InputError
from fedara_core.merge.cost import PATHS, moved_values
from fedara_core.merge.masked import masked_sum

BENCHMARK = "micro-collectives"
MIN_ITERATIONS = 5
MIN_WARM_UP = 2  # one call counts the bytes, one tells how many calls the limit allows


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The axes, and how often each combination is called."""

    payload_bytes: tuple[float, ...]  # of one client's live rows
    densities: tuple[float, ...]
    overlaps: tuple[float, ...]
    paths: tuple[str, ...]
    codecs: tuple[str, ...]
    iterations: int
    warm_up: int
    limit_seconds: float
    clients_per_process: int
    max_layout_bytes: float
    seed: int


def parse_settings(
    *,
    payload_bytes: str,
    densities: str,
    overlaps: str,
    paths: str,
    codecs: str,
    iterations: int,
    warm_up: int,
    limit_seconds: float,
    clients_per_process: int,
    max_layout_bytes: float,
    seed: int,
) -> Settings:
    """The options as settings. Raises InputError with the option, its value and what is allowed."""
    counts = (
        ("--iterations", iterations, 1),
        ("--warm-up", warm_up, MIN_WARM_UP),
        ("--clients-per-process", clients_per_process, 1),
    )
    for option, count, least in counts:
        if count < least:
            raise InputError(f"{option} {count}: allowed: {least} or more")
    sizes = {"--limit-seconds": limit_seconds, "--max-layout-bytes": max_layout_bytes}
    for option, size in sizes.items():
        if not 0 < size < float("inf"):
            raise InputError(f"{option} {size}: allowed: numbers above 0")
    return Settings(
        payload_bytes=numbers("--payload-bytes", payload_bytes, 64, 1e12),
        densities=numbers("--densities", densities, 1e-6, 1),
        overlaps=numbers("--overlaps", overlaps, 0, 1),
        paths=names("--paths", paths, PATHS),
        codecs=names("--codecs", codecs, CODECS),
        iterations=iterations,
        warm_up=warm_up,
        limit_seconds=limit_seconds,
        clients_per_process=clients_per_process,
        max_layout_bytes=max_layout_bytes,
        seed=seed,
    )


def run_collectives(settings: Settings, results: Path, communicator: Communicator) -> Path:
    """Measure every combination and record them; returns the record's folder (of world_rank 0)."""
    set_threads(1, communicator)
    console = Console(quiet=communicator.world_rank != 0, highlight=False, markup=False)
    counter = open_counter(communicator)
    if counter.source is None:
        console.print(f"measured_bytes is left out: {counter.reason}", soft_wrap=True)
    counted = (
        {"measured_bytes_source": counter.source}
        if counter.source
        else {"measured_bytes_missing": counter.reason}
    )
    record = MicroRecord(BENCHMARK, settings, results, communicator, counted)
    for row in _rows(settings, communicator, counter, console):
        console.print(_describe(row), soft_wrap=True)
        record.add(row)
    record.finish()
    console.print(f"done, records in {record.run_dir}", soft_wrap=True)
    return record.run_dir


def _rows(
    settings: Settings, communicator: Communicator, counter: WireCounter, console: Console
) -> Iterator[dict[str, Any]]:
    """One object per combination, the same on every process."""
    num_clients = settings.clients_per_process * communicator.world_size
    for payload_bytes in settings.payload_bytes:
        axes = {"payload_bytes": payload_bytes, "num_clients": num_clients}
        yield {**axes, **_bare_row(payload_bytes, settings, communicator, counter)}
        for density, overlap in itertools.product(settings.densities, settings.overlaps):
            axes |= {"density": density, "overlap": overlap}
            layout = make_layout(
                payload_bytes=payload_bytes,
                density=density,
                overlap=overlap,
                num_clients=num_clients,
                seed=settings.seed,
            )
            paths = [path for path in settings.paths if _fits(layout, path, settings)]
            for path in settings.paths:
                if path not in paths:
                    limit = f"--max-layout-bytes {settings.max_layout_bytes:g}"
                    console.print(f"{_label(axes)} {path}: left out, above {limit}", soft_wrap=True)
            if paths:
                for row in _merge_rows(layout, paths, settings, communicator, counter):
                    yield {**axes, **row}


def _fits(layout: Layout, path: str, settings: Settings) -> bool:
    """Whether what is summed over, and so held several times in memory, is within the limit."""
    num_rows = layout.num_rows if path == "dense" else layout.union_rows
    return num_rows * layout.width * VALUE_BYTES <= settings.max_layout_bytes


def _merge_rows(
    layout: Layout,
    paths: Sequence[str],
    settings: Settings,
    communicator: Communicator,
    counter: WireCounter,
) -> Iterator[dict[str, Any]]:
    """masked_sum by every path and codec; records call it weighted_sum, its first name."""
    expected, widths = layout.expected(), layout.widths
    own = range(communicator.world_rank, layout.num_clients, communicator.world_size)
    uploads = [layout.upload(client_id) for client_id in own]
    for codec, path in itertools.product(settings.codecs, paths):
        timed = measure(
            {"": partial(masked_sum, uploads, widths, communicator, path, codec=codec)},
            {"": partial(check_sum, expected=expected, path=path, codec=codec)},
            settings,
            communicator,
            counter,
        )
        yield {
            "call": "weighted_sum",
            "path": path,
            "codec": codec,
            **_sizes(layout),
            **timed,
            **_bandwidths(layout, path, codec, timed["median_seconds"], communicator.world_size),
        }


def _bare_row(
    payload_bytes: float, settings: Settings, communicator: Communicator, counter: WireCounter
) -> dict[str, Any]:
    """communicator.allgather of packed rows, as the merge paths call it (headers have told the
    sizes) and with sizes exchanged first; and the library's own call where there is one."""
    layout = make_layout(
        payload_bytes=payload_bytes,
        density=1.0,
        overlap=1.0,
        num_clients=settings.clients_per_process * communicator.world_size,
        seed=settings.seed,
    )
    packed = [
        torch.cat(
            [
                layout.upload(client_id).values
                for client_id in range(world_rank, layout.num_clients, communicator.world_size)
            ]
        ).view(torch.uint8)
        for world_rank in range(communicator.world_size)
    ]
    mine = packed[communicator.world_rank]
    counts = [len(buffer) for buffer in packed]
    calls: dict[str, Callable[[], Any]] = {
        "": partial(communicator.allgather, mine, counts),
        "sizes_first_": partial(communicator.allgather, mine),
    }
    bare = bare_allgather(mine, communicator)
    if bare is not None:
        calls["bare_"] = bare
    checks = dict.fromkeys(calls, partial(check_buffers, expected=packed))
    timed = measure(calls, checks, settings, communicator, counter)
    return {
        "call": "allgather",
        "part_bytes": layout.live_rows * layout.width * VALUE_BYTES,
        **({"bare_call": bare.__name__} if bare is not None else {}),
        **timed,
        **_bandwidths(layout, "allgather", "fp32", timed["median_seconds"], len(packed)),
    }


def measure(
    calls: Mapping[str, Callable[[], Any]],
    checks: Mapping[str, Callable[[Any], None]],
    settings: Settings,
    communicator: Communicator,
    counter: WireCounter,
) -> dict[str, Any]:
    """Seconds and bytes of the calls, turn about; each result goes to its check, untimed.

    Keys of calls are prefixes of the row's keys; ratios are those to "bare_", the median over
    iterations. Every process calls it and gets the same.
    """
    row: dict[str, Any] = {}
    warm_seconds = 0.0
    for prefix, call in calls.items():
        for _ in range(settings.warm_up - MIN_WARM_UP):
            checks[prefix](call())
        row |= {f"{prefix}{key}": value for key, value in _bytes(call, communicator, counter)}
        warm_seconds += _timed(call, checks[prefix], communicator)
    number = _iterations(settings, warm_seconds, communicator)
    own: dict[str, list[float]] = {prefix: [] for prefix in calls}
    for iteration in range(number):
        order = list(calls)[:: 1 if iteration % 2 else -1]
        for prefix in order:
            own[prefix].append(_timed(calls[prefix], checks[prefix], communicator))
    longest = {prefix: slowest(seconds, communicator) for prefix, seconds in own.items()}
    for prefix, seconds in longest.items():
        row |= {f"{prefix}{key}": value for key, value in quantiles(seconds).items()}
    for prefix in longest.keys() - {"bare_"} if "bare_" in longest else ():
        row[f"{prefix}ratio"] = float(np.median(longest[prefix] / longest["bare_"]))
    return row


def _timed(
    call: Callable[[], Any], check: Callable[[Any], None], communicator: Communicator
) -> float:
    communicator.barrier()
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    check(result)
    return seconds


def _iterations(settings: Settings, seconds: float, communicator: Communicator) -> int:
    """As many as world_rank 0's seconds of one iteration allow within the limit."""
    seconds = float(communicator.broadcast(str(seconds).encode()))
    allowed = max(MIN_ITERATIONS, int(settings.limit_seconds / max(seconds, 1e-9)))
    return min(settings.iterations, allowed)


def _bytes(
    call: Callable[[], Any], communicator: Communicator, counter: WireCounter
) -> Iterator[tuple[str, float]]:
    """Bytes of one call, mean over processes: what the communicator counts to and from others, and
    what really left. Not of a timed call: reading the counters takes as long as a small message.
    """
    before = replace(communicator.traffic)
    measured = counter.count(call, communicator)
    traffic = communicator.traffic
    found: dict[str, float | None] = {
        "counted_bytes_sent": traffic.sent - before.sent,
        "counted_bytes_received": traffic.received - before.received,
        "measured_bytes": measured,
    }
    if traffic == before:  # a bare call passes the communicator by; one process moves nothing
        found = {"measured_bytes": measured}
    everyone = [json.loads(p) for p in communicator.gather_bytes(json.dumps(found).encode())]
    for key, value in found.items():
        if value is not None:
            yield key, sum(other[key] for other in everyone) / len(everyone)


def _sizes(layout: Layout) -> dict[str, int]:
    row_bytes = layout.width * VALUE_BYTES
    return {
        "part_bytes": layout.live_rows * row_bytes,
        "union_bytes": layout.union_rows * row_bytes,
        "layout_bytes": layout.num_rows * row_bytes,
        "num_rows": layout.num_rows,
    }


def _bandwidths(
    layout: Layout, path: str, codec: str, seconds: float, world_size: int
) -> dict[str, float]:
    """Bytes that a process receives by the cost model, and the two bandwidths of nccl-tests.

    The algorithm's bytes are what it is about: all clients' rows for allgather, a process's rows
    and the union for split, what is summed over for the allreduces. Times the bus factor, (P-1)/P
    and 2 (P-1)/P, they are the model's bytes.
    """
    coded_bytes = layout.live_rows * int(row_bytes(codec, layout.widths[:1]))  # of a client
    moved = moved_values(
        num_parts=layout.num_clients,
        world_size=world_size,
        part_values=coded_bytes / VALUE_BYTES,
        union_values=layout.union_rows * layout.width,
        layout_values=layout.num_rows * layout.width,
    )
    model_bytes = moved[path] * VALUE_BYTES
    if world_size == 1:
        return {"model_bytes": model_bytes}
    factor = (2 if path in ("allreduce", "dense") else 1) * (world_size - 1) / world_size
    return {
        "model_bytes": model_bytes,
        "algorithm_bytes_per_second": model_bytes / factor / seconds,
        "bus_bytes_per_second": model_bytes / seconds,
    }


def _label(axes: Mapping[str, Any]) -> str:
    return (
        f"{axes['payload_bytes']:g} bytes, density {axes['density']:g}, "
        f"overlap {axes['overlap']:g},"
    )


def _describe(row: Mapping[str, Any]) -> str:
    """One line of progress."""
    median = f"{1e3 * row['median_seconds']:.3f} ms"
    if row["call"] == "weighted_sum":
        return f"{_label(row)} {row['path']}: {median}"
    text = f"{row['payload_bytes']:g} bytes, allgather of packed rows: {median}"
    return text + (f", {row['ratio']:.3f} x {row['bare_call']}" if "ratio" in row else "")
