"""Figure: seconds of the merge paths by number of processes, measured and modelled."""

import math
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib.lines import Line2D

from analysis.cost_model import Cost, ExchangeSizes, fit, predict, relative_errors, union_bytes
from analysis.figures import path_panels, style
from analysis.records.campaign import NotDrawn
from analysis.records.launches import Launches

NAME = "collectives_scaling"
MAX_PROCESSES = 10**6
_PROCESSES = [*(2**power for power in range(1, 20)), MAX_PROCESSES]
_MODELLED_DENSITY = 0.25
_MASK_HEADER_BYTES = 12  # client_id and weight, before each client's mask


@style.context()
def draw(
    collectives: Launches, out_dir: Path, costs: Mapping[str, Cost] | None = None
) -> list[Path]:
    """costs: of the model, by path; if None they are fitted to the records."""
    points = path_panels.path_points(collectives)
    by_backend: Mapping[str, Mapping[str, Cost]] = (
        fitted_costs(points) if costs is None else dict.fromkeys(points["backend"], costs)
    )
    if not by_backend:
        raise NotDrawn("no merge path has two measured points to fit the model to")
    measured, modelled = modelled_points(points), scaling_data(points, by_backend)
    payloads = sorted(measured["payload_bytes"].unique())
    backends = sorted(measured["backend"].unique())
    fig, axes = path_panels.grid(len(backends), len(payloads), share_y="all")
    for row, backend in enumerate(backends):
        for column, payload_bytes in enumerate(payloads):
            ax = axes[row, column]
            for path, line in _of(modelled, backend, payload_bytes).groupby("path"):
                color, seconds = style.PATH_LOOKS[str(path)].color, line["modelled_seconds"]
                ax.plot(line["num_processes"], seconds, color=color, linestyle=style.MODELLED)
            own = _of(measured, backend, payload_bytes)
            path_panels.draw_panel(ax, own, "world_size", scale=1.0, linestyle="none")
            if not own.empty:
                first = own["world_size"].max()
                ax.axvspan(first, MAX_PROCESSES, color=style.GREY, alpha=0.08)
                ax.text(0.08, 0.9, "modelled", transform=ax.transAxes, color="#555555")
            ax.set_title(path_panels.title(backend, path_panels.size_text(payload_bytes)))
            ax.set_xlabel("Processes" if row == len(backends) - 1 else "")
            ax.set_ylabel("Time (s)" if column == 0 else "")
    handle = Line2D([], [], color=style.GREY, linestyle=style.MODELLED, label="modelled")
    path_panels.add_legend(fig, measured, [handle])
    paragraphs = scaling_caption(collectives, points, by_backend, costs is None)
    return style.save(fig, out_dir / NAME, paragraphs)


def scaling_data(points: pd.DataFrame, costs: Mapping[str, Mapping[str, Cost]]) -> pd.DataFrame:
    """Modelled seconds up to MAX_PROCESSES, at the density and overlap of `modelled_points`.

    Columns: backend, payload_bytes, path, num_processes, modelled_seconds.
    """
    shown = modelled_points(points).groupby(["backend", "payload_bytes", "path"])
    rows = [
        row[["backend", "payload_bytes", "path"]].to_dict()
        | {
            "num_processes": num_processes,
            "modelled_seconds": predict(row["path"], _exchange(row, num_processes), cost),
        }
        for _, row in shown.head(1).iterrows()
        if (cost := costs.get(row["backend"], {}).get(row["path"]))
        for num_processes in _PROCESSES
    ]
    return pd.DataFrame(rows)


def modelled_points(points: pd.DataFrame) -> pd.DataFrame:
    """The measured points beside the modelled lines: of one density, and of the least overlap.

    The density next to _MODELLED_DENSITY of those measured on most numbers of processes.
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
    return ExchangeSizes(
        num_clients=num_clients,
        world_size=num_processes,
        union_bytes=union_bytes(num_clients=num_clients, overlap=row["overlap"], **sizes),
        mask_bytes=_MASK_HEADER_BYTES + row["num_rows"] / 8,
        **sizes,
    )


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
        f"{title} {path_panels.launches_text(shown)}",
        *_cost_lines(points, costs),
        *path_panels.conditions(collectives),
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


def _of(frame: pd.DataFrame, backend: str, payload_bytes: float) -> pd.DataFrame:
    if frame.empty:
        return frame
    return frame[(frame["backend"] == backend) & (frame["payload_bytes"] == payload_bytes)]
