"""`fedara reproduce`: run a record's config again and compare what comes out with the record."""

from pathlib import Path

from analysis import stats
from analysis.compare import changes
from analysis.records import reader
from analysis.records.campaign import SERIES, Campaign, load_campaign
from analysis.records.per_run import per_run
from bench.jobs.plan import load_points
from bench.output import console
from bench.run.finished import check_finished
from bench.run.record import Recorder
from bench.run.runner import run_all
from fedara_core.comm.base import Communicator
from fedara_core.comm.launch import together
from fedara_core.errors import InputError
from fedara_core.schema import RUN_FILE


def reproduce(
    run_dir: Path, results: Path, overrides: list[str], within_points: float, job: Communicator
) -> bool:
    """Run the config of a finished record again, below `results`, and say how it compares.

    True if every round has the record's bits, or if the last accuracy is within so many points of
    the record's, or inside the interval over its seeds. Raises InputError if there is no finished
    record, or if the data are others.
    """
    record = run_dir / RUN_FILE

    def check() -> Campaign:
        if reason := reader.problem(run_dir):
            reason = reason.removeprefix(f"{run_dir}/")
            raise InputError(f"{run_dir} is no finished record, which is what is allowed: {reason}")
        (config,), (own,) = load_points(record, overrides), load_points(record, [])
        if config.result_settings() != own.result_settings():
            raise InputError(
                f"--set {' '.join(overrides)}: another run than the record's; allowed: what "
                "changes no result, such as dataset.name=file:DIR for where its data lie"
            )
        if unknown := check_finished(run_dir, config):
            raise InputError(f"{run_dir}: {unknown}")
        if Recorder(results, config).run_dir.resolve() == run_dir.resolve():
            raise InputError(f"--results {results}: the record's own folder; allowed: another one")
        return load_campaign(run_dir.resolve().parent)

    beside = together(job, check)
    run_all(record, results, overrides, job)
    (config,) = load_points(record, overrides)
    lines, reproduced = compare(run_dir, Recorder(results, config).run_dir, within_points, beside)
    shown = console(quiet=job.world_rank != 0)
    for line in lines:
        shown.print(line, soft_wrap=True)
    return reproduced


def compare(
    record: Path, again: Path, within_points: float, beside: Campaign
) -> tuple[list[str], bool]:
    """What to say of bits and accuracy of two finished runs of one config, and whether they agree.
    beside: the runs in the record's folder; those of other seeds alone give an interval."""
    theirs, ours = load_campaign(record), load_campaign(again)
    same = (theirs.rounds["state_digest"] == ours.rounds["state_digest"]).tolist()
    if all(same):
        return [f"same bits as {record} in all {len(same)} rounds"], True
    lines = [f"other bits than {record} from round {same.index(False) + 1} of {len(same)} on"]
    lines += [f"changed: {text}" for text in changes(theirs, ours)]
    old, new = (float(per_run(one)["accuracy_percent"].iloc[0]) for one in (theirs, ours))
    reproduced = abs(new - old) <= within_points
    lines.append(
        f"last accuracy {new:.2f} %, the record's {old:.2f} %: {new - old:+.2f} points, "
        f"{'within' if reproduced else 'outside'} the {within_points:g} that are allowed"
    )
    runs = per_run(beside).set_index("run_id")
    series = runs.loc[theirs.runs["run_id"].iloc[0], SERIES]
    seeds = runs.loc[(runs[SERIES] == series).all(axis=1), "accuracy_percent"]
    if len(seeds) > 1:
        low, high = stats.interval(seeds)
        inside = low <= new <= high
        reproduced = reproduced or inside
        lines.append(
            f"{'inside' if inside else 'outside'} the 95 % interval of the record's "
            f"{len(seeds)} seeds, {low:.2f} to {high:.2f} %"
        )
    return lines, reproduced
