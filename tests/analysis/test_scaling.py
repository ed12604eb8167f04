"""The scaling model by hand and fitted to known costs; figures and table of micro records."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from analysis.cli import app
from analysis.cost_model import (
    Cost,
    ExchangeSizes,
    fit,
    moved_bytes,
    num_messages,
    predict,
    read_costs,
    relative_errors,
    union_bytes,
)
from analysis.figures import collectives_scaling
from analysis.figures.path_panels import path_points
from analysis.records import reader
from analysis.records.campaign import load_campaign
from analysis.records.collectives import collective_points, load_collectives
from analysis.tables import allgather, render
from fedara_core.errors import InputError
from fedara_core.merge.cost import moved_values
from fedara_core.schema import PATHS
from support.records import write_record

ROOT = Path(__file__).resolve().parents[2]
COST = Cost(overhead_seconds=3e-4, alpha_seconds=2e-5, beta_seconds_per_byte=1e-9)


def make_exchange(world_size: int, part_bytes: float, density: float = 0.25) -> ExchangeSizes:
    """One client a process, equal masks."""
    return ExchangeSizes(
        num_clients=world_size,
        world_size=world_size,
        part_bytes=part_bytes,
        union_bytes=part_bytes,
        layout_bytes=part_bytes / density,
        mask_bytes=100,
    )


def test_paths_and_bytes_are_those_of_the_collectives() -> None:
    sizes = {"num_clients": 12, "world_size": 4}
    exchange = ExchangeSizes(**sizes, part_bytes=400, union_bytes=1000, layout_bytes=4000)
    moved = moved_values(
        num_parts=12, world_size=4, part_values=100, union_values=250, layout_values=1000
    )
    for path in PATHS:
        assert moved_bytes(path, exchange) == 4 * moved[path]


@pytest.mark.parametrize(
    ("world_size", "messages"),
    [
        (1, (0, 0, 0, 0)),
        (2, (3, 4, 4, 4)),
        (4, (6, 9, 8, 8)),
        (5, (9, 13, 12, 12)),
        (10**6, (60, 10**6 + 59, 80, 80)),
    ],
)
def test_messages_by_hand(world_size: int, messages: tuple[int, ...]) -> None:
    assert tuple(num_messages(path, world_size) for path in PATHS) == messages


def test_predictions_by_hand() -> None:
    """4 processes, a client of 1 MB each, masks of 100 bytes; the layout has 4 MB."""
    exchange = make_exchange(4, 1e6)
    fixed, mask = 3e-4, 0.75 * 400 * 1e-9
    assert predict("allgather", exchange, COST) == pytest.approx(fixed + 6 * 2e-5 + 3e-3 + mask)
    assert predict("split", exchange, COST) == pytest.approx(fixed + 9 * 2e-5 + 1.5e-3 + mask)
    assert predict("allreduce", exchange, COST) == pytest.approx(fixed + 8 * 2e-5 + 1.5e-3 + mask)
    assert predict("dense", exchange, COST) == pytest.approx(fixed + 8 * 2e-5 + 6e-3 + mask)
    # A million: (P-1) k for allgather, 999,999 x 1 MB at 1 ns a byte.
    many = make_exchange(10**6, 1e6)
    assert predict("allgather", many, COST) == pytest.approx(999.999 + 0.1, rel=1e-5)
    assert predict("dense", many, COST) == pytest.approx(8e-3 + 0.1 + 80 * 2e-5 + 3e-4, rel=1e-5)


@pytest.mark.parametrize("world_size", [2, 4, 64, 1024])
def test_the_bytes_cross_at_density_2_over_p(world_size: int) -> None:
    """Of sparse allgather and dense allreduce, the masks aside."""
    for density, sparse_is_less in ((1.9 / world_size, True), (2.1 / world_size, False)):
        exchange = ExchangeSizes(
            num_clients=world_size,
            world_size=world_size,
            part_bytes=1000,
            union_bytes=1000,
            layout_bytes=1000 / density,
        )
        less = moved_bytes("allgather", exchange) < moved_bytes("dense", exchange)
        assert less == sparse_is_less


@pytest.mark.parametrize("path", PATHS)
def test_fit_recovers_known_costs(path: str) -> None:
    exchanges = [make_exchange(p, k) for p in (2, 4, 8) for k in (1e4, 1e6, 5e7)]
    measured = [(exchange, predict(path, exchange, COST)) for exchange in exchanges]
    found = fit(path, measured)
    assert found.overhead_seconds == pytest.approx(COST.overhead_seconds, rel=1e-6)
    assert found.alpha_seconds == pytest.approx(COST.alpha_seconds, rel=1e-6)
    assert found.beta_seconds_per_byte == pytest.approx(COST.beta_seconds_per_byte, rel=1e-6)
    assert max(relative_errors(path, measured, found)) < 1e-6


def test_fit_on_one_number_of_processes_takes_overhead_as_latency() -> None:
    measured = [(make_exchange(4, k), 1.2e-3 + 1e-9 * 3 * (k + 100)) for k in (1e4, 1e6, 1e7)]
    found = fit("allgather", measured)
    assert found.overhead_seconds == 0
    assert found.alpha_seconds == pytest.approx(0.2e-3)  # six messages
    assert found.beta_seconds_per_byte == pytest.approx(1e-9)


def test_no_cost_is_below_zero() -> None:
    """Large messages at a better rate than small ones would ask for a negative latency."""
    measured = [(make_exchange(2, k), 1e-9 * k**1.2) for k in (1e4, 1e6, 1e8)]
    found = fit("allgather", measured)
    assert found.alpha_seconds == found.overhead_seconds == 0
    assert found.beta_seconds_per_byte > 0
    with pytest.raises(InputError, match="1 measured exchanges"):
        fit("split", measured[:1])


def test_union_by_hand() -> None:
    """Clients of 100 bytes in 1000: disjoint, half shared, equal, and more than the layout has."""
    sizes = {"part_bytes": 100.0, "layout_bytes": 1000.0}
    assert union_bytes(num_clients=4, overlap=0, **sizes) == 400
    assert union_bytes(num_clients=4, overlap=0.5, **sizes) == 250
    assert union_bytes(num_clients=4, overlap=1, **sizes) == 100
    assert union_bytes(num_clients=40, overlap=0.5, **sizes) == 1000


def test_costs_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "costs.toml"
    both = "alpha_seconds = 2e-6\nbeta_seconds_per_byte = 1e-10\n"
    file.write_text(f"[all]\n{both}[split]\noverhead_seconds = 1e-3\n{both}")
    costs = read_costs(file)
    assert set(costs) == set(PATHS)
    assert costs["dense"] == Cost(alpha_seconds=2e-6, beta_seconds_per_byte=1e-10)
    assert costs["split"].overhead_seconds == 1e-3
    wrong = {
        "": "it has nothing",
        f"[ring]\n{both}": "it has ring; allowed: tables all, allgather",
        "[all]\nalpha_seconds = 1e-6": r"\[all\].*beta_seconds_per_byte",
        "[all]\nalpha_seconds = -1\nbeta_seconds_per_byte = 1": "0 or above",
        "[all": "not readable as TOML",
        "all = 3": "allowed: alpha_seconds",
    }
    for text, message in wrong.items():
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            read_costs(file)


def write_launch(folder: Path, world_size: int, launch: int, *, done: bool = True) -> Path:
    """A record whose times follow COST exactly, times 1, 2 and 3 for the launches 0 to 2."""
    run_dir = folder / f"micro-collectives-mpi-p{world_size}-{launch}"
    run_dir.mkdir(parents=True)
    run = {
        "schema_version": 1,
        "benchmark": "micro-collectives",
        "run_id": run_dir.name,
        "comm": "mpi",
        "mpi_library": "MPICH Version:      5.0.2",
        "world_size": world_size,
        "git_commit": "0123456789abcdef",
        "cpu": "a CPU",
        "num_cores": 8,
        "processes": [{"host": "h"}],
        "transport_environment": {},
    }
    (run_dir / "run.json").write_text(json.dumps(run))
    rows: list[dict[str, Any]] = []
    for payload_bytes in (1e4, 1e6):
        axes = {"payload_bytes": payload_bytes, "num_clients": world_size}
        bare = {"bare_call": "bare_allgatherv", "bare_median_seconds": 1.0, "ratio": 1.0 + launch}
        rows.append({**axes, "call": "allgather", "median_seconds": 1.0, **bare})
        for density in (0.25, 1.0):
            exchange = make_exchange(world_size, payload_bytes, density)
            sizes = {
                "part_bytes": exchange.part_bytes,
                "union_bytes": exchange.union_bytes,
                "layout_bytes": exchange.layout_bytes,
                "num_rows": (exchange.mask_bytes - 12) * 8,
            }
            for path in PATHS:
                seconds = (1 + launch) * predict(path, exchange, COST)
                row = {"call": "weighted_sum", "path": path, "codec": "fp32"}
                point = {"density": density, "overlap": 1.0, "median_seconds": seconds}
                rows.append({**axes, **row, **sizes, **point})
    (run_dir / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if done:
        (run_dir / "DONE").touch()
    return run_dir


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Three launches each on 2 and 4 processes, and one that did not finish."""
    for world_size in (2, 4):
        for launch in range(3):
            write_launch(tmp_path / "records" / "deeper", world_size, launch)
    write_launch(tmp_path / "records", 2, 3, done=False)
    return tmp_path / "records"


def test_figure_data_is_the_median_over_launches(records: Path) -> None:
    micro = load_collectives(records)
    assert micro is not None
    assert micro.incomplete == ["micro-collectives-mpi-p2-3"]
    measured = path_points(micro)
    assert len(measured) == 2 * 2 * 2 * 4  # processes, payloads, densities, paths
    assert set(measured["num_launches"]) == {3}
    assert set(measured["backend"]) == {"MPICH"}
    chosen = (measured["world_size"] == 4) & (measured["path"] == "dense")
    row = measured[
        chosen & (measured["density"] == 0.25) & (measured["payload_bytes"] == 1e6)
    ].iloc[0]
    seconds = predict("dense", make_exchange(4, 1e6), COST)
    assert row["median_seconds"] == pytest.approx(2 * seconds)
    assert row["min_seconds"] == pytest.approx(seconds)
    assert row["max_seconds"] == pytest.approx(3 * seconds)
    assert row["crossing_density"] == 0.5
    assert set(measured.loc[measured["world_size"] == 2, "crossing_density"]) == {1.0}


def test_modelled_lines_go_on_where_the_points_end(records: Path) -> None:
    micro = load_collectives(records)
    assert micro is not None
    measured = path_points(micro)
    costs = collectives_scaling.fitted_costs(measured)
    assert costs["MPICH"]["split"].alpha_seconds == pytest.approx(2 * COST.alpha_seconds)
    modelled = collectives_scaling.scaling_data(measured, costs)
    assert modelled["num_processes"].max() == 10**6
    shown = collectives_scaling.modelled_points(measured)
    assert set(shown["density"]) == {0.25}
    at_points = shown.merge(
        modelled.rename(columns={"num_processes": "world_size"}),
        on=["backend", "payload_bytes", "path", "world_size"],
    )
    assert len(at_points) == len(shown)
    ratios = at_points["modelled_seconds"] / at_points["median_seconds"]
    assert ratios.tolist() == pytest.approx([1.0] * len(shown))
    last = modelled[(modelled["path"] == "allgather") & (modelled["num_processes"] == 10**6)]
    expected = 2 * predict("allgather", make_exchange(10**6, 1e6), COST)
    assert last["modelled_seconds"].max() == pytest.approx(expected, rel=1e-5)


def test_ratio_is_the_median_over_launches(records: Path, tmp_path: Path) -> None:
    micro = load_collectives(records)
    assert micro is not None
    frame = allgather.data(micro)
    assert frame["ratio"].tolist() == [2.0] * 4
    assert (frame["min_ratio"].tolist(), frame["max_ratio"].tolist()) == ([1.0] * 4, [3.0] * 4)
    assert frame["run_ids"][0] == " ".join(f"micro-collectives-mpi-p2-{i}" for i in range(3))
    markdown = render.write(allgather.table(micro), tmp_path / "out")[0].read_text()
    assert "| MPICH | 4 | 1e+06 | 3 |" in markdown
    assert "2.000 (1.000 to 3.000)" in markdown


def test_launches_with_another_transport_are_not_mixed(records: Path) -> None:
    run_dir = write_launch(records, 2, 7)
    run = json.loads((run_dir / "run.json").read_text())
    run["transport_environment"] = {"UCX_TLS": "tcp,self"}
    (run_dir / "run.json").write_text(json.dumps(run))
    run_dir = write_launch(records, 2, 8)
    run = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps(run | {"comm": "mpi-node"}))
    micro = load_collectives(records)
    assert micro is not None
    counts = collective_points(micro).groupby("backend")["num_launches"].max()
    others = {"MPICH, UCX_TLS=tcp,self": 1, "MPICH, mpi-node": 1}
    assert counts.to_dict() == {"MPICH": 3} | others


def test_bad_records_are_refused(records: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    assert load_collectives(tmp_path / "none") is None
    write_launch(records / "copy", 2, 0)
    with pytest.raises(InputError, match="micro-collectives-mpi-p2-0 comes twice"):
        load_collectives(records)
    file = write_launch(tmp_path / "corrupt", 2, 0) / "rows.jsonl"
    file.write_text(file.read_text()[:-20])
    micro = load_collectives(tmp_path / "corrupt")
    assert micro is not None
    (reason,) = micro.damaged
    assert "rows.jsonl:18: not valid JSON" in reason


@pytest.mark.slow
def test_command_writes_the_same_bytes_twice(records: Path, tmp_path: Path) -> None:
    outs = [tmp_path / "first", tmp_path / "second"]
    here = CliRunner().invoke(app, [str(records), "--out", str(outs[0])])
    assert here.exit_code == 0, here.output
    assert "left out, no DONE: micro-collectives-mpi-p2-3" in here.output
    words = [sys.executable, "-m", "analysis", str(records), "--out", str(outs[1])]
    there = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert there.returncode == 0, there.stderr
    names = sorted(file.name for file in outs[0].iterdir())
    figures = [f"collectives_{kind}" for kind in ("density_overlap_1", "scaling")]
    assert names == [
        *(f"collectives_allgather.{end}" for end in ("csv", "md", "tex")),
        *(f"{figure}.{end}" for figure in figures for end in ("pdf", "png", "txt")),
        "report.html",
    ]
    for name in names:
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes(), name
    caption = (outs[0] / "collectives_scaling.txt").read_text().replace("\n", " ")
    for word in ("modelled", "recursive doubling", "0123456789ab", "3 launches", "alpha 40 us"):
        assert word in caption, word


def test_costs_of_another_machine_are_named_as_given(records: Path, tmp_path: Path) -> None:
    micro = load_collectives(records)
    assert micro is not None
    measured = path_points(micro)
    cost = Cost(alpha_seconds=1e-6, beta_seconds_per_byte=1e-10)
    costs = {"MPICH": dict.fromkeys(PATHS, cost)}
    texts = collectives_scaling.scaling_caption(micro, measured, costs, fitted=False)
    assert "given, not fitted" in texts[0]
    assert "alpha 1 us, beta 0.1 ns/byte" in texts[1]
    file = tmp_path / "costs.toml"
    file.write_text("[all]\n")
    result = CliRunner().invoke(app, [str(records), "--costs", str(file)])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1


def test_a_folder_may_hold_runs_and_launches(records: Path, tmp_path: Path) -> None:
    """Runs alone are left to tests/analysis/test_analysis.py, launches alone to the test above."""
    write_launch(tmp_path / "both", 2, 0)
    assert not reader.run_folders(tmp_path / "both")
    write_record(tmp_path / "both", "lora", 0)
    assert reader.run_folders(tmp_path / "both")
    assert len(load_campaign(tmp_path / "both").runs) == 1
    micro = load_collectives(tmp_path / "both")
    assert micro is not None
    assert len(micro.launches) == 1


def test_points_without_a_measurement_are_missing(records: Path) -> None:
    micro = load_collectives(records)
    assert micro is not None
    assert collective_points(micro)["measured_bytes"].isna().all()
    assert pd.isna(micro.launches["measured_bytes_source"].replace("", None)).all()
