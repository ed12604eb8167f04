"""What a job's runs cost, as a short table at its end; from their records alone."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.run.record import Recorder

_WIDTH = 126  # columns, where there is no terminal
_SECONDS = {  # phase -> heading
    "local_train": "train s",
    "wait": "wait s",
    "exchange": "exchange s",
    "aggregate": "aggregate s",
    "evaluate": "evaluate s",
}
_MODELLED = {"modelled_seconds", "modelled_joules"}  # of a device

Row = Mapping[str, Any]
Run = tuple[Row, Sequence[Row]]  # run.json, rounds


def show_costs(recorders: Iterable[Recorder], console: Console) -> None:
    """Print one line per finished run: what was measured, then what is modelled per device."""
    runs = [(recorder.run(), recorder.rounds()) for recorder in recorders]
    if not runs:
        return
    if not console.is_terminal:
        console.width = _WIDTH
    console.print("cost, all rounds; seconds of the slowest process")
    headings = ["prepare s", *_SECONDS.values(), "total s"]
    headings += ["up MB", "down MB", "TFLOP", "peak MB", "energy J"]
    console.print(_table(headings, [_measured(run, rows) for run, rows in runs]))
    for text in dict.fromkeys(_energy_note(run, rows) for run, rows in runs):
        console.print(text, soft_wrap=True)
    modelled = [(_name(run), _modelled(rows)) for run, rows in runs]
    devices = list(dict.fromkeys(device for _, by_device in modelled for device in by_device))
    if devices:
        console.print("modelled, not measured: seconds of the slowest client, kJ of all clients")
        headings = [heading for device in devices for heading in (f"{device} s", "kJ")]
        lines = [
            [name, *(cell for device in devices for cell in by_device.get(device, ("", "")))]
            for name, by_device in modelled
        ]
        console.print(_table(headings, lines))


def _table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("run", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    for cells in lines:
        table.add_row(*cells)
    return table


def _measured(run: Row, rows: Sequence[Row]) -> list[str]:
    return [
        _name(run),
        _number(run.get("prepare_seconds"), 1),
        *(_number(sum(row["seconds"].get(key, 0.0) for row in rows), 1) for key in _SECONDS),
        _number(run.get("total_seconds"), 1),
        _number(_total(rows, "uplink_bytes"), 2, 1e6),
        _number(_total(rows, "downlink_bytes"), 2, 1e6),
        _number(_total(rows, "flops"), 3, 1e12),
        _number(_peak(rows), 0, 1e6),
        _number(_joules(run, rows), 0),
    ]


def _modelled(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Seconds and kJ of all rounds by device; nothing unless every round has them."""
    found = [row.get("modelled_by_device", {}) for row in rows]
    return {
        device: (
            _number(sum(by_device[device]["modelled_seconds"] for by_device in found), 1),
            _number(sum(by_device[device]["modelled_joules"] for by_device in found), 2, 1e3),
        )
        for device in (found[0] if found else ())
        if all(by_device.get(device, {}).keys() >= _MODELLED for by_device in found)
    }


def _joules(run: Row, rows: Sequence[Row]) -> float | None:
    """Of the whole run: counted where every round was, else codecarbon's."""
    if _counted_source(rows):
        return float(sum(row["energy_joules"]["total"] for row in rows))
    return float(sum(run["energy_joules"].values())) if "energy_joules" in run else None


def _energy_note(run: Row, rows: Sequence[Row]) -> str:
    """Where the energy comes from, or why there is none."""
    if counted := _counted_source(rows):
        return f"energy: {counted}, counted, {rows[0].get('energy_scope', 'scope unknown')}"
    if "energy_source" not in run:
        return f"energy: not measured here: {run.get('energy_missing', 'unknown')}"
    co2 = f", {run['co2_grams']:.3g} g CO2" if "co2_grams" in run else ""
    return f"energy: {run['energy_source']}, {run.get('energy_scope', 'scope unknown')}{co2}"


def _counted_source(rows: Sequence[Row]) -> str | None:
    counted = ("total" in row.get("energy_joules", {}) for row in rows)
    sources = {row.get("energy_source") for row in rows} if all(counted) else set()
    return sources.pop() if len(sources) == 1 else None


def _peak(rows: Sequence[Row]) -> int | None:
    for key in ("peak_device_memory_bytes", "peak_memory_bytes"):
        if found := [int(row[key]) for row in rows if key in row]:
            return max(found)
    return None


def _total(rows: Sequence[Row], key: str) -> float | None:
    """Sum over the rounds; None unless every round has it."""
    return sum(row[key] for row in rows) if all(key in row for row in rows) else None


def _name(run: Row) -> str:
    return f"{run['config']['method']['name']} {run['config_hash'][:6]}"


def _number(value: float | None, digits: int, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"
