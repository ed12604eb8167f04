"""Table: a local step of the suite, lever by lever, against that of a bare PEFT loop."""

import pandas as pd

from analysis.records.campaign import NotDrawn
from analysis.records.launches import Launches
from analysis.tables.over_launches import medians_and_quartiles, milliseconds, over_launches
from analysis.tables.render import Table

NAME = "step"
BENCHMARK = "micro-step"
REQUIRED = [
    *("method", "precision", "lengths", "max_length", "batch_size", "lora_rank", "levers"),
    *("median_seconds", "bare_loop_median_seconds", "ratio_to_bare_loop"),
]

# What the rows of one ablation share.
PLACE = [
    *("model", "cpu", "num_cores", "method", "lengths", "max_length", "batch_size", "lora_rank"),
]
_GROUP = [*PLACE, "precision", "levers", "attention", "packed"]
_MEDIANS = [
    *("bare_loop_median_seconds", "token_share", "step_peak_bytes", "bare_loop_step_peak_bytes"),
]
_SPREAD = ["median_seconds", "ratio_to_bare_loop"]


def data(step: Launches) -> pd.DataFrame:
    """One row per lever of each ablation on one machine, as recorded: medians over launches.

    Columns: _GROUP, num_launches, _MEDIANS, _SPREAD with quartiles, run_ids. Raises NotDrawn.
    """
    if step.rows.empty:
        raise NotDrawn("no launch of fedara micro step finished an ablation")
    frame = over_launches(step.rows, _GROUP, _MEDIANS, _SPREAD)
    order = [*PLACE, "precision"]
    return frame.sort_values(order, key=_in_order, kind="stable", ignore_index=True)


def _in_order(column: pd.Series) -> pd.Series:
    """Sort key: fp32 first, all else by value."""
    return column != "fp32" if column.name == "precision" else column


def table(step: Launches) -> Table:
    frame = data(step)
    cells = pd.DataFrame(
        {
            "method": frame["method"],
            "model": frame["model"],
            "lengths": frame["lengths"],
            "tokens": frame["max_length"].astype(str),
            "filled %": (100 * frame["token_share"]).map("{:.0f}".format),
            "precision": frame["precision"],
            "levers": frame["levers"],
            "attention": frame["attention"].fillna(""),
            "CPU": frame["cpu"],
            "launches": frame["num_launches"].astype(str),
            "ms a step": medians_and_quartiles(frame, "median_seconds", milliseconds),
            "PEFT loop ms": frame["bare_loop_median_seconds"].map(milliseconds),
            "ratio": medians_and_quartiles(frame, "ratio_to_bare_loop", "{:.3f}".format),
            "peak MB": frame["step_peak_bytes"].map(_megabytes),
            "PEFT loop peak MB": frame["bare_loop_step_peak_bytes"].map(_megabytes),
        }
    )
    notes = [
        "Forward, backward, clipping and optimiser on one batch, one process, one thread: medians",
        "over launches (quartiles) of each one's median over steps. PEFT loop: transformers'",
        "classifier, its default attention and PEFT's LoRA; texts are padded to as many tokens.",
        "ratio: median over turns, in each of which all loops took a step on the same texts.",
        "levers: which were on; none is the suite before them. filled: tokens of texts in all",
        "tokens of a batch. peak: resident memory in a step above that before it.",
    ]
    title = "A local step against a bare PEFT loop"
    return Table(name=NAME, title=title, cells=cells, numbers=frame, notes=notes)


def _megabytes(value: float) -> str:
    return "" if pd.isna(value) else f"{value / 1e6:.0f}"
