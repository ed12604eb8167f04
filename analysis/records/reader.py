"""The one reader of records: run.json, lines of rounds.jsonl and rows.jsonl, and DONE.

It says what is wrong with a record: a file is missing or damaged, or DONE and the rounds disagree.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any, Generic, TypeVar

from analysis.records.names import printable, shown
from fedara_core import shapes, strict_json
from fedara_core.errors import InputError
from fedara_core.schema import (
    DONE_FILE,
    PARTITION_FILE,
    ROUNDS_FILE,
    ROWS_FILE,
    RUN_FILE,
    SCHEMA_VERSION,
    rounds_fault,
)

NO_DONE = "no DONE"
_FILES = (RUN_FILE, ROUNDS_FILE, ROWS_FILE, DONE_FILE)
_BENCHMARKS = ("collectives", "scaling", "roundtrip", "overhead", "step", "prepare")
_LAUNCHES = tuple(f"micro-{name}-" for name in _BENCHMARKS)

Read = TypeVar("Read")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The files of a finished run. run: run.json. partition: empty without partition.json."""

    run: dict[str, Any]
    rounds: list[dict[str, Any]]
    partition: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class LaunchRecord:
    """The files of a finished launch of a micro-benchmark."""

    run: dict[str, Any]
    rows: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Finished(Generic[Read]):
    """What was read of the finished records, and what was left out.

    incomplete: names of the folders without DONE. damaged: of those with DONE that are no finished
    record all the same, each with the reason, such as "NAME/rounds.jsonl: 33 rounds; ...".
    """

    records: list[Read]
    incomplete: list[str]
    damaged: list[str]


def run_folders(path: Path) -> list[Path]:
    """Folders of runs at any depth below `path`, finished or not."""
    return [folder for folder in _record_folders(path) if not _is_launch(folder)]


def launch_folders(path: Path, benchmark: str) -> list[Path]:
    """Folders of a micro-benchmark's launches at any depth below `path`, finished or not."""
    prefix = f"{benchmark}-"
    found = [folder for folder in _record_folders(path) if _is_launch(folder)]
    return [folder for folder in found if _name(folder).startswith(prefix)]


def problem(folder: Path) -> str:
    """Why a folder holds no finished run: "no DONE", or what is damaged; "" if it holds one."""
    if not (folder / DONE_FILE).exists():
        return NO_DONE
    try:
        read_record(folder)
    except InputError as error:
        return str(error)
    return ""


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a whole run: DONE is written last, and every round must be there."""
    return not problem(folder)


def read_finished(
    folders: Iterable[Path], read: Callable[[Path], Read], run_id: Callable[[Read], str]
) -> Finished[Read]:
    """Read the folders with DONE; a damaged one is named and left out.

    read: raises InputError for a damaged record. Raises InputError for a run_id that two folders
    have.
    """
    records: list[Read] = []
    incomplete, damaged = [], []
    found_in: dict[str, Path] = {}
    for folder in folders:
        if not (folder / DONE_FILE).exists():
            incomplete.append(_name(folder))
            continue
        try:
            record = read(folder)
        except InputError as error:
            damaged.append(printable(str(error).removeprefix(f"{folder.parent}/")))
            continue
        if other := found_in.get(run_id(record)):
            raise InputError(f"{run_id(record)} comes twice: {other} and {folder}")
        records.append(record)
        found_in[run_id(record)] = folder
    return Finished(records=records, incomplete=incomplete, damaged=damaged)


def read_record(folder: Path) -> RunRecord:
    """A finished run. Raises InputError, which names file and line."""
    run = read_run(folder)
    place = str(folder / RUN_FILE)
    shapes.require_keys(run, shapes.REQUIRED_IN_RUN, place)
    shapes.require_shape(run, shapes.RUN, place)
    rounds = _read_rows(folder / ROUNDS_FILE, shapes.ROUND, shapes.REQUIRED_IN_ROUND)
    num_rounds = run["config"]["federation"]["num_rounds"]
    # Cumulative bytes are wrong when a round is lost or written twice.
    if fault := rounds_fault([row["round_index"] for row in rounds], num_rounds):
        raise InputError(f"{folder}/{fault}; {DONE_FILE} says that it is whole")
    return RunRecord(run=run, rounds=rounds, partition=_read_partition(folder / PARTITION_FILE))


def read_launch(folder: Path, benchmark: str, required: Iterable[str]) -> LaunchRecord:
    """A finished launch; required: keys of every row. Raises InputError."""
    run = read_run(folder)
    place = str(folder / RUN_FILE)
    shapes.require_keys(run, shapes.REQUIRED_IN_LAUNCH, place)
    shapes.require_shape(run, shapes.LAUNCH, place)
    if run["benchmark"] != benchmark:
        raise InputError(f"{place}: benchmark = {run['benchmark']!r}; allowed: {benchmark}")
    return LaunchRecord(run=run, rows=_read_rows(folder / ROWS_FILE, shapes.ROW, list(required)))


def read_run(folder: Path) -> dict[str, Any]:
    """A record's run.json, of a run or a launch. Raises InputError."""
    file = folder / RUN_FILE
    run = _object(_text(file), file)
    version = run.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(f"{file}: schema_version {version}, this code reads {SCHEMA_VERSION}")
    return run


def _record_folders(path: Path) -> list[Path]:
    try:
        is_folder = path.is_dir()
    except OSError as error:  # a name that is too long
        raise InputError(f"{path}: {error.strerror}; allowed: a folder with records") from None
    if not is_folder:
        raise InputError(f"{path}: no such folder; allowed: a folder with records")
    return sorted({file.parent for name in _FILES for file in path.rglob(name)})


def _is_launch(folder: Path) -> bool:
    """Whether a folder is a micro-benchmark's, which has rows and no rounds."""
    if (folder / ROWS_FILE).exists():
        return True
    return _name(folder).startswith(_LAUNCHES) and not (folder / ROUNDS_FILE).exists()


def _name(folder: Path) -> str:
    return printable(folder.name or folder.resolve().name)


def _read_rows(
    file: Path, shape: dict[str, shapes.Shape], required: list[str]
) -> list[dict[str, Any]]:
    rows = []
    lines = _text(file).split("\n")
    for number, line in enumerate(lines if lines[-1] else lines[:-1], start=1):
        row = _object(line, file, number)
        place = f"{file}:{number}"
        shapes.require_keys(row, required, place)
        shapes.require_shape(row, shape, place)
        rows.append(row)
    return rows


def _read_partition(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    clients = _json(_text(file), file)
    shapes.require_shape(clients, shapes.PARTITION, str(file), "content")
    for index, client in enumerate(clients):
        shapes.require_keys(client, ["client_id"], f"{file}: entry {index}")
    if len({client["client_id"] for client in clients}) < len(clients):
        raise InputError(f"{file}: a client_id comes twice; allowed: one entry a client")
    found: list[dict[str, Any]] = clients
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; allowed: a whole record") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from None


def _json(text: str, file: Path, first_line: int = 1) -> Any:
    """The value of a JSON text, its names fit to be shown."""
    try:
        return _shown(strict_json.loads(text))
    except JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(f"{file}:{line}: not valid JSON: {error.msg}") from None
    except ValueError as error:
        raise InputError(f"{file}:{first_line}: not valid JSON: {error}") from None


def _shown(value: Any) -> Any:
    """The value with texts that can be shown, and numbers that can be added up."""
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, dict):
        return {shown(key): _shown(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_shown(part) for part in value]
    if isinstance(value, int | float) and abs(value) > shapes.LARGEST:
        raise ValueError(f"a number beyond {float(shapes.LARGEST):g}; allowed: smaller ones")
    return value


def _object(text: str, file: Path, first_line: int = 1) -> dict[str, Any]:
    value = _json(text, file, first_line)
    if not isinstance(value, dict):
        raise InputError(f"{file}:{first_line}: a JSON object was expected")
    return value
