"""Table: last accuracy by method, data set and partition, with paired tests against FedARA."""

import pandas as pd

from analysis import stats
from analysis.records.campaign import SERIES, Campaign, NotDrawn, is_panel
from analysis.records.per_run import LATE, in_panels, mean_of_all, per_run, series_cells
from analysis.records.provenance import joined
from analysis.tables.render import Table, rounded

NAME = "accuracy"
_REFERENCE = "fedara"


def data(campaign: Campaign) -> pd.DataFrame:
    """One row per data set, partition, method and setting.

    Columns: those, alpha, num_runs, accuracy_percent_{mean,low,high}, late_accuracy_percent_mean
    (of the last LATE evaluations; missing where a run has fewer), client_accuracy_percent_mean
    (each client's on its own label mix, mean over clients and runs), run_ids; of the pairs with
    FedARA by seed num_pairs, paired_run_ids (of both), difference_points (FedARA minus this),
    p_value, p_holm (over all tests of the table). Ablations are tested, too. There is no test below
    3 pairs, or where the whole FedARA has several settings. Raises NotDrawn without an evaluated
    run.
    """
    runs = per_run(campaign).dropna(subset=["accuracy_percent"])
    if runs.empty:
        raise NotDrawn("no run holds an evaluated round")
    frame = runs.groupby(SERIES, as_index=False).agg(
        alpha=("alpha", "first"),
        num_runs=("run_id", "nunique"),
        **stats.mean_and_interval("accuracy_percent"),
        late_accuracy_percent_mean=("late_accuracy_percent", mean_of_all),
        client_accuracy_percent_mean=("client_accuracy_mean", mean_of_all),
        run_ids=("run_id", joined),
    )
    frame["client_accuracy_percent_mean"] *= 100
    tests = pd.DataFrame([_test(row, runs) for _, row in frame.iterrows()], index=frame.index)
    columns = ["num_pairs", "paired_run_ids", "difference_points", "p_value"]
    frame = frame.join(tests.reindex(columns=columns))
    frame["p_holm"] = stats.holm(frame["p_value"])
    return in_panels(campaign, frame)


def table(campaign: Campaign) -> Table:
    frame = data(campaign)
    cells = series_cells(frame).rename(columns={"dataset": "data"})
    cells["accuracy %"] = rounded(frame["accuracy_percent_mean"], 1)
    cells["95 % interval"] = [
        ""
        if pd.isna(row["accuracy_percent_low"])
        else f"{row['accuracy_percent_low']:.1f} to {row['accuracy_percent_high']:.1f}"
        for _, row in frame.iterrows()
    ]
    cells[f"last {LATE} evaluations %"] = rounded(frame["late_accuracy_percent_mean"], 1)
    cells["own labels %"] = rounded(frame["client_accuracy_percent_mean"], 1)
    cells["fedara minus this"] = rounded(frame["difference_points"], 1)
    cells["pairs"] = rounded(frame["num_pairs"], 0)
    cells["p (Holm)"] = rounded(frame["p_holm"], 3)
    num_tests = int(frame["p_holm"].notna().sum())
    tests = (
        f"p: two-sided sign-flip test over paired seeds, Holm-corrected over {num_tests} tests; n "
        "pairs can not give less than 2^(1 - n) before the correction."
        if num_tests
        else f"No test: it takes at least {stats.MIN_PAIRS} seeds that fedara and a method share."
    )
    notes = [
        "Accuracy of the last evaluated round, mean over n runs; pairs: seeds that fedara shares.",
        f"Last {LATE} evaluations: the mean of each run's, which may be on fewer examples (see the "
        "figures' conditions).",
        "Own labels: the mean over clients of the accuracy on test examples of each client's own "
        "label mix, with its own model where the method has one for each client.",
        *(stats.SENTENCE, tests, "accuracy.csv names the runs behind each row."),
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
    if len(pairs) < stats.MIN_PAIRS:
        return {"num_pairs": len(pairs)}
    return {
        "num_pairs": len(pairs),
        "paired_run_ids": joined(pd.concat([pairs["run_id"], pairs["run_id_other"]])),
        "difference_points": float(differences.mean()),
        "p_value": stats.paired_p_value(differences),
    }
