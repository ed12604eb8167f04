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
    step_levers,
    style,
    target,
    target_modelled,
)
from analysis.output import together
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
    prepare,
    roundtrip,
    step,
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
_MOST_NAMED = 5  # in a refusal, which is one line


@dataclass(frozen=True, kw_only=True)
class Records:
    """The finished records below a folder, by kind; None where there is none of a kind."""

    campaign: Campaign | None = None
    collectives: Launches | None = None
    scaling: Launches | None = None
    roundtrip: Launches | None = None
    overhead: Launches | None = None
    step: Launches | None = None
    prepare: Launches | None = None

    @property
    def micro(self) -> list[Launches]:
        """Of every micro-benchmark that there is a record of."""
        kinds = (
            *(self.collectives, self.scaling, self.roundtrip, self.overhead),
            *(self.step, self.prepare),
        )
        return [kind for kind in kinds if kind is not None]

    @property
    def drawn(self) -> Campaign | None:
        """The campaign, if one of its runs is finished."""
        return None if self.campaign is None or self.campaign.runs.empty else self.campaign

    @property
    def incomplete(self) -> list[str]:
        """Names of the runs and launches without DONE."""
        return [name for kind in self._kinds for name in kind.incomplete]

    @property
    def damaged(self) -> list[str]:
        """Names of the runs and launches that are finished by DONE alone, each with the reason."""
        return [name for kind in self._kinds for name in kind.damaged]

    @property
    def num_finished(self) -> int:
        """Of runs and launches."""
        runs = 0 if self.campaign is None else len(self.campaign.runs)
        return runs + sum(len(kind.launches) for kind in self.micro)

    @property
    def _kinds(self) -> list[Campaign | Launches]:
        return [*([] if self.campaign is None else [self.campaign]), *self.micro]

    @property
    def launches(self) -> pd.DataFrame:
        """The finished launches of micro-benchmarks, one row each, with the columns LAUNCH."""
        kinds = [kind.launches for kind in self.micro if not kind.launches.empty]
        found = pd.concat(kinds or [pd.DataFrame(columns=LAUNCH)])
        return found[LAUNCH].sort_values("run_id", ignore_index=True)


def report(
    records: Records, out_dir: Path, costs: Mapping[str, Cost] | None = None
) -> tuple[list[Path], list[str]]:
    """Write all figures, captions, tables and the page to `out_dir`.

    costs: of the scaling model; if None they are fitted. Returns the files written, and for each
    figure and table that the records do not allow the reason.
    """
    tables: list[Table] = []
    gaps: list[str] = []
    with together(out_dir) as folder:
        files: list[Path] = []
        for name, make in _makers(records, folder, costs):
            try:
                made = make()
            except NotDrawn as reason:
                gaps.append(f"{name}: {reason}")
                continue
            if isinstance(made, Table):
                tables.append(made)
                made = write(made, folder)
            files += made
        page_file = page.write(
            records.drawn,
            records.launches,
            folder,
            files=files,
            tables=tables,
            gaps=gaps,
            left_out=[
                *(f"{name}: incomplete, no DONE" for name in records.incomplete),
                *(f"damaged: {name}" for name in records.damaged),
            ],
        )
    return [out_dir / file.name for file in (*files, page_file)], gaps


def _makers(
    records: Records, out_dir: Path, costs: Mapping[str, Cost] | None
) -> Iterator[tuple[str, Callable[[], list[Path] | Table]]]:
    """What writes each figure or makes each table, with its name."""
    if campaign := records.drawn:
        for figure in _FIGURES:
            yield figure.NAME, partial(figure.draw, campaign, out_dir)
        for table in _TABLES:
            yield table.NAME, partial(_warned, table.table, campaign)
        yield summary.NAME, partial(summary.write, campaign, out_dir)
    if launches := _any(records.collectives):
        yield collectives_density.NAME, partial(collectives_density.draw, launches, out_dir)
        yield collectives_scaling.NAME, partial(collectives_scaling.draw, launches, out_dir, costs)
        yield allgather.NAME, partial(allgather.table, launches)
    if launches := _any(records.scaling):
        yield scaling.NAME, partial(scaling.draw, launches, out_dir)
        yield efficiency.NAME, partial(efficiency.table, launches)
    if launches := _any(records.roundtrip):
        yield roundtrip.NAME, partial(roundtrip.table, launches)
    if launches := _any(records.overhead):
        yield overhead.NAME, partial(overhead.table, launches)
    if launches := _any(records.step):
        yield step_levers.NAME, partial(step_levers.draw, launches, out_dir)
        yield step.NAME, partial(step.table, launches)
    if launches := _any(records.prepare):
        yield prepare.NAME, partial(prepare.table, launches)


def _any(launches: Launches | None) -> Launches | None:
    """The launches, if one of them is finished."""
    return None if launches is None or launches.launches.empty else launches


def _warned(make: Callable[[Campaign], Table], campaign: Campaign) -> Table:
    """A table with the campaign's warnings below it."""
    table = make(campaign)
    return replace(table, notes=[*table.notes, *caveats.warnings(campaign)])


def report_all(directory: Path, out_dir: Path, costs: Path | None) -> list[str]:
    """Report every kind of record below a folder; returns what to print. Raises InputError."""
    records = _load(directory)
    with style.missing_letters() as boxes:
        files, gaps = report(records, out_dir, None if costs is None else read_costs(costs))
    lines: list[str] = []
    if boxes:
        lines.append(f"warning: the figures' font lacks these letters: {''.join(boxes)}")
    if campaign := records.drawn:
        lines += [f"warning: {text}" for text in caveats.sentences(campaign)]
        summary.show(campaign)
    lines += [f"left out, no DONE: {name}" for name in records.incomplete]
    lines += [f"left out, damaged: {name}" for name in records.damaged]
    lines += [f"not drawn, {gap}" for gap in gaps]
    return [*lines, *(f"wrote {file}" for file in files)]


def _load(directory: Path) -> Records:
    """All records below a folder. Raises InputError where none is finished."""
    records = Records(
        collectives=load_collectives(directory),
        scaling=load_scaling(directory),
        roundtrip=load_launches(directory, roundtrip.BENCHMARK, roundtrip.REQUIRED),
        overhead=load_launches(directory, overhead.BENCHMARK, overhead.REQUIRED),
        step=load_launches(directory, step.BENCHMARK, step.REQUIRED),
        prepare=load_launches(directory, prepare.BENCHMARK, prepare.REQUIRED),
    )
    # Without any record this says so.
    if not records.micro or reader.run_folders(directory):
        records = replace(records, campaign=load_campaign(directory))
    _require_finished(directory, records)
    return records


def report_changes(a_dir: Path, b_dir: Path, out_dir: Path) -> list[str]:
    """Write compare.md, .csv and .tex to `out_dir`; returns what to print.

    There is no file where the campaigns have nothing in common. Raises InputError.
    """
    a, b = _load_finished(a_dir), _load_finished(b_dir)
    changes = compare.data(a, b)
    lines = compare.summary(a, b, changes, (str(a_dir), str(b_dir)))
    if changes.empty:
        return lines
    with together(out_dir) as folder:
        files = write(compare.table(changes, lines), folder)
    found = compare.differing(changes) or ["Nothing differs by more than noise."]
    return [*lines, *found, *(f"wrote {out_dir / file.name}" for file in files)]


def _load_finished(directory: Path) -> Campaign:
    campaign = load_campaign(directory)
    _require_finished(directory, Records(campaign=campaign))
    return campaign


def _require_finished(directory: Path, records: Records) -> None:
    if records.num_finished > 0:
        return
    reasons = {"incomplete": records.incomplete, "damaged": records.damaged}
    texts = [f"{kind}: {_listed(names)}" for kind, names in reasons.items() if names]
    raise InputError(f"{directory}: no finished run; {'; '.join(texts)}")


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
