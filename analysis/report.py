"""Every figure, table and the page of the records below a folder."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd

from analysis import compare
from analysis.cost_model import Cost, read_costs
from analysis.figures import (
    accuracy_bytes,
    accuracy_rounds,
    alpha,
    client_spread,
    collectives_density,
    collectives_scaling,
    live_triplets,
    local_train,
    pareto,
    partition,
    phases,
    scaling,
    target,
    target_modelled,
)
from analysis.page import page
from analysis.records import caveats, reader
from analysis.records.campaign import Campaign, NotDrawn, load_campaign
from analysis.records.collectives import load_collectives
from analysis.records.launches import LAUNCH, Launches, load_launches
from analysis.records.scaling import load_scaling
from analysis.tables import (
    accuracy,
    allgather,
    cost,
    efficiency,
    headline,
    modelled,
    overhead,
    roundtrip,
    summary,
)
from analysis.tables.render import Table, write
from fedara_core.errors import InputError

# In the order of a report.
_FIGURES = (
    *(accuracy_rounds, accuracy_bytes, pareto, target, target_modelled, alpha),
    *(live_triplets, local_train, phases, client_spread, partition),
)
_TABLES = (headline, accuracy, cost, modelled)


@dataclass(frozen=True, kw_only=True)
class Records:
    """The finished records below a folder, by kind; None where there is none of a kind."""

    campaign: Campaign | None = None
    collectives: Launches | None = None
    scaling: Launches | None = None
    roundtrip: Launches | None = None
    overhead: Launches | None = None

    @property
    def micro(self) -> list[Launches]:
        """Of every micro-benchmark that there is a record of."""
        kinds = (self.collectives, self.scaling, self.roundtrip, self.overhead)
        return [kind for kind in kinds if kind is not None]

    @property
    def incomplete(self) -> list[str]:
        """Names of the runs and launches without DONE."""
        runs = self.campaign.incomplete if self.campaign is not None else []
        return [*runs, *(run_id for kind in self.micro for run_id in kind.incomplete)]

    @property
    def launches(self) -> pd.DataFrame:
        """The finished launches of micro-benchmarks, one row each, with the columns LAUNCH."""
        kinds = [kind.launches for kind in self.micro]
        found = pd.concat(kinds or [pd.DataFrame(columns=LAUNCH)])
        return found[LAUNCH].sort_values("run_id", ignore_index=True)


def report(
    records: Records, out_dir: Path, costs: Mapping[str, Cost] | None = None
) -> tuple[list[Path], list[str]]:
    """Write all figures, captions, tables and the page to `out_dir`.

    costs: of the scaling model; if None they are fitted. Returns the files written, and for each
    figure and table that the records do not allow the reason.
    """
    files: list[Path] = []
    tables: list[Table] = []
    gaps: list[str] = []
    for name, make in _makers(records, out_dir, costs):
        try:
            made = make()
        except NotDrawn as reason:
            gaps.append(f"{name}: {reason}")
            continue
        if isinstance(made, Table):
            tables.append(made)
            made = write(made, out_dir)
        files += made
    page_file = page.write(
        records.campaign,
        records.launches,
        out_dir,
        files=files,
        tables=tables,
        gaps=[*gaps, *(f"incomplete, left out: {run_id}" for run_id in records.incomplete)],
    )
    return [*files, page_file], gaps


def _makers(
    records: Records, out_dir: Path, costs: Mapping[str, Cost] | None
) -> Iterator[tuple[str, Callable[[], list[Path] | Table]]]:
    """What writes each figure or makes each table, with its name."""
    if campaign := records.campaign:
        for figure in _FIGURES:
            yield figure.NAME, partial(figure.draw, campaign, out_dir)
        for table in _TABLES:
            yield table.NAME, partial(_warned, table.table, campaign)
        yield summary.NAME, partial(summary.write, campaign, out_dir)
    if launches := records.collectives:
        yield collectives_density.NAME, partial(collectives_density.draw, launches, out_dir)
        yield collectives_scaling.NAME, partial(collectives_scaling.draw, launches, out_dir, costs)
        yield allgather.NAME, partial(allgather.table, launches)
    if launches := records.scaling:
        yield scaling.NAME, partial(scaling.draw, launches, out_dir)
        yield efficiency.NAME, partial(efficiency.table, launches)
    if launches := records.roundtrip:
        yield roundtrip.NAME, partial(roundtrip.table, launches)
    if launches := records.overhead:
        yield overhead.NAME, partial(overhead.table, launches)


def _warned(make: Callable[[Campaign], Table], campaign: Campaign) -> Table:
    """A table with the campaign's warnings below it."""
    table = make(campaign)
    return replace(table, notes=[*table.notes, *caveats.warnings(campaign)])


def report_all(directory: Path, out_dir: Path, costs: Path | None) -> list[str]:
    """Report every kind of record below a folder; returns what to print. Raises InputError."""
    records = Records(
        collectives=load_collectives(directory),
        scaling=load_scaling(directory),
        roundtrip=load_launches(directory, roundtrip.BENCHMARK, roundtrip.REQUIRED),
        overhead=load_launches(directory, overhead.BENCHMARK, overhead.REQUIRED),
    )
    for launches in records.micro:
        _require_finished(directory, launches.launches, launches.incomplete)
    # Without any record this says so.
    rounds = not records.micro or reader.run_folders(directory)
    campaign = _load_finished(directory) if rounds else None
    records = replace(records, campaign=campaign)
    files, gaps = report(records, out_dir, None if costs is None else read_costs(costs))
    lines: list[str] = []
    if campaign is not None:
        lines += [f"warning: {text}" for text in caveats.sentences(campaign)]
        summary.show(campaign)
    lines += [f"left out, no DONE: {run_id}" for run_id in records.incomplete]
    lines += [f"not drawn, {gap}" for gap in gaps]
    return [*lines, *(f"wrote {file}" for file in files)]


def report_changes(a_dir: Path, b_dir: Path, out_dir: Path) -> list[str]:
    """Write compare.md, .csv and .tex to `out_dir`; returns what to print.

    There is no file where the campaigns have nothing in common. Raises InputError.
    """
    a, b = _load_finished(a_dir), _load_finished(b_dir)
    changes = compare.data(a, b)
    lines = compare.summary(a, b, changes, (str(a_dir), str(b_dir)))
    if changes.empty:
        return lines
    files = write(compare.table(changes, lines), out_dir)
    found = compare.differing(changes) or ["Nothing differs by more than noise."]
    return [*lines, *found, *(f"wrote {file}" for file in files)]


def _load_finished(directory: Path) -> Campaign:
    campaign = load_campaign(directory)
    _require_finished(directory, campaign.runs, campaign.incomplete)
    return campaign


def _require_finished(directory: Path, finished: pd.DataFrame, incomplete: list[str]) -> None:
    if finished.empty:
        raise InputError(f"{directory}: no finished run; incomplete: {', '.join(incomplete)}")
