"""Reads configs: TOML files, overrides, [sweep] tables and records into RunConfigs."""

import itertools
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from bench.config.schema import RunConfig
from fedara_core import strict_json
from fedara_core.errors import InputError

Table = dict[str, Any]


def load_runs(path: Path, overrides: list[str]) -> list[RunConfig]:
    """Read a TOML file, apply `section.key=value` overrides, and expand its [sweep] table.

    A [sweep] table holds `points` (a list of tables, each with the keys that differ) and any number
    of dotted config keys with a list of values; the runs are points x grid, in the order written.
    An override of a key that the sweep varies fixes it. Raises InputError.
    """
    table = read_toml(path, "config")
    points, grid = _sweep(table.pop("sweep", {}))
    fixed = [_parse_override(text) for text in overrides]
    for key, value in fixed:
        grid.pop(key, None)
        points = _matching(points, key, value)
    runs: dict[str, RunConfig] = {}
    for point, *values in itertools.product(points, *grid.values()):
        merged = _merge(table, point)
        run = parse_run(_override(merged, [*zip(grid, values, strict=True), *fixed]))
        first = runs.setdefault(run.run_id, run)
        if first.settings() != run.settings():
            raise InputError(
                f"sweep: two points differ only in {_unlike(first, run)}, which is no part of "
                "run_id; allowed: one of its values, and another --results for each further one"
            )
    return list(runs.values())


def load_record(path: Path, overrides: list[str]) -> RunConfig:
    """The config of a record's run.json, with overrides (a record does not say where data lie)."""
    try:
        table = strict_json.loads(path.read_text(encoding="utf-8-sig"))["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no record that can be read ({error!r})") from None
    return parse_run(_override(table, map(_parse_override, overrides)))


def parse_run(table: Table) -> RunConfig:
    """Validate one run's table. Raises InputError with one line: the key, its value, the rule."""
    try:
        return RunConfig.model_validate(table)
    except ValidationError as error:
        raise InputError(explain(error, RunConfig)) from None


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Pydantic's findings on a table of `model`, in one line."""
    return "; ".join(_explain(item, model) for item in error.errors())


def read_toml(path: Path, what: str, allowed: str = "a readable TOML file") -> Table:
    """The file's table. what: what the file is to be, for the message of the InputError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    except (ValueError, RecursionError) as error:  # of the second kind: 3000 brackets
        reason = f"is not valid TOML ({error})"
    raise InputError(f"{what} {path} {reason}; allowed: {allowed}")


def _sweep(sweep: Any) -> tuple[list[Table], dict[str, list[Any]]]:
    """The points and the grid of a [sweep] table."""
    if not isinstance(sweep, dict):
        raise InputError("sweep must be a table of lists: [sweep]")
    points = sweep.pop("points", [{}])
    if not isinstance(points, list) or not points or not all(isinstance(p, dict) for p in points):
        raise InputError(f"sweep.points must be a non-empty list of tables, not {points!r}")
    for key, values in sweep.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"sweep.{key} must be a non-empty list of values, not {values!r}")
    return points, sweep


def _matching(points: list[Table], key: str, value: Any) -> list[Table]:
    """The points that have key = value, all of them if none has: --set method.name=lora selects the
    sweep's lora, with the settings written beside it."""
    return [point for point in points if _lookup(point, key) == value] or points


def _lookup(table: Any, key: str) -> Any:
    for part in key.split("."):
        table = table.get(part) if isinstance(table, dict) else None
    return table


def _unlike(first: RunConfig, second: RunConfig) -> str:
    """The keys in which two configs of one run_id differ."""
    one, other = first.settings(), second.settings()
    keys = [
        f"{section}.{key}"
        for section in one.keys() - {"seed"}
        for key in one[section]
        if one[section][key] != other[section][key]
    ]
    return ", ".join(sorted(keys))


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {text!r} is not of the form section.key=value")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()  # a bare word is a string: --set method.name=lora
    except (ValueError, RecursionError) as error:  # 5000 digits; 3000 brackets
        raise InputError(f"--set {key.strip()}: {error}; allowed: a value of TOML") from None


def _override(table: Table, settings: Iterable[tuple[str, Any]]) -> Table:
    """The table with dotted keys replaced."""
    for key, value in settings:
        for part in reversed(key.split(".")):
            value = {part: value}
        table = _merge(table, value)
    return table


def _merge(base: Table, over: Table) -> Table:
    merged = dict(base)
    for one, other in (("local_steps", "local_epochs"), ("local_epochs", "local_steps")):
        if one in over and other not in over:
            merged.pop(other, None)  # they exclude each other: the later setting counts
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _explain(item: Any, model: type[BaseModel]) -> str:
    # Of a union pydantic names the member too, such as "targets.list[str]"; keys have no brackets.
    parts = [str(part) for part in item["loc"]]
    key = ".".join(part for part in parts if "[" not in part and part not in ("str", "int"))
    if item["type"] == "extra_forbidden":
        section = model.model_fields.get(parts[0])
        fields = getattr(section and section.annotation, "model_fields", model.model_fields)
        return f"unknown key {key}; allowed here: {', '.join(fields)}"
    if item["type"] == "missing":
        return f"{key} is missing; it has no default"
    if item["type"] == "value_error":
        return f"{key}: {item['ctx']['error']}" if key else str(item["ctx"]["error"])
    return f"{key} = {_text(item['input'])} is not allowed: {item['msg']}"


def _text(value: Any) -> str:
    try:
        return repr(value)
    except (ValueError, RecursionError):  # 0x and 5000 letters f; --set a.a.a and so on
        return "what is too large to show"
