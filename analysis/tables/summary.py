"""Table: final accuracy, traffic and time of each method, per data set and partition."""

from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from analysis.figures import caption
from analysis.records import caveats
from analysis.records.campaign import PANEL, SERIES, Campaign, series_name
from analysis.records.energy import known_energy
from analysis.records.per_run import in_panels, per_run
from analysis.records.provenance import joined
from analysis.tables.render import markdown_row, markdown_text, number

NAME = "summary"
_SHOW_COLUMNS = 100
_ENERGY = {"energy_joules": ("energy_joules", "mean"), "energy_source": ("energy_source", "first")}

# Headings of summary.md (in one line) and of the screen (in two, to fit 100 columns).
_HEADINGS = [
    *("method", "n", "accuracy\n%", "macro\nF1", "up\nMB", "down\nMB", "up /\nlora", "total\ns"),
    *("train s\nfirst", "train s\nlast", "live\ntriplets"),
    "energy\nJ",  # left out where the table has no energy
]


def data(campaign: Campaign) -> pd.DataFrame:
    """One row per data set, partition, method and setting; means over runs, which differ in seed.

    Columns: dataset, partition, method, setting, num_rounds, cohort, num_runs,
    accuracy_percent_{mean,std}, macro_f1_{mean,std} (of the last evaluated round; std of a sample,
    missing for one run), uplink_bytes, downlink_bytes (sums over all rounds), uplink_ratio_to_lora
    (missing without a comparable lora), total_seconds, {first,last}_round_local_train_seconds,
    live_triplets (of the last round), run_ids; and energy_joules of the whole run and energy_source
    where all runs have one source.
    """
    source = known_energy(campaign)[0]
    # In the order of the records, on which the last digit of a mean depends.
    runs = per_run(campaign).set_index("run_id").loc[campaign.runs["run_id"]].reset_index()
    frame = (
        runs.assign(energy_source=source)
        .groupby(SERIES, as_index=False)
        .agg(
            num_rounds=("num_rounds", "first"),
            cohort=("cohort", "first"),
            num_runs=("run_id", "nunique"),
            accuracy_percent_mean=("accuracy_percent", "mean"),
            accuracy_percent_std=("accuracy_percent", "std"),
            macro_f1_mean=("macro_f1", "mean"),
            macro_f1_std=("macro_f1", "std"),
            uplink_bytes=("cumulative_uplink_bytes", "mean"),
            downlink_bytes=("cumulative_downlink_bytes", "mean"),
            total_seconds=("total_seconds", "mean"),
            first_round_local_train_seconds=("first_local_train_seconds", "mean"),
            last_round_local_train_seconds=("last_local_train_seconds", "mean"),
            live_triplets=("live_triplets", "mean"),
            **(_ENERGY if source else {}),
            run_ids=("run_id", joined),
        )
    )
    ratios = [_ratio_to_lora(row, frame) for _, row in frame.iterrows()]
    frame.insert(list(frame).index("total_seconds"), "uplink_ratio_to_lora", ratios)
    return in_panels(campaign, frame)


def energy_note(campaign: Campaign) -> str:
    """The source of the table's joules, or why it has none; empty where no run measured energy."""
    source, reason = known_energy(campaign)
    if source:
        return f"J: energy of the whole run by {source}; -model: modelled."
    return "" if campaign.runs["energy_source"].isna().all() else f"No energy: {reason}."


def write(campaign: Campaign, out_dir: Path) -> list[Path]:
    """Write summary.md (rounded, MB) and summary.csv (all digits, bytes) to `out_dir`."""
    out_dir.mkdir(parents=True, exist_ok=True)
    frame = data(campaign)
    markdown, csv = out_dir / f"{NAME}.md", out_dir / f"{NAME}.csv"
    markdown.write_text(_markdown(campaign, frame), encoding="utf-8", newline="\n")
    frame.to_csv(csv, index=False, lineterminator="\n")
    return [markdown, csv]


def show(campaign: Campaign) -> None:
    """Print the table, one block per data set and partition, at most 100 columns wide."""
    console = Console(markup=False, emoji=False)  # names are no markup
    console.width = min(console.width, _SHOW_COLUMNS) if console.is_terminal else _SHOW_COLUMNS
    for panel, rows in _blocks(data(campaign)):
        title = caveats.heading(campaign, panel)
        table = Table(title=title, title_justify="left", padding=(0, 1, 0, 0), box=None)
        for heading in _HEADINGS[: len(rows[0])]:
            text = heading == "method"
            table.add_column(heading, justify="left" if text else "right", no_wrap=not text)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()
    if note := energy_note(campaign):
        console.print(note, soft_wrap=True)


def _ratio_to_lora(row: pd.Series, frame: pd.DataFrame) -> float:
    """Uplink relative to lora's in the same panel, over as many rounds with as large a cohort.

    If several lora rows differ in uplink, the one at the same setting counts; else there is none.
    """
    keys = [*PANEL, "num_rounds", "cohort"]
    lora = frame[(frame["method"] == "lora") & (frame[keys] == row[keys]).all(axis=1)]
    same_setting = lora[lora["setting"] == row["setting"]]
    uplink = (lora if same_setting.empty else same_setting)["uplink_bytes"].unique()
    return row["uplink_bytes"] / uplink[0] if len(uplink) == 1 else float("nan")


def _blocks(frame: pd.DataFrame) -> list[tuple[tuple[str, str], list[list[str]]]]:
    """(panel, rows of formatted cells under _HEADINGS), in the order of the frame."""
    return [
        ((str(dataset), str(partition)), [_cells(row) for _, row in rows.iterrows()])
        for (dataset, partition), rows in frame.groupby(PANEL, sort=False)
    ]


def _cells(row: pd.Series) -> list[str]:
    deviation = number(row["accuracy_percent_std"], 1)
    cells = [
        series_name(row["method"], row["setting"]),
        str(row["num_runs"]),
        number(row["accuracy_percent_mean"], 1) + (deviation and f" +- {deviation}"),
        number(row["macro_f1_mean"], 3),
        _megabytes(row["uplink_bytes"]),
        _megabytes(row["downlink_bytes"]),
        number(row["uplink_ratio_to_lora"], 3),
        number(row["total_seconds"], 1),
        number(row["first_round_local_train_seconds"], 2),
        number(row["last_round_local_train_seconds"], 2),
        number(row["live_triplets"], 0),
    ]
    return cells + ([number(row["energy_joules"], 0)] if "energy_joules" in row else [])


def _megabytes(num_bytes: float) -> str:
    megabytes = num_bytes / 1e6
    return f"{megabytes:.2f}" if megabytes >= 1 else f"{megabytes:.3g}"


def _markdown(campaign: Campaign, frame: pd.DataFrame) -> str:
    lines = ["# Summary", ""]
    for panel, rows in _blocks(frame):
        lines += [f"## {markdown_text(caveats.heading(campaign, panel))}", ""]
        headings = [heading.replace("\n", " ") for heading in _HEADINGS[: len(rows[0])]]
        rule = ["---", *["--:"] * (len(headings) - 1)]
        lines += [*map(markdown_row, [headings, rule, *rows]), ""]
    lines += [
        "n: runs, which differ in seed. Accuracy, macro F1: last evaluated round, mean (+- sample",
        "standard deviation). MB: 10^6 bytes, sum over all rounds. up / lora: uplink as a part of",
        "lora's. total s: whole run. train s: local training in the first and in the last round,",
        "maximum over processes. live triplets: last round.",
        *filter(None, [energy_note(campaign)]),
        "",
    ]
    items = caveats.warnings(campaign) + caption.conditions(campaign)
    lines += [f"- {markdown_text(item)}" for item in items]
    return "\n".join(lines) + "\n"
