"""Figures: seconds of the merge paths by density, and by number of processes with the model."""

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from analysis.cost_model import (
    Cost,
    ExchangeSizes,
    fit,
    predict,
    relative_errors,
    union_bytes,
)
from analysis.figures import caption, style
from analysis.records.collectives import points as measured_points
from analysis.records.launches import Launches
from fedara_core.schema import PATHS

NAME = "collectives"
MAX_PROCESSES = 10**6
_MODELLED_DENSITY = 0.25
_Shared = Literal["row", "all"]
_PANEL_INCHES = (2.6, 2.1)
_TITLE_LETTERS = 34  # that fit over a panel
_MASK_HEADER_BYTES = 12  # client_id and weight, before each client's mask


def draw(
    collectives: Launches, out_dir: Path, costs: Mapping[str, Cost] | None = None
) -> list[Path]:
    """Write collectives_density_overlap_*.{pdf,png,txt} by overlap, and collectives_scaling.*.

    costs: of the scaling model, by path; if None they are fitted to the records.
    """
    points = density_data(collectives)
    files = []
    for overlap, rows in points.groupby("overlap"):
        files += _draw_density(collectives, rows, out_dir / f"{NAME}_density_overlap_{overlap:g}")
    modelled = fitted_costs(points) if costs is None else dict.fromkeys(_backends(points), costs)
    if any(modelled.values()):
        files += _draw_scaling(
            *(collectives, points, modelled),
            fitted=costs is None,
            out=out_dir / f"{NAME}_scaling",
        )
    return files


def density_data(collectives: Launches) -> pd.DataFrame:
    """The measured points of both figures: the float32 merge paths over two processes or more.

    Columns: those of `records.collectives.points`, and crossing_density, 2/P.
    """
    points = measured_points(collectives)
    chosen = (points["call"] == "weighted_sum") & (points["codec"] == "fp32")
    points = points[chosen & (points["world_size"] > 1)]
    return points.assign(crossing_density=2 / points["world_size"]).reset_index(drop=True)


def scaling_data(points: pd.DataFrame, costs: Mapping[str, Mapping[str, Cost]]) -> pd.DataFrame:
    """Modelled seconds up to MAX_PROCESSES, at the density and overlap of `modelled_points`.

    Columns: backend, payload_bytes, path, num_processes, modelled_seconds.
    """
    rows = []
    shown = modelled_points(points)
    for key, group in shown.groupby(["backend", "payload_bytes", "path"]):
        backend, payload_bytes, path = map(str, key)
        if path not in costs.get(backend, {}):
            continue
        for num_processes in _process_counts():
            exchange = _exchange(group.iloc[0], num_processes)
            rows.append(
                {
                    "backend": backend,
                    "payload_bytes": float(payload_bytes),
                    "path": path,
                    "num_processes": num_processes,
                    "modelled_seconds": predict(path, exchange, costs[backend][path]),
                }
            )
    return pd.DataFrame(rows)


def modelled_points(points: pd.DataFrame) -> pd.DataFrame:
    """The measured points beside the modelled lines: of one density, and of the least overlap.

    Of the densities that were measured on most numbers of processes it is the one next to
    _MODELLED_DENSITY.
    """
    counts = points.groupby("density")["world_size"].nunique()
    densities = sorted(counts.index[counts == counts.max()])
    density = min(densities, key=lambda value: abs(math.log(value / _MODELLED_DENSITY)))
    chosen = (points["density"] == density) & (points["overlap"] == points["overlap"].min())
    shown: pd.DataFrame = points[chosen]
    return shown


def fitted_costs(points: pd.DataFrame) -> dict[str, dict[str, Cost]]:
    """Each back end's cost by path, from all its points; a path with fewer than two has none."""
    costs: dict[str, dict[str, Cost]] = {}
    for (backend, path), group in points.groupby(["backend", "path"]):
        measured = _measured(group)
        if len(measured) > 1:
            costs.setdefault(str(backend), {})[str(path)] = fit(str(path), measured)
    return costs


def _measured(points: pd.DataFrame) -> list[tuple[ExchangeSizes, float]]:
    rows = [row for _, row in points.iterrows()]
    return [(_exchange(row, int(row["world_size"])), float(row["median_seconds"])) for row in rows]


def _exchange(row: pd.Series, num_processes: int) -> ExchangeSizes:
    """The point's exchange on another number of processes, with as many clients on each."""
    num_clients = round(row["num_clients"] / row["world_size"] * num_processes)
    sizes = {"part_bytes": row["part_bytes"], "layout_bytes": row["layout_bytes"]}
    union = union_bytes(num_clients=num_clients, overlap=row["overlap"], **sizes)
    return ExchangeSizes(
        num_clients=num_clients,
        world_size=num_processes,
        union_bytes=union,
        mask_bytes=_MASK_HEADER_BYTES + row["num_rows"] / 8,
        **sizes,
    )


def _process_counts() -> list[int]:
    powers = [2**power for power in range(1, MAX_PROCESSES.bit_length())]
    return [*(power for power in powers if power < MAX_PROCESSES), MAX_PROCESSES]


def _draw_density(collectives: Launches, points: pd.DataFrame, out: Path) -> list[Path]:
    payloads = sorted(points["payload_bytes"].unique())
    machines = sorted(set(zip(points["backend"], points["world_size"], strict=True)))
    with style.context():
        fig, axes = _grid(len(payloads), len(machines), share_y="row")
        for row, payload_bytes in enumerate(payloads):
            for column, (backend, world_size) in enumerate(machines):
                ax = axes[row][column]
                same = (points["payload_bytes"] == payload_bytes) & (points["backend"] == backend)
                panel = points[same & (points["world_size"] == world_size)]
                _draw_panel(ax, panel, "density", scale=1e3)
                for crossing_density in panel["crossing_density"].unique():
                    ax.axvline(crossing_density, color=style.GREY, linewidth=1, zorder=1)
                ax.set_title(_title(backend, f"P = {world_size}, {_size_text(payload_bytes)}"))
                densities = sorted(panel["density"].unique())
                ax.set_xticks(densities, [f"{density:g}" for density in densities])
                ax.xaxis.set_minor_locator(NullLocator())
                ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
                ax.yaxis.set_minor_locator(NullLocator())
                ax.set_xlabel("Density" if row == len(payloads) - 1 else "")
                ax.set_ylabel("Time (ms)" if column == 0 else "")
        crossing = Line2D([], [], color=style.GREY, linewidth=1, label="density 2/P")
        _add_legend(fig, points, [crossing])
        files = style.save(fig, out)
    overlap = points["overlap"].iloc[0]
    title = (
        "Measured time of one exchange by merge path against density, the live part of a client's "
        f"layout, at overlap {overlap:g} (0: masks as disjoint as can be, 1: equal masks). The "
        "panels' titles give the bytes of one client's live rows, so that the layout grows to the "
        "left. Below the grey line at density 2/P a sparse allgather moves fewer bytes than a "
        "dense allreduce."
    )
    return [
        *files,
        caption.write_text(out, [f"{title} {_launches_text(points)}", *_conditions(collectives)]),
    ]


def _draw_scaling(
    collectives: Launches,
    points: pd.DataFrame,
    costs: Mapping[str, Mapping[str, Cost]],
    *,
    fitted: bool,
    out: Path,
) -> list[Path]:
    measured, modelled = modelled_points(points), scaling_data(points, costs)
    payloads = sorted(measured["payload_bytes"].unique())
    backends = _backends(measured)
    with style.context():
        fig, axes = _grid(len(backends), len(payloads), share_y="all")
        for row, backend in enumerate(backends):
            for column, payload_bytes in enumerate(payloads):
                ax = axes[row][column]
                _draw_modelled(ax, _of(modelled, backend, payload_bytes))
                own = _of(measured, backend, payload_bytes)
                _draw_panel(ax, own, "world_size", scale=1.0, linestyle="none")
                if not own.empty:
                    first = own["world_size"].max()
                    ax.axvspan(first, MAX_PROCESSES, color=style.GREY, alpha=0.08)
                    ax.text(0.08, 0.9, "modelled", transform=ax.transAxes, color="#555555")
                ax.set_title(_title(backend, _size_text(payload_bytes)))
                ax.set_xlabel("Processes" if row == len(backends) - 1 else "")
                ax.set_ylabel("Time (s)" if column == 0 else "")
        look: Any = style.MODELLED  # matplotlib's own type has no (offset, dashes)
        line = Line2D([], [], color=style.GREY, linestyle=look, label="modelled")
        _add_legend(fig, measured, [line])
        files = style.save(fig, out)
    return [*files, caption.write_text(out, scaling_caption(collectives, points, costs, fitted))]


def _draw_panel(
    ax: Any, points: pd.DataFrame, x: str, *, scale: float, linestyle: str | None = None
) -> None:
    """One line of medians for each path, with the range over launches.

    scale: what is drawn for one second.
    """
    for path in PATHS:
        line = points[points["path"] == path].sort_values(x)
        look = style.PATH_LOOKS[path]
        drawn = scale * line[["median_seconds", "min_seconds", "max_seconds"]]
        middle = drawn["median_seconds"]
        ax.errorbar(
            line[x],
            middle,
            yerr=[middle - drawn["min_seconds"], drawn["max_seconds"] - middle],
            color=look.color,
            marker=look.marker,
            linestyle=look.linestyle if linestyle is None else linestyle,
            elinewidth=0.8,
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    if points.empty:
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color="#555555")


def _draw_modelled(ax: Any, modelled: pd.DataFrame) -> None:
    for path, line in modelled.groupby("path"):
        color = style.PATH_LOOKS[str(path)].color
        seconds = line["modelled_seconds"]
        ax.plot(line["num_processes"], seconds, color=color, linestyle=style.MODELLED)


def _grid(num_rows: int, num_columns: int, *, share_y: _Shared) -> tuple[Figure, list[list[Any]]]:
    width, height = _PANEL_INCHES
    fig = Figure(figsize=(width * num_columns, height * num_rows + 0.4))
    axes = fig.subplots(num_rows, num_columns, squeeze=False, sharey=share_y)
    return fig, [list(row) for row in axes]


def _add_legend(fig: Figure, points: pd.DataFrame, further: list[Line2D]) -> None:
    shown = [path for path in PATHS if path in set(points["path"])]
    handles = [
        Line2D([], [], color=look.color, marker=look.marker, linestyle="none", label=path)
        for path in shown
        for look in [style.PATH_LOOKS[path]]
    ]
    fig.legend(handles=[*handles, *further], loc="outside lower center", ncols=3)


def _of(frame: pd.DataFrame, backend: str, payload_bytes: float) -> pd.DataFrame:
    if frame.empty:
        return frame
    return frame[(frame["backend"] == backend) & (frame["payload_bytes"] == payload_bytes)]


def _backends(points: pd.DataFrame) -> list[str]:
    return sorted(points["backend"].unique())


def _title(backend: str, what: str) -> str:
    """The title in one line, or with a long name on lines of its own."""
    text = f"{backend}, {what}"
    if len(text) <= _TITLE_LETTERS:
        return text
    return f"{textwrap.fill(backend, _TITLE_LETTERS)}\n{what}"


def _size_text(num_bytes: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:g} {unit}"
    return f"{num_bytes:g} B"


def _launches_text(points: pd.DataFrame) -> str:
    low, high = points["num_launches"].min(), points["num_launches"].max()
    if high == 1:
        return "One launch: median over its calls of the slowest process, no measure of spread."
    count = f"{low}" if low == high else f"{low} to {high}"
    return (
        f"Median over {count} launches of each one's median over calls of the slowest process; "
        "bars: smallest and largest of the launches."
    )


def _conditions(collectives: Launches) -> list[str]:
    """One line per back end and number of processes, and one about launches left out."""
    lines = []
    shown = collectives.launches[collectives.launches["world_size"] > 1]
    for (backend, world_size), rows in shown.groupby(["backend", "world_size"]):
        cpus = " or ".join(sorted(rows["cpu"].unique()))
        commits = " or ".join(sorted(rows["commit"].unique()))
        cores = " or ".join(str(number) for number in sorted(rows["num_cores"].unique()))
        hosts = " or ".join(str(number) for number in sorted(rows["num_hosts"].unique()))
        lines.append(
            f"{backend}, {world_size} processes; hosts {hosts}, of {cores} cores ({cpus}); "
            f"launches {len(rows)}; commit {commits}."
        )
    if collectives.incomplete:
        names = ", ".join(collectives.incomplete)
        lines.append(f"Left out as incomplete ({len(collectives.incomplete)}): {names}.")
    return lines


def scaling_caption(
    collectives: Launches,
    points: pd.DataFrame,
    costs: Mapping[str, Mapping[str, Cost]],
    fitted: bool,
) -> list[str]:
    """The paragraphs of collectives_scaling.txt."""
    shown = modelled_points(points)
    clients = sorted({f"{c:g}" for c in shown["num_clients"] / shown["world_size"]})
    source = (
        "fitted by least squares of the relative error to all measured points of the back end "
        "(every size, density and overlap)"
        if fitted
        else "given, not fitted"
    )
    title = (
        f"Time of one exchange against the number of processes, {' or '.join(clients)} client(s) "
        f"each, at density {shown['density'].iloc[0]:g} and overlap {shown['overlap'].iloc[0]:g}. "
        "Markers: measured. Dashed lines, and all of the grey part: modelled, seconds = overhead + "
        f"alpha x messages + beta x bytes, {source}; assumed: recursive doubling for allgather, "
        "pairwise exchange for split, recursive halving and doubling for allreduce and dense; the "
        "masks of all clients go everywhere on every path. No contention, one kind of link."
    )
    return [
        f"{title} {_launches_text(shown)}",
        *_cost_lines(points, costs),
        *_conditions(collectives),
    ]


def _cost_lines(points: pd.DataFrame, costs: Mapping[str, Mapping[str, Cost]]) -> list[str]:
    lines = []
    for backend, by_path in sorted(costs.items()):
        texts = []
        for path, cost in by_path.items():
            own = points[(points["backend"] == backend) & (points["path"] == path)]
            errors = pd.Series(relative_errors(path, _measured(own), cost), dtype=float)
            error = f" (relative error: median {errors.median():.0%}, largest {errors.max():.0%})"
            texts.append(
                f"{path} overhead {1e6 * cost.overhead_seconds:.3g} us, alpha "
                f"{1e6 * cost.alpha_seconds:.3g} us, beta {1e9 * cost.beta_seconds_per_byte:.3g} "
                f"ns/byte{error if len(errors) else ''}"
            )
        lines.append(f"{backend}: {'; '.join(texts)}.")
    return lines
