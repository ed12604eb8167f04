"""Table: FedARA's headline numbers in its paper (arXiv 2501.14406) beside those of the records."""

from typing import Any

import pandas as pd

from analysis.ends import ends
from analysis.load import PANEL, Campaign, NotDrawn
from analysis.tables import Table
from analysis.target import costs_to_target

NAME = "headline"
# Which baselines the paper calls weak and strong is taken from its baselines' kinds; ours.
_WEAK = ["fedadapter"]
_STRONG = ["lora", "slora", "adalora", "ffa_lora", "federa"]


def data(campaign: Campaign) -> pd.DataFrame:
    """One row per data set, partition and reading.

    Columns: dataset, partition, paper, reading, ours (text with unit, or why it is missing),
    num_runs, run_ids. Raises NotDrawn without fedara and a method to compare it with.
    """
    runs = ends(campaign)
    try:
        reached = costs_to_target(campaign).set_index("run_id")["total_bytes"]
    except NotDrawn:
        reached = pd.Series(dtype=float)
    runs["total_bytes_to_target"] = runs["run_id"].map(reached)
    rows: list[dict[str, Any]] = []
    for panel, group in runs.groupby(PANEL, sort=False):
        fedara = group[group["method"] == "fedara"]
        # Several settings, as in a tuning campaign, are no replicates of one result.
        if fedara["setting"].nunique() != 1 or len(group) == len(fedara):
            continue
        for row in _readings(group, fedara):
            rows.append(dict(zip(PANEL, panel, strict=True)) | row)
    if not rows:
        raise NotDrawn("no data set and partition with fedara, at one setting, and another method")
    return pd.DataFrame(rows)


def table(campaign: Campaign) -> Table:
    """The table and what must be said below it."""
    frame = data(campaign)
    cells = frame.drop(columns="run_ids").rename(columns={"num_runs": "runs"}).astype(str)
    notes = [
        "Paper: FedARA, arXiv 2501.14406. Whether its percentages are points, and whether 2.40x is",
        "total traffic or traffic to a target accuracy, is not public: both readings are given.",
        f"Weak baselines: {', '.join(_WEAK)}. Strong: {', '.join(_STRONG)}; of them those with",
        "records, settings and methods weighted equally. The grouping is ours. Models, data and",
        "machines differ from the paper's; seconds compare only runs that had the same machine to",
        "themselves. headline.csv names the runs behind each cell.",
    ]
    title = "Headline numbers of the paper and of these records"
    return Table(name=NAME, title=title, cells=cells, numbers=frame, notes=notes)


def _readings(group: pd.DataFrame, fedara: pd.DataFrame) -> list[dict[str, Any]]:
    lora = group[group["method"] == "lora"]
    rows = []
    for paper, kind, methods in (("+8.49 %", "weak", _WEAK), ("+6.95 %", "strong", _STRONG)):
        others = group[group["method"].isin(methods)]
        base = others.groupby(["method", "setting"])["accuracy_percent"].mean().mean()
        ours = fedara["accuracy_percent"].mean()
        against = f"accuracy over {kind} baselines"
        rows.append(_row(paper, f"{against}, points", ours - base, "{:+.2f}", fedara, others))
        relative = 100 * (ours / base - 1)
        rows.append(_row(paper, f"{against}, relative", relative, "{:+.2f} %", fedara, others))
    for column, reading in (
        ("cumulative_total_bytes", "bytes up and down of LoRA to FedARA's, whole run"),
        ("total_bytes_to_target", "the same until 95 % of LoRA's last accuracy"),
    ):
        ratio = lora[column].mean() / fedara[column].mean()
        rows.append(_row("2.40x", reading, ratio, "{:.2f}x", fedara, lora))
    for column, reading in (
        ("all_local_train_seconds", "local training seconds against LoRA, whole run"),
        ("last_local_train_seconds", "local training seconds against LoRA, last round"),
    ):
        change = 100 * (fedara[column].mean() / lora[column].mean() - 1)
        rows.append(_row("-48.90 %", reading, change, "{:+.2f} %", fedara, lora))
    energy = "energy against LoRA on edge devices"
    rows.append(_row("-46.95 %", energy, float("nan"), "{}", fedara, lora))
    return rows


def _row(
    paper: str, reading: str, value: float, form: str, ours: pd.DataFrame, others: pd.DataFrame
) -> dict[str, Any]:
    missing = pd.isna(value) or others.empty
    run_ids = [] if missing else sorted([*ours["run_id"], *others["run_id"]])
    return {
        "paper": paper,
        "reading": reading,
        "ours": "not in these records" if missing else form.format(value),
        "num_runs": len(run_ids),
        "run_ids": " ".join(run_ids),
    }
