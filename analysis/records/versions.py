"""Which version of the code's results a run is of. Runs of unlike versions are never averaged."""

import pandas as pd

# run.json's keys, and how a mark names their values. Records from before these keys are version 1.
_MARKS = {"results_version": "results v", "method_version": "v"}


def with_versions(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with the columns results_version and method_version, and their method marked where
    others of the same method are newer: "lora_a2 (v1)"."""
    versions = runs.reindex(columns=[*_MARKS]).astype(float).fillna(1).astype(int)
    runs = runs.assign(**{key: versions[key] for key in _MARKS})
    for method, group in runs.groupby("method"):
        pairs = list(zip(*(group[key] for key in _MARKS), strict=True))
        differing = [key for key in _MARKS if group[key].nunique() > 1]
        names = [
            str(method) if pair == max(pairs) else f"{method} ({_mark(pair, differing)})"
            for pair in pairs
        ]
        runs.loc[group.index, "method"] = names
    return runs


def _mark(pair: tuple[int, ...], keys: list[str]) -> str:
    """The values of these keys, such as "results v1, v2"."""
    values = dict(zip(_MARKS, pair, strict=True))
    return ", ".join(f"{_MARKS[key]}{values[key]}" for key in keys)


def version_sentences(panel: str, runs: pd.DataFrame) -> list[str]:
    """What to know of the versions of one panel's runs (`with_versions`)."""
    lines = []
    marked = sorted(set(runs["method"]) - set(runs["method.name"]))
    if marked:
        lines.append(
            f"{panel}: {', '.join(marked)}: runs of an older version of the code, whose results "
            "are others; they are shown apart."
        )
    found = sorted(map(int, set(runs["results_version"])))
    if len(found) > 1:
        lines.append(
            f"{panel}: runs are of results_version {' and '.join(map(str, found))}, so that their "
            "accuracies do not compare methods."
        )
    return lines
