"""Table: FedARA's headline numbers in its paper (arXiv 2501.14406) beside those of the records."""

from typing import Any

import pandas as pd

from analysis.records import caveats
from analysis.records.campaign import PANEL, Campaign, NotDrawn, by_panel, modelled_devices
from analysis.records.energy import energy_kind, known_energy
from analysis.records.per_run import LATE, mean_of_all, per_run
from analysis.records.provenance import joined
from analysis.records.target import costs_to_target
from analysis.tables.render import Table

NAME = "headline"
# The grouping is our reading of the paper: weak is what it builds on, strong what improves on that.
_WEAK = ["fedadapter", "lora"]
_STRONG = ["slora", "adalora", "ffa_lora", "federa"]
_ACCURACIES = {
    "accuracy_percent": "",
    "late_accuracy_percent": f" (mean of the last {LATE} evaluations)",
}
_ABSENT = "not in these records"


def data(campaign: Campaign) -> pd.DataFrame:
    """One row per data set, partition, setting of the whole FedARA (no ablation) and reading.

    Columns: dataset, partition, setting, paper, reading, ours (text with unit, or why it is
    missing), num_runs, run_ids. Panels in which LoRA has several settings are left out, as in a
    tuning campaign: their runs do not replicate one result. Raises NotDrawn where fedara or a
    method to compare it with is missing.
    """
    runs = per_run(campaign)
    try:
        reached = costs_to_target(campaign).set_index("run_id")["total_bytes"]
    except NotDrawn:
        reached = pd.Series(dtype=float)
    runs["total_bytes_to_target"] = runs["run_id"].map(reached)
    mixed = caveats.mixed_machines(campaign)
    readings = [*_BYTES, *_cost_readings(campaign)]
    rows: list[dict[str, Any]] = []
    for panel, group in by_panel(campaign, runs):
        others = group[group["method"] != "fedara"]
        lora = others[others["method"] == "lora"]
        if others.empty or lora["setting"].nunique() > 1:
            continue
        gap = caveats.MARK if panel in mixed else ""
        whole = group[(group["method"] == "fedara") & ~group["is_ablation"]]
        for setting, fedara in whole.groupby("setting"):
            place = dict(zip(PANEL, panel, strict=True)) | {"setting": setting}
            found = _accuracies(fedara, others) + _against_lora(fedara, lora, readings, gap)
            rows += [place | row for row in found]
    if not rows:
        raise NotDrawn("no data set and partition with fedara, and other methods at one setting")
    return pd.DataFrame(rows)


def table(campaign: Campaign) -> Table:
    """The table and what must be said below it."""
    frame = data(campaign)
    cells = frame.drop(columns="run_ids").rename(columns={"num_runs": "runs"}).astype(str)
    cells = cells.rename(columns={"setting": "fedara's setting"})
    if not frame["setting"].any():
        cells = cells.drop(columns="fedara's setting")
    reason = known_energy(campaign)[1]
    notes = [
        "Paper: FedARA, arXiv 2501.14406. Whether its percentages are points, and whether 2.40x is",
        "total traffic or traffic to a target accuracy, is not public: both readings are given.",
        f"Weak baselines: {', '.join(_WEAK)}. Strong: {', '.join(_STRONG)}; of them those with",
        "records, settings and methods weighted equally. The grouping is ours. Models, data and",
        "machines differ from the paper's; seconds compare only runs that had the same machine to",
        "themselves. Counted FLOPs are of local training. Modelled seconds and joules are of",
        "rounds (download, local training, upload) on edge devices, from counted FLOPs and bytes;",
        "nothing of them is measured. headline.csv names the runs behind each cell.",
        *([f"Energy: {reason}."] if reason else []),
    ]
    title = "Headline numbers of the paper and of these records"
    return Table(name=NAME, title=title, cells=cells, numbers=frame, notes=notes)


# The paper's number, the column of `per_run`, its name, and whether unlike machines differ in it.
_Reading = tuple[str, str, str, bool]
_BYTES: list[_Reading] = [
    ("2.40x", "cumulative_total_bytes", "bytes up and down of LoRA to FedARA's, whole run", False),
    ("2.40x", "total_bytes_to_target", "the same until 95 % of LoRA's last accuracy", False),
]


def _cost_readings(campaign: Campaign) -> list[_Reading]:
    """Readings of time and energy. Their names say what is measured, counted or modelled."""
    source = known_energy(campaign)[0]
    how = f"{energy_kind(source)} by {source}" if source else "measured"
    devices = modelled_devices(campaign)
    return [
        *_both_ways("-48.90 %", "local_train_seconds", "measured: seconds of local training", True),
        *_both_ways("-48.90 %", "flops", "counted: FLOPs of local training", False),
        *_modelled("-48.90 %", "seconds", devices),
        ("-46.95 %", "energy_joules", f"{how}: joules of the whole run", True),
        *_both_ways("-46.95 %", "local_train_joules", "counted: joules of local training", True),
        *_modelled("-46.95 %", "joules", devices),
    ]


def _modelled(paper: str, unit: str, devices: list[str]) -> list[_Reading]:
    names = [(f"modelled_{unit}.{name}", f"modelled: {unit} on {name}") for name in devices]
    return [reading for name in names for reading in _both_ways(paper, *name, False)]


def _both_ways(paper: str, column: str, text: str, of_a_machine: bool) -> list[_Reading]:
    return [
        (paper, f"all_{column}", f"{text}, whole run", of_a_machine),
        (paper, f"last_{column}", f"{text}, last round", of_a_machine),
    ]


def _accuracies(fedara: pd.DataFrame, others: pd.DataFrame) -> list[dict[str, Any]]:
    rows = []
    for paper, kind, methods in (("+8.49 %", "weak", _WEAK), ("+6.95 %", "strong", _STRONG)):
        baselines = others[others["method"].isin(methods)]
        for column, when in _ACCURACIES.items():
            # Where one run lacks the number, a mean would be over other runs than the row names.
            by_method = baselines.groupby(["method", "setting"])[column].agg(mean_of_all)
            base, ours = by_method.mean(skipna=False), mean_of_all(fedara[column])
            text = f"accuracy over {kind} baselines{when}"
            if pd.isna(ours - base):
                rows += [_row(paper, f"{text}, {unit}", _ABSENT) for unit in ("points", "relative")]
                continue
            points, relative = f"{ours - base:+.2f}", f"{100 * (ours / base - 1):+.2f} %"
            rows.append(_row(paper, f"{text}, points", points, fedara, baselines))
            rows.append(_row(paper, f"{text}, relative", relative, fedara, baselines))
    return rows


def _against_lora(
    fedara: pd.DataFrame,
    lora: pd.DataFrame,
    readings: list[_Reading],
    gap: str,
) -> list[dict[str, Any]]:
    """FedARA's mean over runs against LoRA's, as the paper has it; none where one run lacks it.

    gap: why numbers that depend on the machine do not compare; "" if they do.
    """
    rows = []
    for paper, column, reading, of_a_machine in readings:
        known = pd.concat([fedara[column], lora[column]]).notna()
        if lora.empty or not known.any():
            rows.append(_row(paper, reading, _ABSENT))
        elif not known.all():
            rows.append(_row(paper, reading, "not known of every run"))
        elif gap and of_a_machine:
            rows.append(_row(paper, reading, gap))
        else:
            ours, base = fedara[column].mean(), lora[column].mean()
            change = f"{100 * (ours / base - 1):+.2f} %"
            text = f"{base / ours:.2f}x" if paper.endswith("x") else change
            rows.append(_row(paper, reading, text, fedara, lora))
    return rows


def _row(paper: str, reading: str, text: str, *behind: pd.DataFrame) -> dict[str, Any]:
    """A row from the runs behind it; of none where the text is the reason why."""
    run_ids = sorted(run_id for runs in behind for run_id in runs["run_id"])
    numbers = {"num_runs": len(run_ids), "run_ids": joined(run_ids)}
    return {"paper": paper, "reading": reading, "ours": text, **numbers}
