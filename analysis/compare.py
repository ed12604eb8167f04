"""Two campaigns side by side: what changed from A to B, and whether by more than noise."""

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd

from analysis import stats
from analysis.records.campaign import PANEL, SERIES, Campaign, series_name
from analysis.records.per_run import per_run
from analysis.records.provenance import commit, hardware, joined
from analysis.records.settings import differing_keys, setting_text, setting_texts
from analysis.tables.render import Table, number

NAME = "compare"
ACCURACY, BYTES, SECONDS = "accuracy_percent", "cumulative_uplink_bytes", "total_seconds"
_HEADINGS = {ACCURACY: "accuracy %", BYTES: "uplink bytes", SECONDS: "seconds"}
_DIGITS = {ACCURACY: 2, BYTES: 0, SECONDS: 1}

DIFFERS, WITHIN, EQUAL = "differs", "within noise", "equal"
TOO_FEW, NO_PAIRS = "too few seeds", "no shared seed"
OTHER_HARDWARE, MISSING = "other hardware", "not in all runs"
_LEVEL = 0.05

# What results and seconds depend on besides the config.
_CIRCUMSTANCES = ["dataset_digest", "hardware", "python", "mpi_library", "torch_library"]
_TEXT_LENGTH = 60


def data(a: Campaign, b: Campaign) -> pd.DataFrame:
    """One row per measure of each data set, partition, method and setting that both campaigns have.

    Columns: those, measure, num_pairs (runs of equal seed), num_equal_digests (pairs that ended
    with the same bits; missing where a digest is), a, b (means over pairs, over all runs where no
    seed is shared), difference (b - a), difference_{low,high} (95 % interval over pairs), p_value,
    p_holm (over all tests of the table), verdict, a_run_ids, b_run_ids. Empty if none is in both.
    """
    rows = [
        dict(zip(SERIES, series, strict=True)) | _row(measure, *_halves(group))
        for series, group in _runs(a, b).groupby(SERIES)
        if group["campaign"].nunique() == 2
        for measure in _HEADINGS
    ]
    if not rows:
        return pd.DataFrame()
    frame = pd.DataFrame(rows)
    frame["p_holm"] = stats.holm(frame["p_value"])
    tested = frame["p_value"].notna()
    least = tested.sum() * frame["num_pairs"].map(stats.least_p_value)
    by_test = np.select([frame["p_holm"] <= _LEVEL, least > _LEVEL], [DIFFERS, TOO_FEW], WITHIN)
    frame["verdict"] = frame["verdict"].where(~tested, by_test)
    return frame


def table(frame: pd.DataFrame, notes: list[str]) -> Table:
    """The rows of `data`, with what must be said below them after `notes`."""
    rules = [
        "A, B: means over pairs of runs of equal seed (over all runs where no seed is shared); of",
        "accuracy the last evaluated round's, of bytes and seconds the whole run's.",
        stats.SENTENCE,
        f"p: two-sided sign-flip test over pairs, Holm-corrected over {frame['p_holm'].count()}",
        f"tests. {DIFFERS}: p is at most {_LEVEL}; {TOO_FEW}: it could not be, as n pairs give no",
        "less than 2^(1 - n) before the correction. Bytes have no noise: any difference counts.",
        f"Seconds on {OTHER_HARDWARE} are not tested. {NAME}.csv names the runs behind each row.",
    ]
    cells = pd.DataFrame([_cells(row) for _, row in frame.iterrows()])
    items = [f"- {note}" for note in notes]
    title = "What changed from A to B"
    return Table(name=NAME, title=title, cells=cells, numbers=frame, notes=[*items, "", *rules])


def summary(a: Campaign, b: Campaign, frame: pd.DataFrame, names: tuple[str, str]) -> list[str]:
    """Sentences: what A and B are, what both have, and what changed over all of it."""
    lines = [
        f"{letter}: {name}: {len(campaign.runs)} runs"
        + _left_out(campaign)
        + f", commit {_commits(campaign)}."
        for letter, name, campaign in zip("AB", names, (a, b), strict=True)
    ]
    changed: Counter[str] = Counter()
    alone: dict[str, list[str]] = {}
    for series, group in _runs(a, b).groupby(SERIES):
        *panel, method, setting = map(str, series)
        if group["campaign"].nunique() == 2:
            changed.update(_changes(*_halves(group)))
        else:
            where = f"Only in {group['campaign'].iloc[0]}, {', '.join(panel)}"
            alone.setdefault(where, []).append(series_name(method, setting))
    lines += [f"{where}: {', '.join(methods)}." for where, methods in sorted(alone.items())]
    if frame.empty:
        return [*lines, "Nothing in common: no data set, partition, method and setting is in both."]
    of_groups = frame[frame["measure"] == BYTES]
    num_groups, num_pairs = len(of_groups), of_groups["num_pairs"].sum()
    known = of_groups.dropna(subset=["num_equal_digests"])
    lines.append(
        f"In both: {num_groups} groups by data set, partition, method and setting, with "
        f"{num_pairs} pairs of runs of equal seed; {known['num_equal_digests'].sum():.0f} of "
        f"{known['num_pairs'].sum()} pairs with digests ended with the same bits."
    )
    other = known[known["num_equal_digests"] < known["num_pairs"]]
    if not other.empty:
        lines.append(f"Other bits: {'; '.join(_place(row) for _, row in other.iterrows())}.")
    lines += [f"Changed in {n} of {num_groups} groups: {text}." for text, n in changed.items()]
    return [*lines, *filter(None, (_over_groups(frame, name) for name in (ACCURACY, SECONDS)))]


def _left_out(campaign: Campaign) -> str:
    counts = {"incomplete": len(campaign.incomplete), "damaged": len(campaign.damaged)}
    texts = [f"{count} {kind}" for kind, count in counts.items() if count]
    return f" ({', '.join(texts)}, left out)" if texts else ""


def changes(a: Campaign, b: Campaign) -> list[str]:
    """Keys of the config and circumstances that are other in B than in A, such as "cpu x -> y"."""
    return _changes(*_halves(_runs(a, b)))


def differing(frame: pd.DataFrame) -> list[str]:
    """One line for each row of `data` that differs, for the screen."""
    rows = [row for _, row in frame[frame["verdict"] == DIFFERS].iterrows()]
    return [
        f"Differs: {_place(row)}: {cell['measure']} {cell['A']} -> {cell['B']} ({cell['B - A']})"
        for row, cell in zip(rows, map(_cells, rows), strict=True)
    ]


def _place(row: pd.Series) -> str:
    return f"{row['dataset']}, {row['partition']}, {series_name(row['method'], row['setting'])}"


def _runs(a: Campaign, b: Campaign) -> pd.DataFrame:
    """The runs of both, `campaign` A or B, with the measures of `per_run` and their state_digest.

    Settings are told apart by keys that differ within A or within B, not by what only changed
    from A to B.
    """
    frames = [
        one.runs.assign(hardware=one.runs.apply(hardware, axis=1), campaign=name).merge(
            per_run(one)[["run_id", ACCURACY, BYTES, "state_digest"]], on="run_id"
        )
        for name, one in (("A", a), ("B", b))
    ]
    runs = pd.concat(frames, ignore_index=True)
    for _, group in runs.groupby([*PANEL, "method"]):
        keys = [key for half in _halves(group) for key in differing_keys(half)]
        runs.loc[group.index, "setting"] = setting_texts(group, list(dict.fromkeys(keys)))
    return runs


def _halves(group: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    return group[group["campaign"] == "A"], group[group["campaign"] == "B"]


def _row(measure: str, in_a: pd.DataFrame, in_b: pd.DataFrame) -> dict[str, Any]:
    pairs = in_a.merge(in_b, on="seed", suffixes=("_a", "_b"))
    differences = pairs[f"{measure}_b"] - pairs[f"{measure}_a"]
    digests = pairs[["state_digest_a", "state_digest_b"]]
    known = digests.notna().all(axis=None)
    if not pairs.empty:
        in_a, in_b = (in_x[in_x["seed"].isin(pairs["seed"])] for in_x in (in_a, in_b))
    mean_a, mean_b = (in_x[measure].mean(skipna=False) for in_x in (in_a, in_b))
    low, high = stats.interval(differences)
    verdict = _verdict(measure, differences, pd.concat([in_a, in_b])["hardware"])
    return {
        "measure": measure,
        "num_pairs": len(pairs),
        "num_equal_digests": (digests.nunique(axis=1) == 1).sum() if known else float("nan"),
        "a": mean_a,
        "b": mean_b,
        "difference": mean_b - mean_a,
        "difference_low": low,
        "difference_high": high,
        "p_value": float("nan") if verdict else stats.paired_p_value(differences.to_numpy()),
        "verdict": verdict,
        "a_run_ids": joined(in_a["run_id"]),
        "b_run_ids": joined(in_b["run_id"]),
    }


def _verdict(measure: str, differences: pd.Series, hardware: pd.Series) -> str:
    """The verdict that needs no test; "" where a test is needed."""
    if differences.empty:
        return NO_PAIRS
    if differences.isna().any():
        return MISSING
    if (differences == 0).all():
        return EQUAL
    if measure == BYTES:
        return DIFFERS
    if measure == SECONDS and hardware.nunique() > 1:
        return OTHER_HARDWARE
    return TOO_FEW if len(differences) < stats.MIN_PAIRS else ""


def _over_groups(frame: pd.DataFrame, measure: str) -> str:
    """Whether a measure moved over all groups alike; one group may have too few seeds to tell."""
    rows = frame[frame["measure"] == measure]
    rows = rows[~rows["verdict"].isin([NO_PAIRS, MISSING, OTHER_HARDWARE])]
    if len(rows) < stats.MIN_PAIRS:
        return ""
    relative = measure == SECONDS
    moved = 100 * (rows["b"] / rows["a"] - 1) if relative else rows["difference"]
    p_value = stats.paired_p_value(moved.to_numpy())
    mean = f"{moved.mean():+.2f} {'% of seconds' if relative else 'points of accuracy'}"
    return f"Over {len(rows)} groups: {mean}, p = {p_value:.2g} (sign-flip test over groups)."


def _changes(in_a: pd.DataFrame, in_b: pd.DataFrame) -> list[str]:
    """The keys of config and circumstances that are not the same in A and in B, with values."""
    both = pd.concat([in_a, in_b])
    packages = [name for name in both if str(name).startswith("package_versions.")]
    around = [name for name in [*_CIRCUMSTANCES, *packages] if name in both]
    texts = []
    for key in [*differing_keys(both), *around]:
        of_a, of_b = (
            " or ".join(sorted({_short(value, str(key)) for value in half[key]}))
            for half in (in_a, in_b)
        )
        if of_a != of_b:
            texts.append(f"{key} {of_a} -> {of_b}")
    return texts


def _short(value: Any, key: str) -> str:
    return " ".join(setting_text(value, key).split())[:_TEXT_LENGTH]


def _commits(campaign: Campaign) -> str:
    names = {commit(run) for _, run in campaign.runs.iterrows()} - {""}
    return " or ".join(sorted(names)) or "unknown"


def _cells(row: pd.Series) -> dict[str, str]:
    digits = _DIGITS[row["measure"]]
    low, high = (number(row[f"difference_{end}"], digits, "+,") for end in ("low", "high"))
    return {
        "data": row["dataset"],
        "partition": row["partition"],
        "method": series_name(row["method"], row["setting"]),
        "measure": _HEADINGS[row["measure"]],
        "pairs": str(row["num_pairs"]),
        "same bits": number(row["num_equal_digests"], 0),
        "A": number(row["a"], digits, ","),
        "B": number(row["b"], digits, ","),
        "B - A": number(row["difference"], digits, "+,"),
        "95 % interval": f"{low} to {high}" if low else "",
        "p (Holm)": number(row["p_holm"], 3),
        "verdict": row["verdict"],
    }
