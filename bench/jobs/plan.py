"""The frozen plan of a sweep: a file with one line per run; each job runs one line."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.config.load import load_record, load_runs, parse_run
from bench.config.schema import RunConfig
from bench.jobs.status import log_file
from bench.run.checkpoint import write_atomically
from bench.run.finished import check_finished
from bench.run.record import Recorder
from fedara_core import strict_json
from fedara_core.errors import InputError

_SUFFIX = ".jsonl"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A sweep's runs. Its name holds a digest of its text: a changed sweep is a new file."""

    name: str
    results: Path
    text: str
    runs: tuple[RunConfig, ...]

    @property
    def path(self) -> Path:
        return self.results / f"{self.name}{_SUFFIX}"

    def log(self, index: int) -> Path:
        """The log of the run on line `index`."""
        return log_file(self.results, self.name, index)

    def left(self) -> list[int]:
        """Lines whose run is not finished, counted from 0. Raises InputError for a finished one
        that `check_finished` refuses."""
        recorders = [Recorder(self.results, run) for run in self.runs]
        for recorder, run in zip(recorders, self.runs, strict=True):
            if recorder.done:
                check_finished(recorder.run_dir, run)
        return [index for index, recorder in enumerate(recorders) if not recorder.done]

    def write(self, scripts: Mapping[Path, str] | None = None) -> None:
        """Write the plan file and these scripts, and make the folder of the logs. Raises
        InputError."""
        try:
            (self.results / "logs").mkdir(parents=True, exist_ok=True)
            if not self.path.exists():  # jobs may be reading it; its name fixes its text
                write_atomically(self.path, self.text.encode())
            for path, text in (scripts or {}).items():
                write_atomically(path, text.encode(errors="surrogateescape"))
        except OSError as error:
            raise InputError(
                f"--results {self.results}: {error.strerror}; allowed: a folder that can be "
                "written to"
            ) from None


def make_plan(config: Path, results: Path | None, overrides: list[str]) -> Plan:
    """Expand a config's sweep, without writing it. results: by default results/<config's name>."""
    runs = tuple(load_runs(config, overrides))
    lines = [{"run_id": run.run_id, "config": run.model_dump(mode="json")} for run in runs]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return Plan(
        name=f"plan-{config.stem}-{digest}",
        results=results or Path("results") / config.stem,
        text=text,
        runs=runs,
    )


def load_points(path: Path, overrides: list[str], index: int | None = None) -> list[RunConfig]:
    """The runs of a config, of a plan file, or of a record's run.json; with `index` only that one.
    Raises InputError."""
    if path.name == "run.json":
        runs = [load_record(path, overrides)]
    elif path.suffix != _SUFFIX:
        runs = load_runs(path, overrides)
    elif overrides:
        raise InputError(f"--set {overrides[0]!r}: {path} is a frozen plan; allowed: its config")
    else:
        runs = _read(path)
    if index is None:
        return runs
    if not 0 <= index < len(runs):
        raise InputError(f"--index {index}: {path} has {len(runs)} runs; allowed: 0 and up")
    return [runs[index]]


def describe(plan: Plan) -> Iterator[str]:
    """The lines of --dry-run: what each run will do and send (the first round's bytes, and those
    of the second for every other one), and the total of what is left. Raises InputError."""
    from bench.tools.estimate import run_bytes

    left = set(plan.left())
    total, known = [0, 0], True
    for index, run in enumerate(plan.runs):
        num_rounds, sent = run.federation.num_rounds, run_bytes(run)
        text = f"{index:>4}  {run.run_id:<44} {num_rounds} rounds x {run.num_drawn} clients, "
        if sent is None:
            known = False
            text += "bytes unknown"
        else:
            up, down = sent
            text += f"up {_size(up)}, down {_size(down)}"
            if index in left:
                total = [total[0] + up, total[1] + down]
        yield text + ("" if index in left else ", done")
    runs = [plan.runs[index] for index in sorted(left)]
    yield (
        f"{len(plan.runs)} runs, {len(plan.runs) - len(left)} of them done; left: "
        f"{sum(run.federation.num_rounds for run in runs)} rounds, "
        f"{sum(run.federation.num_rounds * run.num_drawn for run in runs)} times a client trains, "
        f"up {_size(total[0])}, down {_size(total[1])}"
    )
    yield "bytes: later rounds as the second one; methods that prune send less"
    if not known:
        yield "unknown where model or data are not on this machine"


def _size(num_bytes: int) -> str:
    for unit, length in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= length:
            return f"{num_bytes / length:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"


def _read(path: Path) -> list[RunConfig]:
    try:
        text = path.read_text(encoding="utf-8")
        lines = [strict_json.loads(line) for line in text.splitlines()]
        return [_parse(path, number, line) for number, line in enumerate(lines)]
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        reason = f"is damaged ({error})"
    raise InputError(f"plan {path} {reason}; allowed: a file that fedara sweep or submit wrote")


def _parse(path: Path, number: int, line: dict[str, Any]) -> RunConfig:
    run = parse_run(line["config"])
    if run.run_id != line["run_id"]:  # a default has changed since, or a method
        raise InputError(
            f"plan {path}, line {number}: {line['run_id']} is {run.run_id} in this version of the "
            "suite; allowed: a plan of this version (fedara sweep writes one)"
        )
    return run
