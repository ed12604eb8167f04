"""Figure: what each lever of the local step is worth, as a ratio to a bare PEFT loop."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from analysis.figures import caption, style
from analysis.records.launches import Launches
from analysis.tables.step import PLACE, data

NAME = "step_levers"
_COLORS = {"fp32": style.BLUE, "bf16": style.ORANGE}
_HEIGHT = 0.76  # of the bars of a lever; levers are 1 apart


@style.context()
def draw(step: Launches, out_dir: Path) -> list[Path]:
    """One panel for each ablation, one bar for each lever and precision."""
    frame = data(step)
    panels = list(frame.groupby(PLACE, sort=False, dropna=False))
    levers = list(dict.fromkeys(frame["levers"]))
    shown = [precision for precision in _COLORS if precision in set(frame["precision"])]
    fig = Figure(figsize=(4.6, (0.36 * len(levers) + 0.8) * len(panels) + 0.4))
    axes = fig.subplots(len(panels), 1, squeeze=False)[:, 0]
    for (place, rows), ax in zip(panels, axes, strict=True):
        _draw_panel(ax, rows, levers, shown)
        ax.set_title(_title(dict(zip(PLACE, place, strict=True))), loc="left")
    axes[-1].set_xlabel("Seconds of a step / those of the PEFT loop")
    handles = [Patch(color=_COLORS[precision], label=precision) for precision in shown]
    fig.legend(handles=handles, loc="outside lower center", ncols=len(shown))
    return style.save(fig, out_dir / NAME, _caption(step, frame))


def _draw_panel(ax: Any, rows: pd.DataFrame, levers: list[str], shown: list[str]) -> None:
    height = _HEIGHT / len(shown)
    for number, precision in enumerate(shown):
        bars = rows[rows["precision"] == precision]
        ratio = bars["ratio_to_bare_loop"]
        low, high = bars["lower_ratio_to_bare_loop"], bars["upper_ratio_to_bare_loop"]
        ax.barh(
            [levers.index(lever) + number * height for lever in bars["levers"]],
            ratio,
            height=height,
            color=_COLORS[precision],
            xerr=[ratio - low, high - ratio],
            error_kw={"elinewidth": 0.8},
        )
    ax.axvline(1, color=style.BLACK, linewidth=0.8)
    middle = (len(shown) - 1) * height / 2
    ax.set_yticks([place + middle for place in range(len(levers))], levers)
    ax.set_ylim(len(levers) - 0.5 + middle, middle - 0.5)  # the first on top
    ax.grid(axis="y", visible=False)
    ax.set_xlim(left=0)


def _title(place: dict[str, Any]) -> str:
    texts = f"{place['lengths']} lengths" if place["lengths"] == "full" else place["lengths"]
    size = f"{place['batch_size']} x {place['max_length']} tokens"
    return f"{place['method']}, {place['model']}, {texts}, {size}\n{place['cpu']}"


def _caption(step: Launches, frame: pd.DataFrame) -> list[str]:
    low, high = frame["num_launches"].min(), frame["num_launches"].max()
    count = f"{low}" if low == high else f"{low} to {high}"
    text = (
        "Seconds of one local step (forward, backward, clipping, optimiser) as a ratio to a bare "
        "loop of transformers' classifier with PEFT's LoRA in the same precision, which pads texts "
        "to all tokens; below 1 the suite is faster. all: with every lever; all but X: with this "
        "key of the config set to what was before; none: all of them. Loops take turns in one "
        f"process with one thread. Launches: {count}; bars: median over launches of each one's "
        "median over turns; lines: quartiles."
    )
    commits = ", ".join(sorted(set(step.launches["commit"])))
    return [text, f"Commit {commits}.", *caption.left_out(step)]
