"""`fedara micro collectives`: seconds and bytes of the merge paths, beside the bare library call.

The masks are synthetic, or those of runs (bench/micro/masks.py). Every process can add up all
clients by itself, and so checks the result of every timed call. An iteration's seconds are the
maximum over processes. What a bare allgather of the same bytes takes is measured in the same run,
turn about.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.micro.bare import bare_allgather
from bench.micro.masks import VALUE_BYTES, Layout, check_buffers, check_sum, make_layout, run_layout
from bench.micro.record import progress, record_rows
from bench.micro.timing import quantiles, slowest, timed
from bench.micro.wire_counter import WireCounter, open_counter
from bench.run.runner import set_threads
from fedara_core.codec import row_bytes
from fedara_core.comm.base import Communicator
from fedara_core.merge.cost import moved_values
from fedara_core.merge.masked import masked_sum

BENCHMARK = "micro-collectives"
MIN_ITERATIONS = 5
MIN_WARM_UP = 2  # one call counts the bytes, one tells how many calls the limit allows


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The axes, and how often each combination is called.

    runs: folders of runs whose masks take the place of those by payload_bytes, densities, overlaps
    and clients_per_process.
    """

    runs: tuple[str, ...]
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


def run_collectives(settings: Settings, results: Path, communicator: Communicator) -> None:
    """Measure every combination and record them."""
    set_threads(1, communicator)
    runs = [run_layout(Path(run), communicator, settings.seed) for run in settings.runs]
    counter = open_counter(communicator)
    facts = {"measured_bytes_source": counter.source}
    if counter.source is None:
        facts = {"measured_bytes_missing": counter.reason}
        text = f"measured_bytes is left out: {counter.reason}"
        progress(communicator).print(text, soft_wrap=True)
    rows = _rows(settings, runs, communicator, counter)
    record_rows(BENCHMARK, settings, results, communicator, rows, _describe, **facts)


def _rows(
    settings: Settings, runs: Sequence[Layout], communicator: Communicator, counter: WireCounter
) -> Iterator[dict[str, Any]]:
    """One object per combination, the same on every process."""
    for layout in runs:
        yield from _merge_rows(layout, settings, communicator, counter)
    for payload_bytes in settings.payload_bytes if not runs else ():
        masks = itertools.product(settings.densities, settings.overlaps)
        for number, (density, overlap) in enumerate(masks):
            layout = make_layout(
                payload_bytes=payload_bytes,
                density=density,
                overlap=overlap,
                num_clients=settings.clients_per_process * communicator.world_size,
                seed=settings.seed,
            )
            if number == 0:  # the packed rows are the same at every density and overlap
                yield _bare_row(layout, settings, communicator, counter)
            yield from _merge_rows(layout, settings, communicator, counter)


def _merge_rows(
    layout: Layout, settings: Settings, communicator: Communicator, counter: WireCounter
) -> Iterator[dict[str, Any]]:
    """masked_sum by every path and codec."""
    # What is summed over is held several times in memory.
    num_values = dict.fromkeys(settings.paths, layout.union_values)
    num_values |= {"dense": int(layout.widths.sum())}
    most = settings.max_layout_bytes / VALUE_BYTES
    paths = [path for path in settings.paths if num_values[path] <= most]
    for path in settings.paths:
        if path not in paths:
            text = f"left out, above --max-layout-bytes {settings.max_layout_bytes:g}"
            progress(communicator).print(f"{_label(layout.axes)} {path}: {text}", soft_wrap=True)
    if not paths:
        return
    expected = layout.expected()
    own = layout.headers[communicator.world_rank :: communicator.world_size]
    uploads = [layout.upload(header) for header in own]
    for codec, path in itertools.product(settings.codecs, paths):
        call = partial(
            masked_sum,
            uploads,
            layout.widths,
            communicator,
            path,
            codec=codec,
            held_rows=layout.held_rows,
            first_whole=layout.first_whole,
            average=layout.average,
        )
        check = partial(check_sum, expected=expected, path=path, codec=codec)
        row = measure({"": call}, check, settings, communicator, counter)
        yield {
            **layout.axes,
            "path": path,
            "codec": codec,
            "part_bytes": layout.part_values * VALUE_BYTES,
            "union_bytes": layout.union_values * VALUE_BYTES,
            "layout_bytes": num_values["dense"] * VALUE_BYTES,
            "num_rows": len(layout.widths),
            **row,
            **_bandwidths(layout, path, codec, row["median_seconds"], communicator.world_size),
        }


def _bare_row(
    layout: Layout, settings: Settings, communicator: Communicator, counter: WireCounter
) -> dict[str, Any]:
    """communicator.allgather of packed rows, as the merge paths call it (headers have told the
    sizes) and with sizes exchanged first; and the library's own call where there is one."""
    world_size = communicator.world_size
    packed = [
        torch.cat(
            [layout.upload(header).values for header in layout.headers[world_rank::world_size]]
        ).view(torch.uint8)
        for world_rank in range(world_size)
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
    check = partial(check_buffers, expected=packed)
    row = measure(calls, check, settings, communicator, counter)
    return {
        "call": "allgather",
        "payload_bytes": layout.axes["payload_bytes"],
        "num_clients": len(layout.headers),
        "part_bytes": layout.part_values * VALUE_BYTES,
        **({"bare_call": bare.__name__} if bare is not None else {}),
        **row,
        **_bandwidths(layout, "allgather", "fp32", row["median_seconds"], world_size),
    }


def measure(
    calls: Mapping[str, Callable[[], Any]],
    check: Callable[[Any], None],
    settings: Settings,
    communicator: Communicator,
    counter: WireCounter,
) -> dict[str, Any]:
    """Seconds and bytes of the calls, turn about; each result is checked, untimed.

    Keys of calls are prefixes of the row's keys; ratios are those to "bare_", the median over
    iterations. Every process calls it and gets the same.
    """

    def seconds_of(prefix: str) -> float:
        seconds, result = timed(calls[prefix], communicator)
        check(result)
        return seconds

    row: dict[str, Any] = {}
    warm_seconds = 0.0
    for prefix, call in calls.items():
        for _ in range(settings.warm_up - MIN_WARM_UP):
            check(call())
        row |= {f"{prefix}{key}": value for key, value in _bytes(call, communicator, counter)}
        warm_seconds += seconds_of(prefix)
    # As many as world_rank 0's seconds of one iteration allow within the limit.
    warm_seconds = float(communicator.broadcast(str(warm_seconds).encode()))
    allowed = int(settings.limit_seconds / max(warm_seconds, 1e-9))
    own: dict[str, list[float]] = {prefix: [] for prefix in calls}
    for iteration in range(min(settings.iterations, max(MIN_ITERATIONS, allowed))):
        for prefix in list(calls)[:: 1 if iteration % 2 else -1]:
            own[prefix].append(seconds_of(prefix))
    longest = {prefix: slowest(seconds, communicator) for prefix, seconds in own.items()}
    for prefix, seconds in longest.items():
        row |= {f"{prefix}{key}": value for key, value in quantiles(seconds).items()}
    for prefix in longest.keys() - {"bare_"} if "bare_" in longest else ():
        row[f"{prefix}ratio"] = float(np.median(longest[prefix] / longest["bare_"]))
    return row


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
    everyone = communicator.gather_json(found)
    for key, value in found.items():
        if value is not None:
            yield key, sum(other[key] for other in everyone) / len(everyone)


def _bandwidths(
    layout: Layout, path: str, codec: str, seconds: float, world_size: int
) -> dict[str, float]:
    """Bytes that a process receives by the cost model, and the two bandwidths of nccl-tests.

    The algorithm's bytes are what it is about: all clients' rows for allgather, a process's rows
    and the union for split, what is summed over for the allreduces. Times the bus factor, (P-1)/P
    and 2 (P-1)/P, they are the model's bytes.
    """
    coded = [int(row_bytes(codec, layout.widths[held]).sum()) for held in layout.held]
    moved = moved_values(
        num_parts=len(coded),
        world_size=world_size,
        part_values=sum(coded) / len(coded) / VALUE_BYTES,
        union_values=layout.union_values,
        layout_values=int(layout.widths.sum()),
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
    if "method" in axes:
        who = f"{axes['method']} on {axes['model']}, {axes['num_clients']} clients"
        return f"{who}, density {axes['density']:.3g},"
    size = f"{axes['payload_bytes']:g} bytes"
    return f"{size}, density {axes['density']:g}, overlap {axes['overlap']:g},"


def _describe(row: Mapping[str, Any]) -> str:
    median = f"{1e3 * row['median_seconds']:.3f} ms"
    if "path" in row:
        return f"{_label(row)} {row['path']}: {median}"
    text = f"{row['payload_bytes']:g} bytes, allgather of packed rows: {median}"
    return text + (f", {row['ratio']:.3f} x {row['bare_call']}" if "ratio" in row else "")
