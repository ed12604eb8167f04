"""The conditions under which a campaign was run, in words, for captions and tables."""

import textwrap
from functools import lru_cache
from pathlib import Path

import pandas as pd

from analysis import stats
from analysis.records import caveats
from analysis.records.campaign import SERIES, Campaign, by_panel, by_series, series_name
from analysis.records.launches import Launches
from analysis.records.settings import USUAL_SETTINGS

# Label, and the columns of Campaign.runs behind it. Columns that no run has are left out, and so
# are usual settings.
_CONDITIONS = {
    "model": ["model.name"],
    "clients": ["federation.num_clients"],
    "cohort": ["federation.cohort"],
    "dropout": ["clients.dropout"],
    "over-selection": ["clients.over_selection"],
    "deadline in modelled s": ["clients.deadline_seconds"],
    "speed spread": ["clients.speed_spread"],
    "rounds": ["federation.num_rounds"],
    "local steps": ["train.local_steps"],
    "local epochs": ["train.local_epochs"],
    "batch size": ["train.batch_size"],
    "optimizer": ["train.optimizer"],
    "lr": ["train.lr"],
    "LoRA rank": ["adapter.lora_rank"],
    "targets": ["adapter.targets"],
    "evaluated on": ["evaluate.split"],
    "examples evaluated before the last round (all in the last)": ["evaluate.eval_examples"],
    "processes": ["comm", "world_size"],
    "device": ["device"],
    "CPU": ["cpu"],
    "GPU": ["gpu"],
    "data digest": ["dataset_digest"],
    "commit": ["git_commit", "git_dirty"],
}
_WIDTH = 100


def paragraphs(campaign: Campaign, title: str) -> list[str]:
    """The caption of a campaign's figure."""
    seeds = f"Mean over seeds. {stats.SENTENCE}"
    if campaign.runs.groupby(SERIES).size().max() == 1:
        seeds = "One seed each: differences between methods carry no measure of spread."
    return [f"{title} {seeds}", *caveats.warnings(campaign), *conditions(campaign)]


def write(out: Path, paragraphs: list[str]) -> Path:
    """Write `out`.txt, wrapped; returns its path."""
    file = out.with_name(f"{out.name}.txt")
    # Run ids hold hyphens, and must stay whole to be searched for.
    wrapped = [textwrap.fill(text, _WIDTH, break_on_hyphens=False) for text in paragraphs]
    file.write_text("\n\n".join(wrapped) + "\n", encoding="utf-8", newline="\n")
    return file


@lru_cache(maxsize=1)  # each figure of a report writes the same ones
def conditions(campaign: Campaign) -> list[str]:
    """One line per panel, with every value that occurs in it, and what was left out."""
    lines = []
    for panel, runs in by_panel(campaign, campaign.runs):
        values = [f"{label} {text}" for label in _CONDITIONS if (text := _values(runs, label))]
        lines.append(f"{', '.join(panel)}: {'; '.join([*values, _seeds(runs)])}.")
    return [*lines, *left_out(campaign)]


def left_out(records: Campaign | Launches) -> list[str]:
    """One line about incomplete records, and one about damaged ones, if there are any."""
    kinds = {"incomplete": (", ", records.incomplete), "damaged": ("; ", records.damaged)}
    return [
        f"Left out as {kind} ({len(names)}): {separator.join(names)}."
        for kind, (separator, names) in kinds.items()
        if names
    ]


def _values(runs: pd.DataFrame, label: str) -> str:
    columns = [column for column in _CONDITIONS[label] if column in runs]
    rows = runs[columns].dropna(how="all").drop_duplicates().itertuples(index=False)
    usual = tuple(USUAL_SETTINGS.get(column) for column in columns)
    found = [row for row in rows if tuple(row) != usual]
    texts = {_join(label, [value for value in row if not pd.isna(value)]) for row in found}
    return " or ".join(sorted(texts - {""}))


def _join(label: str, values: list[object]) -> str:
    if label == "commit":
        dirty = " with uncommitted changes" if True in values else ""
        return f"{str(values[0])[:12]}{dirty}"
    if label == "data digest":
        return str(values[0])[:12]
    if label == "processes":
        return " x ".join(str(value) for value in values)
    return " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)


def _seeds(runs: pd.DataFrame) -> str:
    texts = []
    for method, setting, group in by_series(runs):
        seeds = ", ".join(str(seed) for seed in sorted(group["seed"]))
        texts.append(f"{series_name(method, setting)} n = {len(group)} ({seeds})")
    return "seeds: " + ", ".join(texts)
