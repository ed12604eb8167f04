"""Figure: seconds of a round against the number of processes, strong and weak scaling."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from analysis.figures import caption, style
from analysis.records.micro import micro_folders, read_launches, read_rows
from analysis.records.provenance import joined

NAME = "scaling"
BENCHMARK = "micro-scaling"
_GROUP = ["scaling", "method", "model", "per_round", "backend", "cpu", "num_cores"]
_KINDS = ("strong", "weak")
_CLIENTS = {"strong": "cohort", "weak": "clients_per_process"}  # the setting of each
_REQUIRED = ["scaling", "method", "median_seconds"]


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """The records of `fedara micro scaling` below one folder.

    rows: one per finished launch and kind of scaling: _GROUP, world_size, num_hosts,
        median_seconds (a round's, of the slowest process), run_id, commit. per_round: clients of a
        round (strong), or of each process (weak). incomplete: folders without DONE.
    """

    rows: pd.DataFrame
    incomplete: list[str]


def load(path: Path) -> Scaling | None:
    """Read all records below `path`; None if there is none. Raises AnalysisError for a bad one."""
    folders = micro_folders(path, BENCHMARK)
    if not folders:
        return None
    finished, incomplete = read_launches(folders, BENCHMARK)
    rows = [
        {
            **{key: launch[key] for key in ("run_id", "backend", "world_size", "commit")},
            **{key: launch[key] for key in ("cpu", "num_cores", "num_hosts")},
            **{key: row[key] for key in _REQUIRED},
            "model": launch["config"]["model"],
            "per_round": launch["config"][_CLIENTS[row["scaling"]]],
        }
        for folder, launch in finished.items()
        for row in read_rows(folder / "rows.jsonl", _REQUIRED)
    ]
    return Scaling(rows=pd.DataFrame(rows), incomplete=incomplete)


def data(scaling: Scaling) -> pd.DataFrame:
    """One row per number of processes of each group: seconds (median over launches), their range,
    ideal_seconds (from the fewest processes), efficiency (ideal to measured), num_launches and
    run_ids."""
    points = scaling.rows.groupby([*_GROUP, "world_size"], as_index=False).agg(
        seconds=("median_seconds", "median"),
        min_seconds=("median_seconds", "min"),
        max_seconds=("median_seconds", "max"),
        num_launches=("run_id", "nunique"),
        run_ids=("run_id", joined),
    )
    first = points.groupby(_GROUP)[["world_size", "seconds"]].transform("first")
    share = (first["world_size"] / points["world_size"]).where(points["scaling"] == "strong", 1.0)
    points["ideal_seconds"] = first["seconds"] * share
    points["efficiency"] = points["ideal_seconds"] / points["seconds"]
    return points


def draw(scaling: Scaling, out_dir: Path) -> list[Path]:
    """One panel for each kind; a line for each method, model and machine, and its ideal."""
    points = data(scaling)
    kinds = [kind for kind in _KINDS if kind in set(points["scaling"])]
    out = out_dir / NAME
    with style.context():
        fig = Figure(figsize=(3.1 * len(kinds), 3.0))
        axes = fig.subplots(1, len(kinds), squeeze=False)[0]
        handles: dict[str, Line2D] = {}
        for kind, ax in zip(kinds, axes, strict=True):
            for group, line in points[points["scaling"] == kind].groupby(_GROUP):
                handles |= _draw_line(ax, dict(zip(_GROUP, group, strict=True)), line)
            ticks = sorted(points["world_size"].unique())
            ax.set_xscale("log", base=2)
            ax.set_xticks(ticks, [str(tick) for tick in ticks])
            ax.xaxis.set_minor_locator(NullLocator())
            ax.set_ylim(bottom=0)
            ax.set_xlabel("Processes")
            ax.set_ylabel("Seconds a round")
            ax.set_title(f"{kind} scaling")
        dashes: Any = style.MODELLED
        ideal = Line2D([], [], color=style.GREY, linestyle=dashes, label="ideal")
        fig.legend(handles=[*handles.values(), ideal], loc="outside lower center", ncols=1)
        files = style.save(fig, out)
    return [*files, caption.write_text(out, _caption(scaling, points))]


def _draw_line(ax: Any, group: dict[str, Any], line: pd.DataFrame) -> dict[str, Line2D]:
    """Medians with the range over launches, and the ideal; what the legend says of them."""
    look = style.look(group["method"])
    middle = line["seconds"]
    ax.errorbar(
        line["world_size"],
        middle,
        yerr=[middle - line["min_seconds"], line["max_seconds"] - middle],
        color=look.color,
        marker=look.marker,
        linestyle=look.linestyle,
        markersize=look.size(),
        elinewidth=0.8,
    )
    ax.plot(line["world_size"], line["ideal_seconds"], color=style.GREY, linestyle=style.MODELLED)
    label = f"{group['method']}, {group['model']}, {group['backend']}, {group['cpu']}"
    dashes: Any = look.linestyle  # matplotlib's own type has no (offset, dashes)
    handle = Line2D([], [], color=look.color, marker=look.marker, linestyle=dashes, label=label)
    return {label: handle}


def _caption(scaling: Scaling, points: pd.DataFrame) -> list[str]:
    cores = int(scaling.rows["num_cores"].max() * scaling.rows["num_hosts"].max())
    clients = {
        kind: ", ".join(str(n) for n in sorted(set(own["per_round"])))
        for kind, own in points.groupby("scaling")
    }
    sizes = []
    if "strong" in clients:
        sizes.append(f"strong scaling {clients['strong']} clients a round")
    if "weak" in clients:
        sizes.append(f"weak scaling {clients['weak']} clients on each process")
    efficiency = "; ".join(
        f"{row['scaling']}, {row['method']}, {row['world_size']} processes: {row['efficiency']:.2f}"
        for _, row in points.iterrows()
    )
    text = (
        "Seconds of one round of federated training without evaluation, the slowest process, "
        "median over launches with their range, against the number of MPI processes, one thread "
        f"each: {' and '.join(sizes)}. Dashed: ideal, from the fewest processes. More than {cores} "
        "processes share the machine's cores. "
        f"Efficiency (ideal to measured seconds): {efficiency}."
    )
    commits = ", ".join(sorted(set(scaling.rows["commit"])))
    launches = f"Launches: {scaling.rows['run_id'].nunique()}; commit {commits}."
    return [text, launches]
