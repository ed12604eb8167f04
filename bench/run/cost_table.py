"""What a job's runs cost, as a short table at its end; from their records alone."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_WIDTH = 126  # columns, where there is no terminal
_PHASES = ("local_train", "wait", "exchange", "aggregate", "evaluate")

Row = Mapping[str, Any]


def show_costs(run_dirs: Sequence[Path], console: Console) -> None:
    """Print one line per finished run: what was measured, then what is modelled per device."""
    runs = [_read(run_dir) for run_dir in run_dirs]
    if not runs:
        return
    if not console.is_terminal:
        console.width = _WIDTH
    console.print("cost, all rounds; seconds of the slowest process")
    console.print(_measured_table(runs))
    for text in dict.fromkeys(_energy_note(run, rows) for run, rows in runs):
        console.print(text, soft_wrap=True)
    devices = list(dict.fromkeys(name for _, rows in runs for name in _modelled(rows)))
    if devices:
        console.print("modelled, not measured: seconds of the slowest client, kJ of all clients")
        console.print(_modelled_table(runs, devices))


def _read(run_dir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    run = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    lines = (run_dir / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    return run, [json.loads(line) for line in lines]


def _measured_table(runs: Sequence[tuple[Row, Sequence[Row]]]) -> Table:
    table = _table()
    shown = ("train", "wait", "exchange", "aggregate", "evaluate")
    for heading in ("run", "prepare s", *(f"{name} s" for name in shown), "total s"):
        first = heading == "run"
        table.add_column(heading, justify="left" if first else "right", no_wrap=first)
    for heading in ("up MB", "down MB", "TFLOP", "peak MB", "energy J"):
        table.add_column(heading, justify="right")
    for run, rows in runs:
        seconds = [_sum(row["seconds"].get(phase, 0.0) for row in rows) for phase in _PHASES]
        table.add_row(
            _name(run),
            _number(run.get("prepare_seconds"), 1),
            *(_number(value, 1) for value in seconds),
            _number(run.get("total_seconds"), 1),
            _number(_total(rows, "uplink_bytes"), 2, 1e6),
            _number(_total(rows, "downlink_bytes"), 2, 1e6),
            _number(_total(rows, "flops"), 3, 1e12),
            _number(_peak(rows), 0, 1e6),
            _number(_joules(run, rows), 0),
        )
    return table


def _modelled_table(runs: Sequence[tuple[Row, Sequence[Row]]], devices: Sequence[str]) -> Table:
    table = _table()
    table.add_column("run", no_wrap=True)
    for name in devices:
        table.add_column(f"{name} s", justify="right")
        table.add_column("kJ", justify="right")
    for run, rows in runs:
        modelled = _modelled(rows)
        cells = []
        for name in devices:
            seconds, joules = modelled.get(name, (None, None))
            cells += [_number(seconds, 1), _number(joules, 2, 1e3)]
        table.add_row(_name(run), *cells)
    return table


def _modelled(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Seconds and joules of all rounds by device; nothing unless every round has them."""
    found = [row.get("modelled_by_device", {}) for row in rows]
    return {
        name: (
            _sum(by_device[name]["modelled_seconds"] for by_device in found),
            _sum(by_device[name]["modelled_joules"] for by_device in found),
        )
        for name in (found[0] if found else ())
        if all(name in by_device for by_device in found)
    }


def _joules(run: Row, rows: Sequence[Row]) -> float | None:
    """Of the whole run: counted where every round was, else codecarbon's."""
    if _counted_source(rows):
        return _sum(row["energy_joules"]["total"] for row in rows)
    return _sum(run["energy_joules"].values()) if "energy_joules" in run else None


def _energy_note(run: Row, rows: Sequence[Row]) -> str:
    """Where the energy comes from, or why there is none."""
    counted = _counted_source(rows)
    if counted:
        return f"energy: {counted}, counted, {rows[0]['energy_scope']}"
    if "energy_source" not in run:
        return f"energy: not measured here: {run.get('energy_missing', 'unknown')}"
    co2 = f", {run['co2_grams']:.3g} g CO2" if "co2_grams" in run else ""
    return f"energy: {run['energy_source']}, {run['energy_scope']}{co2}"


def _counted_source(rows: Sequence[Row]) -> str | None:
    sources = {row.get("energy_source") for row in rows}
    return sources.pop() if len(sources) == 1 else None


def _peak(rows: Sequence[Row]) -> int | None:
    for key in ("peak_device_memory_bytes", "peak_memory_bytes"):
        found = [int(row[key]) for row in rows if key in row]
        if found:
            return max(found)
    return None


def _total(rows: Sequence[Row], key: str) -> float | None:
    """Sum over the rounds; None unless every round has it."""
    found = [row[key] for row in rows if key in row]
    return _sum(found) if len(found) == len(rows) else None


def _sum(values: Iterable[float]) -> float:
    return float(sum(values))


def _name(run: Row) -> str:
    return f"{run['config']['method']['name']} {run['config_hash'][:6]}"


def _number(value: float | None, digits: int, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"


def _table() -> Table:
    return Table(box=None, padding=(0, 1, 0, 0))
