"""`fedara reproduce`: run a record's config again and compare what comes out with the record."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from analysis import stats as spread
from analysis.records.campaign import SERIES, AnalysisError, load_campaign
from analysis.records.per_run import ends
from bench.jobs.plan import load_points
from bench.run.job import load_texts
from bench.run.record import Recorder
from bench.run.runner import run_all
from fedara_core.comm.base import Communicator
from fedara_core.comm.launch import together
from fedara_core.errors import InputError

_MACHINE = ("cpu", "gpu", "python", "package_versions")  # of run.json: what bits may depend on


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came out, in lines, and whether that is the record's result."""

    lines: Sequence[str]
    reproduced: bool


@dataclass(frozen=True, kw_only=True)
class SeedInterval:
    """The 95 % interval of the mean accuracy over a record's seeds, in percent."""

    low: float
    high: float
    num_seeds: int


def reproduce(
    run_dir: Path, results: Path, overrides: list[str], within_points: float, job: Communicator
) -> bool:
    """Run the config of a finished record again, below `results`, and say how it compares.

    True if every round has the record's bits, or the last accuracy is within so many points of the
    record's, or inside the interval over its seeds. InputError if there is no finished record or
    the data are others.
    """
    record = run_dir / "run.json"

    def check() -> SeedInterval | None:
        if not (run_dir / "DONE").exists():
            raise InputError(f"{run_dir}: no finished record (run.json and DONE)")
        (config,), (own,) = load_points(record, overrides), load_points(record, [])
        if config.result_settings() != own.result_settings():
            raise InputError(
                f"--set {' '.join(overrides)}: another run than the record's; allowed: what "
                "changes no result, such as dataset.name=file:DIR for where its data lie"
            )
        wanted, found = _read(run_dir)["dataset_digest"], load_texts(config.dataset).digest
        if wanted != found:
            raise InputError(
                f"dataset.name = {config.dataset.name!r} has digest {found}; allowed: the record's "
                f"data, {wanted}"
            )
        if Recorder(results, config).run_dir.resolve() == run_dir.resolve():
            raise InputError(f"--results {results}: the record's own folder; allowed: another one")
        return seed_interval(run_dir)

    interval = together(job, check)
    run_all(record, results, overrides, job)
    (config,) = load_points(record, overrides)
    verdict = compare(run_dir, Recorder(results, config).run_dir, within_points, interval)
    console = Console(quiet=job.world_rank != 0, highlight=False, markup=False)
    for line in verdict.lines:
        console.print(line, soft_wrap=True)
    return verdict.reproduced


def seed_interval(run_dir: Path) -> SeedInterval | None:
    """Of the finished runs beside this one that differ from it in the seed alone, and itself.

    None if there is no other. Raises InputError where a record in that folder can not be read.
    """
    try:
        runs = ends(load_campaign(run_dir.resolve().parent)).set_index("run_id")
    except AnalysisError as error:
        raise InputError(str(error)) from None
    own = runs.loc[_read(run_dir)["run_id"], SERIES]
    accuracies = runs[(runs[SERIES] == own).all(axis=1)]["accuracy_percent"]
    if len(accuracies) < 2:
        return None
    low, high = spread.interval(accuracies)
    return SeedInterval(low=low, high=high, num_seeds=len(accuracies))


def compare(
    record: Path, again: Path, within_points: float, interval: SeedInterval | None
) -> Verdict:
    """Two finished runs of one config: their bits round by round, and their last accuracy."""
    theirs, ours = _rounds(record), _rounds(again)
    pairs = list(zip(theirs, ours, strict=True))
    same = [one["state_digest"] == other["state_digest"] for one, other in pairs]
    if all(same):
        return Verdict(lines=[f"same bits as {record} in all {len(same)} rounds"], reproduced=True)
    lines = [f"other bits than {record} from round {same.index(False) + 1} of {len(same)} on"]
    lines += _unlike(_read(record), _read(again))
    old, new = (100 * rows[-1]["accuracy"] for rows in (theirs, ours))
    reproduced = abs(new - old) <= within_points
    lines.append(
        f"last accuracy {new:.2f} %, the record's {old:.2f} %: {new - old:+.2f} points, "
        f"{'within' if reproduced else 'outside'} the {within_points:g} that are allowed"
    )
    if interval:
        inside = interval.low <= new <= interval.high
        reproduced = reproduced or inside
        lines.append(
            f"{'inside' if inside else 'outside'} the 95 % interval of the record's "
            f"{interval.num_seeds} seeds, {interval.low:.2f} to {interval.high:.2f} %"
        )
    return Verdict(lines=lines, reproduced=reproduced)


def _unlike(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """What bits may depend on and is not as it was."""
    found = []
    for key in _MACHINE:
        old, new = theirs.get(key), ours.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            parts = [
                f"{k} {old[k]} then, {new[k]} now" for k in old if new.get(k, old[k]) != old[k]
            ]
            found += parts
        elif old != new:
            found.append(f"{key} {old} then, {new} now")
    return found


def _read(run_dir: Path) -> dict[str, Any]:
    run: dict[str, Any] = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    return run


def _rounds(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
