"""The one reader of records: run.json, lines of rounds.jsonl and rows.jsonl, and DONE."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedara_core.errors import InputError
from fedara_core.schema import DONE_FILE, ROUNDS_FILE, ROWS_FILE, RUN_FILE, SCHEMA_VERSION


def run_folders(path: Path) -> list[Path]:
    """Folders of runs at any depth below `path`, finished or not."""
    found = {file.parent for name in (RUN_FILE, ROUNDS_FILE) for file in path.rglob(name)}
    # A folder with rows.jsonl is a micro-benchmark's, which has no rounds.
    return sorted(folder for folder in found if not (folder / ROWS_FILE).exists())


def launch_folders(path: Path, benchmark: str) -> list[Path]:
    """Folders of a micro-benchmark's launches at any depth below `path`, finished or not."""
    return sorted({file.parent for file in path.rglob(f"{benchmark}-*/{ROWS_FILE}")})


def is_finished(folder: Path) -> bool:
    """Whether a record is complete: DONE is written last."""
    return (folder / DONE_FILE).exists()


def read_finished(folders: Iterable[Path]) -> tuple[dict[Path, dict[str, Any]], list[str]]:
    """The run.json of each finished record, by folder, and the names of the other folders.

    Raises InputError for a damaged file, and for a run_id that two folders have.
    """
    runs: dict[Path, dict[str, Any]] = {}
    found_in: dict[str, Path] = {}
    incomplete = []
    for folder in folders:
        if not is_finished(folder):
            incomplete.append(folder.name)
            continue
        run = read_run(folder)
        if other := found_in.get(run["run_id"]):
            raise InputError(f"{run['run_id']} comes twice: {other} and {folder}")
        runs[folder], found_in[run["run_id"]] = run, folder
    return runs, incomplete


def read_run(folder: Path) -> dict[str, Any]:
    """A record's run.json. Raises InputError."""
    file = folder / RUN_FILE
    run = _object(_text(file), file)
    version = run.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(f"{file}: schema_version {version}, this code reads {SCHEMA_VERSION}")
    require_keys(run, ["run_id"], str(file))
    return run


def read_rows(file: Path, required: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The lines of rounds.jsonl or rows.jsonl. Raises InputError, which names the line."""
    rows = []
    for number, line in enumerate(_text(file).splitlines(), start=1):
        row = _object(line, file, number)
        require_keys(row, required, f"{file}:{number}")
        rows.append(row)
    return rows


def read_list(file: Path) -> list[dict[str, Any]]:
    """The JSON list in a file; empty if there is no such file. Raises InputError."""
    if not file.exists():
        return []
    entries = _json(_text(file), file)
    if not isinstance(entries, list):
        raise InputError(f"{file}: a JSON list was expected")
    return entries


def require_keys(row: dict[str, Any], keys: Iterable[str], place: str) -> None:
    """Raises InputError unless all keys are there."""
    if missing := [key for key in keys if key not in row]:
        raise InputError(f"{place}: missing {', '.join(missing)}")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from None


def _json(text: str, file: Path, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(f"{file}:{line}: not valid JSON: {error.msg}") from None


def _object(text: str, file: Path, first_line: int = 1) -> dict[str, Any]:
    value = _json(text, file, first_line)
    if not isinstance(value, dict):
        raise InputError(f"{file}:{first_line}: a JSON object was expected")
    return value
