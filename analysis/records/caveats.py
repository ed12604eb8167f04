"""Reasons why numbers of a campaign do not compare: other machines, other seeds, one method."""

import json
from functools import lru_cache

import pandas as pd

from analysis.records.campaign import Campaign, by_panel, by_series, series_name
from analysis.records.versions import version_sentences

# What seconds, memory and joules depend on besides the method.
_MACHINE = {
    "cpu": "CPU",
    "num_cores": "cores",
    "gpu": "GPU",
    "device": "device",
    "world_size": "processes",
}
MARK = "machines differ: seconds do not compare"  # stands beside such seconds, or for them


@lru_cache(maxsize=1)  # every figure and table of a report asks for it
def mixed_machines(campaign: Campaign) -> dict[tuple[str, str], str]:
    """What differs between the machines of a panel's runs, such as "CPU (A or B)", by panel."""
    mixed = {}
    for panel, runs in by_panel(campaign, campaign.runs):
        found = {text: _values(runs, column) for column, text in _MACHINE.items()}
        differing = [f"{text} ({' or '.join(v)})" for text, v in found.items() if len(v) > 1]
        if differing:
            mixed[panel] = ", ".join(differing)
    return mixed


def heading(campaign: Campaign, panel: tuple[str, str], before_mark: str = " ") -> str:
    """The title of a panel with seconds, marked where its machines differ."""
    mark = f"{before_mark}({MARK})" if panel in mixed_machines(campaign) else ""
    return f"{', '.join(panel)}{mark}"


def shared_processes(campaign: Campaign) -> set[tuple[str, str]]:
    """Panels in which one process executed several runs, as a sweep in one job does."""
    shared = set()
    for panel, runs in by_panel(campaign, campaign.runs):
        texts = runs.get("processes", pd.Series(dtype=str)).dropna()
        found = [{(p.get("host"), p.get("pid")) for p in json.loads(text)} for text in texts]
        if len(set().union(*found)) < sum(map(len, found)):
            shared.add(panel)
    return shared


@lru_cache(maxsize=1)
def sentences(campaign: Campaign) -> list[str]:
    """One sentence for each reason to read the numbers with care, panel by panel."""
    mixed, shared = mixed_machines(campaign), shared_processes(campaign)
    lines = []
    for panel, runs in by_panel(campaign, campaign.runs):
        name = ", ".join(panel)
        if panel in mixed:
            lines.append(
                f"{name}: runs differ in {mixed[panel]}, so that their seconds, memory and "
                "energy do not compare methods."
            )
        if panel in shared:
            lines.append(
                f"{name}: runs shared processes, so that the peak memory of a later run holds what "
                "earlier ones left behind, and does not compare methods."
            )
        lines += version_sentences(name, runs)
        if devices := _unlike_devices(runs):
            lines.append(
                f"{name}: runs were modelled on unlike numbers of {', '.join(devices)}, so that "
                "modelled seconds and joules do not compare methods."
            )
        if runs["method"].nunique() == 1:
            lines.append(f"{name}: one method, {runs['method'].iloc[0]}: no methods to compare.")
        if seeds := _seeds(runs):
            lines.append(f"{name}: means are over different seeds: {seeds}.")
    return lines


def warnings(campaign: Campaign) -> list[str]:
    """`sentences` as they are written below tables and figures and on the page."""
    return [f"Warning: {text}" for text in sentences(campaign)]


def _values(runs: pd.DataFrame, column: str) -> list[str]:
    """The values that occur; "none" where a run has no value."""
    if column not in runs:
        return []
    known = runs[column].dropna()
    texts = {f"{value:g}" if isinstance(value, float) else str(value) for value in known}
    return sorted(texts | ({"none"} if len(known) < len(runs) else set()))


def _unlike_devices(runs: pd.DataFrame) -> list[str]:
    """Names of the devices whose profiles differ between runs."""
    different = runs.filter(regex=r"^device_profiles\.").nunique() > 1
    names = different.index[different].str.removeprefix("device_profiles.")
    return sorted({name.rpartition(".")[0] for name in names})


def _seeds(runs: pd.DataFrame) -> str:
    """Seeds of the methods, such as "0, 1 (fedara, lora); 0 (slora)"; "" if all are the same."""
    methods_by_seeds: dict[tuple[int, ...], list[str]] = {}
    for method, setting, group in by_series(runs):
        seeds = tuple(sorted(group["seed"]))
        methods_by_seeds.setdefault(seeds, []).append(series_name(method, setting))
    if len(methods_by_seeds) == 1:
        return ""
    most_first = sorted(methods_by_seeds.items(), key=lambda item: -len(item[0]))
    return "; ".join(
        f"{', '.join(map(str, seeds))} ({', '.join(methods)})" for seeds, methods in most_first
    )
