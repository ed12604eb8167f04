"""Table: last accuracy by method, data set and partition, with paired tests against FedARA."""

import pandas as pd

from analysis import stats as spread
from analysis.records.campaign import SERIES, Campaign, is_panel
from analysis.records.per_run import LATE, ends, in_panels, mean_of_all, series_cells
from analysis.records.provenance import joined
from analysis.tables.render import Table, number

NAME = "accuracy"
_REFERENCE = "fedara"


def data(campaign: Campaign) -> pd.DataFrame:
    """One row per data set, partition, method and setting.

    Columns: those, alpha, num_runs, accuracy_percent_{mean,low,high}, late_accuracy_percent_mean
    (of the last three evaluations; missing where a run has fewer), run_ids, and of runs paired with
    FedARA's by seed num_pairs, paired_run_ids (of both), difference_points (FedARA minus
    this), p_value and p_holm, corrected over all tests of the table. FedARA's ablations are tested
    against it, too. No test below 3 pairs, or where the whole FedARA has several settings.
    """
    runs = ends(campaign).dropna(subset=["accuracy_percent"])
    frame = runs.groupby(SERIES, as_index=False).agg(
        alpha=("alpha", "first"),
        num_runs=("run_id", "nunique"),
        accuracy_percent_mean=("accuracy_percent", "mean"),
        accuracy_percent_low=("accuracy_percent", spread.low),
        accuracy_percent_high=("accuracy_percent", spread.high),
        late_accuracy_percent_mean=("late_accuracy_percent", mean_of_all),
        run_ids=("run_id", joined),
    )
    tests = pd.DataFrame([_test(row, runs) for _, row in frame.iterrows()], index=frame.index)
    columns = ["num_pairs", "paired_run_ids", "difference_points", "p_value"]
    frame = frame.join(tests.reindex(columns=columns))
    tested = frame["p_value"].notna()
    frame["p_holm"] = float("nan")
    frame.loc[tested, "p_holm"] = spread.holm(frame.loc[tested, "p_value"].tolist())
    return in_panels(campaign, frame)


def table(campaign: Campaign) -> Table:
    """The table and what must be said below it."""
    frame = data(campaign)
    cells = series_cells(frame).rename(columns={"dataset": "data"})
    cells["accuracy %"] = frame["accuracy_percent_mean"].map(lambda value: number(value, 1))
    cells["95 % interval"] = [
        ""
        if pd.isna(row["accuracy_percent_low"])
        else f"{row['accuracy_percent_low']:.1f} to {row['accuracy_percent_high']:.1f}"
        for _, row in frame.iterrows()
    ]
    late = f"last {LATE} evaluations %"
    cells[late] = frame["late_accuracy_percent_mean"].map(lambda value: number(value, 1))
    cells["fedara minus this"] = frame["difference_points"].map(lambda value: number(value, 1))
    cells["pairs"] = frame["num_pairs"].map(lambda value: number(value, 0))
    cells["p (Holm)"] = frame["p_holm"].map(lambda value: number(value, 3))
    num_tests = int(frame["p_holm"].notna().sum())
    tests = (
        f"p: two-sided sign-flip test over paired seeds, Holm-corrected over {num_tests} tests; n "
        "pairs can not give less than 2^(1 - n) before the correction."
        if num_tests
        else f"No test: it takes at least {spread.MIN_PAIRS} seeds that fedara and a method share."
    )
    notes = [
        "Accuracy of the last evaluated round, mean over n runs; pairs: seeds that fedara shares.",
        f"Last {LATE} evaluations: the mean of each run's, which may be on fewer examples (see the "
        "figures' conditions).",
        *(spread.SENTENCE, tests, "accuracy.csv names the runs behind each row."),
    ]
    title = "Accuracy by method, data set and partition"
    sources = dict.fromkeys(["fedara minus this", "pairs", "p (Holm)"], "paired_run_ids")
    return Table(name=NAME, title=title, cells=cells, numbers=frame, notes=notes, sources=sources)


def _test(row: pd.Series, runs: pd.DataFrame) -> dict[str, object]:
    panel = runs[is_panel(runs, (row["dataset"], row["partition"]))]
    reference = panel[(panel["method"] == _REFERENCE) & ~panel["is_ablation"]]
    if reference["setting"].nunique() != 1:
        return {}
    if (row["method"], row["setting"]) == (_REFERENCE, reference["setting"].iloc[0]):
        return {}
    mine = panel[(panel["method"] == row["method"]) & (panel["setting"] == row["setting"])]
    pairs = reference.merge(mine, on="seed", suffixes=("", "_other"))
    differences = (pairs["accuracy_percent"] - pairs["accuracy_percent_other"]).to_numpy()
    if len(pairs) < spread.MIN_PAIRS:
        return {"num_pairs": len(pairs)}
    return {
        "num_pairs": len(pairs),
        "paired_run_ids": joined(pd.concat([pairs["run_id"], pairs["run_id_other"]])),
        "difference_points": float(differences.mean()),
        "p_value": spread.paired_p_value(differences),
    }
