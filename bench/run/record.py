"""A run's record: run.json, rounds.jsonl, partition.json and, last, DONE; by world_rank 0."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.config.schema import RunConfig
from bench.metering.codecarbon import add_parts
from bench.run.checkpoint import write_atomically
from bench.run.provenance import utc_now
from fedara_core import shapes, strict_json
from fedara_core.errors import InputError
from fedara_core.schema import DONE_FILE, PARTITION_FILE, ROUNDS_FILE, RUN_FILE

_PART_KEYS = (
    *("start_time", "git_commit", "git_dirty", "package_versions"),
    *("comm", "world_size", "processes", "prepare_seconds", "slurm"),
)


class Recorder:
    """Writes one run's files. A directory without DONE is an incomplete run."""

    def __init__(self, results: Path, config: RunConfig) -> None:
        self.run_dir = results / config.run_id

    @property
    def done(self) -> bool:
        return (self.run_dir / DONE_FILE).exists()

    def rounds(self) -> list[dict[str, Any]]:
        """The rounds recorded so far, without a last line that was cut off. Raises InputError."""
        return read_rounds(self.run_dir)

    def start(
        self,
        run: Mapping[str, Any],
        partition: list[dict[str, Any]],
        earlier_rounds: list[dict[str, Any]],
    ) -> None:
        """Write run.json, partition.json, and rounds.jsonl with the rounds of earlier parts. A
        resumed run keeps the run.json of its first part and lists later ones in `parts`."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if earlier_rounds:
            first = self.run()
            part = {key: run[key] for key in _PART_KEYS if key in run}
            part["first_round_index"] = len(earlier_rounds)
            run = {**first, "parts": [*first.get("parts", []), part]}
        write_json(self.run_dir / RUN_FILE, run)
        write_json(self.run_dir / PARTITION_FILE, partition)
        text = "".join(_line(row) for row in earlier_rounds)
        write_atomically(self.run_dir / ROUNDS_FILE, text.encode())

    def add_round(self, row: Mapping[str, Any]) -> None:
        """Append one round and flush it to disk."""
        append_row(self.run_dir / ROUNDS_FILE, row)

    def end_part(self, first_round_index: int, energy: Mapping[str, Any]) -> None:
        """Record the energy of a part of the run, if it is known."""
        if not energy:
            return
        run = self.run()
        part = {"first_round_index": first_round_index, **energy}
        write_json(
            self.run_dir / RUN_FILE, {**run, "energy_parts": [*run.get("energy_parts", []), part]}
        )

    def finish(self, facts: Mapping[str, Any] | None = None) -> None:
        """Complete run.json, then write DONE. The checkpoint stays: it holds the trained model.
        facts: more keys, energy_missing among them if the last part's energy is not known."""
        total_seconds = sum(row["seconds"]["total"] for row in self.rounds())
        run = self.run()
        parts = run.get("energy_parts", [])
        energy = add_parts(parts) if len(parts) == 1 + len(run.get("parts", [])) else {}
        energy = energy or {"energy_missing": "not known of every part of the run"}
        end = {"end_time": utc_now(), "total_seconds": total_seconds, **energy, **(facts or {})}
        write_json(self.run_dir / RUN_FILE, {**run, **end})
        write_atomically(self.run_dir / DONE_FILE, b"")

    def run(self) -> dict[str, Any]:
        """What run.json says so far. Raises InputError."""
        return read_run(self.run_dir)


def read_run(run_dir: Path) -> dict[str, Any]:
    """A run's run.json. Raises InputError."""
    path = run_dir / RUN_FILE
    return _parsed(_read(path), str(path), shapes.RUN, ["config"])


def read_rounds(run_dir: Path) -> list[dict[str, Any]]:
    """A run's rounds so far, without a last line that was cut off. Raises InputError."""
    path = run_dir / ROUNDS_FILE
    if not path.exists():
        return []
    whole, _, _ = _read(path).rpartition("\n")  # a whole line ends with a newline
    lines = whole.split("\n") if whole else []
    return [
        _parsed(line, f"{path}:{n}", shapes.ROUND, ["round_index", "seconds.total"])
        for n, line in enumerate(lines, 1)
    ]


def write_json(path: Path, content: Any) -> None:
    """Replace the file by `content` as indented JSON."""
    text = json.dumps(content, indent=2, ensure_ascii=True, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON object as a line and flush it to disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(row))
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(str(path), str(getattr(error, "strerror", None) or error)) from None


def _parsed(text: str, place: str, shape: shapes.Shape, keys: list[str]) -> dict[str, Any]:
    """A JSON object of this shape with these keys. Raises InputError, which names the place."""
    try:
        found = strict_json.loads(text)
    except ValueError as error:
        raise _damaged(place, f"not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise _damaged(place, "no JSON object")
    shapes.require_keys(found, keys, place)
    shapes.require_shape(found, shape, place)
    return found


def _damaged(place: str, problem: str) -> InputError:
    return InputError(
        f"{place}: {problem}; allowed: the file as the run wrote it, or none (delete the folder to "
        "start over)"
    )


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=True, allow_nan=False) + "\n"
