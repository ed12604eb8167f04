"""The tables of the micro-benchmarks of one process: medians and quartiles by hand."""

from pathlib import Path
from typing import Any

import pytest

from analysis.cli import main
from analysis.figures import step_levers
from analysis.records.launches import Launches, load_launches
from analysis.tables import overhead as table_overhead
from analysis.tables import prepare as table_prepare
from analysis.tables import roundtrip as table_roundtrip
from analysis.tables import step as table_step
from support.launch import ROOT
from support.records import make_launch, overhead_row, prepare_row, step_row

PUBLISHED = ROOT / "results" / "published" / "micro"
MAKERS: dict[str, Any] = {
    "roundtrip": table_roundtrip,
    "overhead": table_overhead,
    "step": table_step,
    "prepare": table_prepare,
}
# Of a report, besides the tables.
FIGURES = {"step": {f"step_levers.{suffix}" for suffix in ("pdf", "png", "txt")}}


def roundtrip_row(milliseconds: float, ratio: float, **more: Any) -> dict[str, Any]:
    seconds = milliseconds / 1e3
    row = {
        **{"method": "lora", "num_clients": 10, "path": "split", "codec": "fp32"},
        **{"median_seconds": seconds, "messages_per_second": 10 / seconds},
        **{"bare_loop_median_seconds": seconds / ratio, "bare_messages_median_seconds": 0.02},
        **{"ratio_to_bare_loop": ratio, "uplink_bytes_per_client": 2e6},
        "phase_seconds": {"pack": 0.001, "exchange": 0.0025},
    }
    return row | more


def any_row(benchmark: str) -> dict[str, Any]:
    rows = {
        "roundtrip": roundtrip_row(10, 2),
        "overhead": overhead_row(1, 1),
        "step": step_row(10, 2),
        "prepare": prepare_row("empty", 3),
    }
    return rows[benchmark]


def load(folder: Path, benchmark: str) -> Launches:
    maker = MAKERS[benchmark]
    found = load_launches(folder, maker.BENCHMARK, maker.REQUIRED)
    assert found is not None
    return found


def test_roundtrip_medians_and_quartiles_by_hand(tmp_path: Path) -> None:
    """Rounds of 10, 20, 30, 50, 90 ms: quartiles 20 and 50. One launch of five has a ratio to the
    loop with messages; a phase that one launch lacks took no time there."""
    for number, milliseconds in enumerate((30, 10, 90, 20, 50)):
        more = {"ratio_to_bare_messages": 0.9} if number == 2 else {}
        if number == 1:
            more["phase_seconds"] = {"exchange": 0.0005}
        row = roundtrip_row(milliseconds, 1 + number / 4, **more)
        make_launch(tmp_path, "roundtrip", number, row)
    made = table_roundtrip.table(load(tmp_path, "roundtrip"))
    (cells,) = made.cells.to_dict("records")
    assert cells["launches"] == "5"
    assert cells["ms a round"] == "30 (20 to 50)"
    assert cells["messages/s"] == "333"  # the median of 333, 1000, 111, 500, 200
    assert cells["ratio to bare loop"] == "1.50 (1.25 to 1.75)"
    assert cells["ratio, with messages"] == "0.90"
    assert cells["with messages ms"] == "20"
    assert cells["bare allgather ms"] == ""  # no launch measured it
    assert cells["download, pack, exchange, aggregate, meter ms"] == "0, 1, 2.5, 0, 0"
    (numbers,) = made.numbers.to_dict("records")
    assert (numbers["num_ratio_to_bare_messages"], numbers["num_launches"]) == (1, 5)
    assert len(numbers["run_ids"].split()) == 5


def test_fewer_launches_than_the_row_has_are_named(tmp_path: Path) -> None:
    for number in range(4):
        more = {"ratio_to_bare_messages": 0.5 + number / 2} if number < 2 else {}
        make_launch(tmp_path, "roundtrip", number, roundtrip_row(10, 2, **more))
    (cells,) = table_roundtrip.table(load(tmp_path, "roundtrip")).cells.to_dict("records")
    assert cells["ratio, with messages"] == "0.75 (0.62 to 0.88, 2 launches)"


@pytest.mark.parametrize(
    ("row", "facts"),
    [
        ({}, {"comm": "mpi-node"}),
        ({}, {"cpu": "another CPU"}),
        ({}, {"config": {"model": "bert"}}),
        ({"codec": "int8"}, {}),
        ({"uplink_bytes_per_client": 4e6}, {}),  # another lora_rank
    ],
)
def test_launches_that_differ_are_not_mixed(
    row: dict[str, Any], facts: dict[str, Any], tmp_path: Path
) -> None:
    make_launch(tmp_path, "roundtrip", 0, roundtrip_row(10, 1))
    make_launch(tmp_path, "roundtrip", 1, roundtrip_row(20, 2, **row), **facts)
    frame = table_roundtrip.data(load(tmp_path, "roundtrip"))
    assert sorted(frame["median_seconds"]) == [0.01, 0.02]


def test_the_published_launches_give_the_published_numbers() -> None:
    """As they were once written by hand in results/published/micro/README.md."""
    table = table_roundtrip.table(load(PUBLISHED, "roundtrip"))
    axes = ["method", "clients", "path", "back end"]
    cells = table.cells.set_index(axes)
    node = "MPICH, mpi-node"
    assert len(cells) == 30
    assert list(dict.fromkeys(table.cells["path"])) == ["allgather", "split", "allreduce"]
    shown = ["launches", "messages/s", "bare loop ms", "with messages ms", "bare allgather ms"]
    for key, numbers in {
        ("lora", "10", "allreduce", "MPICH"): ["22", "949", "6.15", "12.4", "6.42"],
        ("lora", "128", "split", "MPICH"): ["7", "947", "70", "155", "80.6"],
        ("fedara", "128", "allgather", "MPICH"): ["7", "481", "90.3", "176", "80.3"],
        ("fedara", "1000", "allreduce", "MPICH"): ["1", "2215", "599", "1690", "527"],
    }.items():
        assert cells.loc[key, shown].tolist() == numbers
    assert cells.loc[("fedara", "128", "allreduce", node), "messages/s"] == "1658"
    best = cells.loc[("lora", "10", "allreduce", "MPICH")]
    assert best["ratio to bare loop"] == "1.62 (1.54 to 1.75)"
    assert best["ratio, with messages"] == "0.90 (0.85 to 0.92, 15 launches)"
    file = PUBLISHED / "figures" / "roundtrip.csv"
    assert table.numbers.to_csv(index=False, lineterminator="\n") == file.read_text()


def test_overhead_by_hand(tmp_path: Path) -> None:
    """Ratios of 1.00, 1.02 and 1.10: quartiles half-way to the middle one."""
    for number, (seconds, ratio) in enumerate(((2.0, 1.0), (4.0, 1.1), (3.0, 1.02))):
        make_launch(tmp_path, "overhead", number, overhead_row(seconds, ratio), world_size=1)
    (cells,) = table_overhead.table(load(tmp_path, "overhead")).cells.to_dict("records")
    assert cells["ratio"] == "1.020 (1.010 to 1.060)"
    assert cells["s a round"] == "3 (2.5 to 3.5)"
    assert cells["bare loop s"] == "2.94"  # the median of 2, 3.636 and 2.941
    assert (cells["clients x steps"], cells["tokens"]) == ("5 x 5", "64")
    assert (cells["metering %"], cells["launches"]) == ("0.12", "3")


def test_step_by_hand(tmp_path: Path) -> None:
    """Ratios of 0.5, 0.6 and 0.8; levers keep the order of the record, fp32 comes first. A launch
    whose attention ran otherwise is a row of its own."""
    for number, ratio in enumerate((0.5, 0.8, 0.6)):
        rows = [
            step_row(0.1, ratio / 2, precision="bf16"),
            step_row(0.3, ratio, bare_loop_step_peak_bytes=5e8),
            step_row(0.45, 2 * ratio, levers="all but packing", packed=False, token_share=0.625),
        ]
        make_launch(tmp_path, "step", number, *rows)
    make_launch(tmp_path, "step", 3, step_row(0.2, 0.4, precision="bf16", attention="sdpa"))
    cells = table_step.table(load(tmp_path, "step")).cells
    shown = cells[["precision", "levers", "attention", "launches"]].to_numpy().tolist()
    assert shown == [
        ["fp32", "all", "eager", "3"],
        ["fp32", "all but packing", "eager", "3"],
        ["bf16", "all", "eager", "3"],
        ["bf16", "all", "sdpa", "1"],
    ]
    first, second, *_, last = cells.to_dict("records")
    assert first["ratio"] == "0.600 (0.550 to 0.700)"
    assert (first["ms a step"], first["PEFT loop ms"]) == ("300 (300 to 300)", "500")
    assert (first["peak MB"], first["PEFT loop peak MB"], first["filled %"]) == (
        "300",
        "500",
        "100",
    )
    assert (second["PEFT loop peak MB"], second["filled %"]) == ("", "62")  # no launch has the peak
    assert last["ratio"] == "0.400"


def test_step_figure_has_a_panel_for_each_ablation_and_says_what_ran(tmp_path: Path) -> None:
    levers = ("all", "all but adapter.fused", "none")
    for number, ratio in enumerate((0.5, 0.6)):
        rows = [
            step_row(0.3, ratio * (1 + place), levers=name, precision=precision, lengths=lengths)
            for lengths in ("full", "docstrings")
            for precision in ("fp32", "bf16")
            for place, name in enumerate(levers)
        ]
        make_launch(tmp_path, "step", number, *rows)
    files = step_levers.draw(load(tmp_path, "step"), tmp_path / "out")
    assert [file.name for file in files] == [f"step_levers.{end}" for end in ("pdf", "png", "txt")]
    caption = " ".join(files[-1].read_text().split())
    assert "Launches: 2; bars: median over launches" in caption


def test_prepare_by_hand(tmp_path: Path) -> None:
    """Three launches, one without memory; 2 processes of 300 and 500 MB."""
    for number, seconds in enumerate((3.0, 5.0, 4.0)):
        row = prepare_row("empty", seconds)
        if number:
            row["trained_pss_bytes"] = {1: 600e6, 2: 1000e6}[number]
        make_launch(tmp_path, "prepare", number, row)
    make_launch(tmp_path, "prepare", 3, prepare_row("filled", 0.5))
    empty, filled = table_prepare.table(load(tmp_path, "prepare")).cells.to_dict("records")
    assert (empty["cache"], empty["processes"], empty["launches"]) == ("empty", "2", "3")
    assert empty["preparing s"] == "4 (3.5 to 4.5)"
    assert (empty["CPU s"], empty["loading s"], empty["MB each"]) == ("8", "2", "400")
    assert (filled["cache"], filled["preparing s"], filled["MB each"]) == ("filled", "0.5", "")


@pytest.mark.parametrize("benchmark", MAKERS)
def test_the_report_has_the_table_and_leaves_out_what_did_not_finish(
    benchmark: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = any_row(benchmark)
    make_launch(tmp_path, benchmark, 0, row)
    make_launch(tmp_path, benchmark, 1, row)
    (tmp_path / f"micro-{benchmark}-mpi-p2-1" / "DONE").unlink()
    main(tmp_path, None, tmp_path / "out", None)
    assert f"left out, no DONE: micro-{benchmark}-mpi-p2-1" in capsys.readouterr().out
    files = {f"{benchmark}.{suffix}" for suffix in ("md", "csv", "tex")} | {"report.html"}
    files |= FIGURES.get(benchmark, set())
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    page = (tmp_path / "out" / "report.html").read_text()
    assert f'<tr id="run-micro-{benchmark}-mpi-p2-0"' in page
    assert f'href="#run-micro-{benchmark}-mpi-p2-0"' in page


@pytest.mark.parametrize("benchmark", MAKERS)
def test_a_row_without_a_number_is_damage_with_its_line(benchmark: str, tmp_path: Path) -> None:
    row, key = any_row(benchmark), MAKERS[benchmark].REQUIRED[-1]
    del row[key]
    make_launch(tmp_path, benchmark, 0, row)
    (reason,) = load(tmp_path, benchmark).damaged
    assert f"jsonl:1: missing {key};" in reason
