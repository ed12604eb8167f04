"""fedara micro collectives: records of small jobs, wrong results that are found, wrong options."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.micro import collectives as micro_collectives
from bench.micro.collectives import MIN_ITERATIONS, Settings, measure
from bench.micro.masks import WrongResult, check_buffers, check_sum, make_layout, run_layout
from bench.micro.wire_counter import WireCounter, open_counter
from bench.run.clients import draw_cohort
from bench.run.record import Recorder
from bench.run.rounds import run
from fedara_core.codec import CODECS, row_bytes
from fedara_core.comm.base import Communicator
from fedara_core.merge.cost import PATHS
from fedara_core.merge.masked import MaskedAveraging, MaskedSum, masked_sum
from fedara_core.values import put_rows
from support.documented import check_documented, documented
from support.launch import fedara_here, launch
from support.rounds import make_tiny_job, play_rounds, train_one_client

pytestmark = pytest.mark.xdist_group("jobs")

SMALL: dict[str, Any] = {
    "payload_bytes": "2e3,2e5",
    "densities": "0.25,1",
    "overlaps": "0",
    "paths": ",".join(PATHS),
    "codecs": "fp32",
    "iterations": 3,
    "warm_up": 2,
    "limit_seconds": 60.0,
    "clients_per_process": 1,
    "max_layout_bytes": 1e7,
    "seed": 1,
}
# They make every byte of an MPI that knows them pass a counter; timings are not looked at here.
COUNTABLE = {
    "MPIR_CVAR_NOLOCAL": "1",
    "UCX_TLS": "tcp,self",
    "FI_PROVIDER": "tcp",
    "OMPI_MCA_pml_monitoring_enable": "1",
}


def options(**changed: object) -> list[str]:
    """SMALL as words of the command line."""
    settings = SMALL | changed
    return [word for k, v in settings.items() for word in (f"--{k.replace('_', '-')}", str(v))]


def read_record(results: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    (run_dir,) = results.iterdir()
    assert (run_dir / "DONE").exists()
    run = json.loads((run_dir / "run.json").read_text())
    assert run["run_id"] == run_dir.name
    return run, [json.loads(line) for line in (run_dir / "rows.jsonl").read_text().splitlines()]


def test_every_codec_passes_its_check_and_costs_what_it_says(tmp_path: Path) -> None:
    words = options(codecs=",".join(CODECS), payload_bytes="2e5", densities="0.25")
    job = launch("mpi", 2, "-m", "bench", "micro", "collectives", *words, "--results", tmp_path)
    assert job.code == 0, job.err
    _, rows = read_record(tmp_path)
    gathered = {row["codec"]: row for row in rows if row.get("path") == "allgather"}
    assert list(gathered) == list(CODECS)
    for codec, row in gathered.items():
        widths = torch.full((row["part_bytes"] // 4 // 769,), 769)
        assert row["model_bytes"] == int(row_bytes(codec, widths).sum())
        masks = 2 * (8 + 20 + row["num_rows"] / 8)  # what else travels: sizes, headers, masks
        assert row["model_bytes"] < row["counted_bytes_sent"] < row["model_bytes"] + masks + 50
    reduced = {row["codec"]: row["model_bytes"] for row in rows if row.get("path") == "allreduce"}
    assert len(set(reduced.values())) == 1  # sums travel as float32


# Keys of run.json, of rows of runs, and of a library whose bytes can be counted or not.
NOT_EVERYWHERE = [
    *(["benchmark"], ["config"], ["transport_environment"], ["method"], ["model"]),
    *(["measured_bytes"], ["measured_bytes_source"], ["measured_bytes_missing"]),
]


@pytest.mark.parametrize(("launcher", "world_size"), [("plain", 1), ("mpi", 2), ("torch", 2)])
@pytest.mark.slow
def test_a_launch_is_a_record(
    launcher: str, world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in COUNTABLE.items():
        monkeypatch.setenv(key, value)
    words = ("-m", "bench", "micro", "collectives", *options(), "--results", tmp_path)
    job = launch(launcher, world_size, *words)
    assert job.code == 0, job.err
    assert job.out.count("density 0.25, overlap 0, split: ") == 2  # world_rank 0 alone tells
    run, rows = read_record(tmp_path)
    assert run["world_size"] == len(run["processes"]) == world_size
    assert run["config"]["densities"] == [0.25, 1.0]
    assert {"git_commit", "package_versions", "cpu", "start_time", "end_time"} <= set(run)
    assert [row["call"] for row in rows] == 2 * ["allgather", *["weighted_sum"] * 8]
    for row in rows:
        assert len(row["iteration_seconds"]) == 3
        assert 0 < row["min_seconds"] <= row["median_seconds"] <= row["p95_seconds"]
    if world_size == 1:
        assert not any("ratio" in row or "measured_bytes" in row for row in rows)
        assert run["measured_bytes_missing"] == "one process moves no bytes"
    else:
        check_bytes_of_two_processes(rows)
        check_documented([*rows, *NOT_EVERYWHERE], "## Micro-benchmarks of the collectives")
        check_measured_bytes(run, rows)


def check_bytes_of_two_processes(rows: list[dict[str, Any]]) -> None:
    """By hand: k is 50,000 values less what does not fill 65 rows, one client each."""
    large = [row for row in rows if row["payload_bytes"] == 2e5]
    k = 65 * 769 * 4
    by_path = {row["path"]: row for row in large if row.get("density") == 0.25}
    assert {row["part_bytes"] for row in large} == {k}
    assert {row["union_bytes"] for row in by_path.values()} == {2 * k}
    assert {row["layout_bytes"] for row in by_path.values()} == {4 * k}
    model = {path: row["model_bytes"] for path, row in by_path.items()}
    assert model == {"allgather": k, "split": 1.5 * k, "allreduce": 2 * k, "dense": 4 * k}
    for path, row in by_path.items():
        most = 1.05 * model[path] + 1000
        assert least_bytes(row) <= row["counted_bytes_received"] <= most, path
        seconds = row["median_seconds"]
        assert row["bus_bytes_per_second"] == pytest.approx(model[path] / seconds)
        # nccl-tests' factors at P = 2: 2 (P-1)/P = 1 for the allreduces, 1/2 for the others.
        factor = 1 if path in ("allreduce", "dense") else 2
        algorithm = row["algorithm_bytes_per_second"]
        assert algorithm == pytest.approx(factor * row["bus_bytes_per_second"])


def least_bytes(row: dict[str, Any]) -> float:
    """The model's bytes; for split, that takes masks as spread evenly, a little less."""
    return (0.95 if row.get("path") == "split" else 1.0) * float(row["model_bytes"])


def check_measured_bytes(run: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """What left a process is all of the model's bytes, and little more; of the bare call too."""
    if run["comm"] == "torch":
        assert run["measured_bytes_source"] == "tcp_info"
    elif "measured_bytes_source" not in run:
        pytest.skip(f"not countable on {run['mpi_library']}: {run['measured_bytes_missing']}")
    for row in rows:
        most = 1.05 * row["model_bytes"] + 10_000  # headers, sizes, each library's own
        assert least_bytes(row) <= row["measured_bytes"] <= most, row
        if row["call"] == "allgather":
            assert row["bare_call"].startswith("bare_all")
            assert least_bytes(row) <= row["bare_measured_bytes"] <= most
            assert "bare_counted_bytes_sent" not in row
            assert row["ratio"] > 0
            assert row["sizes_first_ratio"] > 0
            size_bytes = 8 * (run["world_size"] - 1)
            counted = row["sizes_first_counted_bytes_sent"] - row["counted_bytes_sent"]
            assert counted == size_bytes


def test_bytes_past_the_counters_are_not_counted() -> None:
    """Two processes that talk through shared memory, as far as the sockets can tell."""

    class Shared(Communicator):
        world_size = 2

        def allgather(self, buffer: Tensor, counts: object = None) -> list[Tensor]:
            return [buffer, buffer]

    counter = open_counter(Shared())
    assert counter.source is None
    assert "tcp_info saw 0 of 524288 bytes" in counter.reason
    called: list[int] = []
    assert counter.count(lambda: called.append(1), Shared()) is None
    assert called == [1]


@pytest.mark.parametrize(
    ("density", "overlap", "union_rows"),
    [(0.1, 0.0, 80), (0.1, 1.0, 20), (0.1, 0.5, 50), (0.5, 0.0, 40), (1.0, 0.0, 20)],
)
def test_masks_overlap_as_asked(density: float, overlap: float, union_rows: int) -> None:
    """Four clients of 20 rows; where the layout is too small for disjoint masks, all of it."""
    layout = make_layout(
        payload_bytes=20 * 769 * 4, density=density, overlap=overlap, num_clients=4, seed=0
    )
    assert layout.widths.tolist() == [769] * round(20 / density)
    assert layout.part_values == 20 * 769
    masks = torch.stack([header.bits for header in layout.headers])
    assert masks.sum(dim=1).tolist() == [20] * 4
    assert int(masks.any(dim=0).sum()) == union_rows == layout.union_values // 769
    assert int(masks.all(dim=0).sum()) >= round(20 * overlap)


def make_small() -> Any:
    return make_layout(payload_bytes=4e3, density=0.4, overlap=0.3, num_clients=5, seed=3)


def test_the_expected_sum_is_right_row_by_row() -> None:
    layout = make_small()
    uploads = [layout.upload(header) for header in layout.headers]
    assert torch.equal(uploads[2].values, layout.upload(layout.headers[2]).values)
    assert not torch.equal(uploads[2].values, uploads[3].values)
    width = int(layout.widths[0])
    dense = torch.zeros(len(layout.widths), width, dtype=torch.float64)
    for upload in uploads:
        rows = upload.values.double().view(-1, width)
        dense[upload.bits] += upload.num_examples * rows
    found = layout.expected()
    assert torch.equal(found.values, dense[found.union].float().flatten())
    for path in PATHS:
        ours = masked_sum(uploads, layout.widths, Communicator(), path)
        check_sum(ours, expected=found, path=path, codec="fp32")


RANKS = "adapter.client_lora_ranks=[{lora_rank=4, share=0.5}, {lora_rank=2, share=0.5}]"
TINY_RUNS = {"adalora": (), "lora_a2": (RANKS,), "hetlora": (RANKS,), "lora": ()}


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Method -> the folder of a finished run of two rounds."""
    folders = {}
    for name in TINY_RUNS:
        job = make_tiny_job(*tiny_words(name))
        recorder = Recorder(tmp_path_factory.mktemp("runs"), job.config)
        run(job, Communicator(), recorder)
        folders[name] = recorder.run_dir
    return folders


def tiny_words(name: str) -> list[str]:
    return [f"method.name={name}", "federation.num_rounds=2", *TINY_RUNS[name]]


@pytest.mark.parametrize("name", ["adalora", "lora_a2", "hetlora"])
def test_masks_and_sizes_of_a_run_are_those_of_real_uploads(
    name: str, tiny_runs: dict[str, Path]
) -> None:
    job = make_tiny_job(*tiny_words(name))
    state = play_rounds(job)[-1].after
    real = [train_one_client(job, state, client_id) for client_id in draw_cohort(job, 2)]
    layout = run_layout(tiny_runs[name], Communicator(), seed=0)
    assert torch.equal(layout.widths, state.index.row_widths)
    assert len(set(layout.widths.tolist())) > 2  # of A, B and the whole parameters
    assert not layout.held.all()
    for header, held, upload in zip(layout.headers, layout.held, real, strict=True):
        assert header.client_id == upload.client_id
        assert header.num_values == upload.header.num_values == int(layout.widths[held].sum())
        assert torch.equal(header.bits, upload.bits)
        assert header.num_examples == upload.num_examples
        assert header.row_weight == job.method.row_weight(state, upload)
    # By every path the sum is the expected one, and that is what a round's exchange would give.
    uploads = [layout.upload(header) for header in layout.headers]
    found = layout.expected()
    for path in PATHS:
        ours = masked_sum(
            uploads,
            layout.widths,
            Communicator(),
            path,
            held_rows=layout.held_rows,
            first_whole=layout.first_whole,
            average=True,
        )
        check_sum(ours, expected=found, path=path, codec="fp32")
    weights = {header.client_id: header.row_weight for header in layout.headers}
    exchange = MaskedAveraging(
        *(Communicator(), "allgather", state.index, partial(job.method.sent_bits, state)),
        row_weight=lambda upload: weights[upload.client_id],
    )
    for upload in uploads:
        exchange.add(upload)
    exchange.exchange()
    result = exchange.result()
    assert result is not None
    assert torch.equal(result.mean, put_rows(found.values, found.union, layout.widths))


def test_a_run_s_masks_are_timed_by_every_path(tiny_runs: dict[str, Path], tmp_path: Path) -> None:
    folders = f"{tiny_runs['adalora']},{tiny_runs['hetlora']}"
    words = ("-m", "bench", "micro", "collectives", "--runs", folders, *options(iterations=1))
    job = launch("mpi", 2, *words, "--results", tmp_path)
    assert job.code == 0, job.err
    _, rows = read_record(tmp_path)
    assert [(row["method"], row["path"]) for row in rows] == [
        (name, path) for name in ("adalora", "hetlora") for path in PATHS
    ]
    for row in rows:
        assert (row["call"], row["model"], row["num_clients"]) == ("masked_sum", "toy", 5)
        assert row["density"] == pytest.approx(row["part_bytes"] / row["union_bytes"])
        assert 0.3 < row["density"] < 1
        assert row["payload_bytes"] == row["part_bytes"] < row["layout_bytes"]
        assert 0 < row["counted_bytes_received"] < 1.1 * row["model_bytes"] + 1000
    assert {"method", "model", *rows[0]} <= documented("## Micro-benchmarks of the collectives")


def test_a_run_without_masks_is_refused(tiny_runs: dict[str, Path], tmp_path: Path) -> None:
    for folder, said in ((tiny_runs["lora"], "clients of lora send no"), (tmp_path, "run.json")):
        words = ("--runs", folder, "--results", tmp_path / "results")
        job = fedara_here("micro", "collectives", *words)
        assert job.code == 2
        (line,) = job.refusals
        assert said in line
    assert not (tmp_path / "results").exists()


def off_by_a_bit(found: MaskedSum) -> MaskedSum:
    values = found.values.clone()
    values[7] = torch.nextafter(values[7], torch.tensor(float("inf")))
    return replace(found, values=values)


def with_a_nan(found: MaskedSum) -> MaskedSum:
    values = found.values.clone()
    values[-1] = float("nan")
    return replace(found, values=values)


def too_short(found: MaskedSum) -> MaskedSum:
    return replace(found, values=found.values[:-1])


def with_another_mask(found: MaskedSum) -> MaskedSum:
    return replace(found, union=~found.union)


def with_a_lost_client(found: MaskedSum) -> MaskedSum:
    return replace(found, values=found.values * 0.999)


@pytest.mark.parametrize(
    ("corrupt", "path"),
    [
        (off_by_a_bit, "allgather"),
        (off_by_a_bit, "split"),
        (with_a_nan, "allreduce"),
        (with_a_lost_client, "dense"),
        (too_short, "dense"),
        (with_another_mask, "split"),
    ],
)
def test_a_wrong_sum_ends_the_launch(
    corrupt: Callable[[MaskedSum], MaskedSum],
    path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        micro_collectives, "masked_sum", lambda *args, **more: corrupt(masked_sum(*args, **more))
    )
    words = options(paths=path, payload_bytes="2e3")
    with pytest.raises(WrongResult, match=path):
        fedara_here("micro", "collectives", *words, "--results", tmp_path)
    (run_dir,) = tmp_path.iterdir()
    assert not (run_dir / "DONE").exists()


def test_wrong_bytes_are_found() -> None:
    right = [torch.zeros(4, dtype=torch.uint8), torch.ones(4, dtype=torch.uint8)]
    check_buffers([part.clone() for part in right], expected=right)
    with pytest.raises(WrongResult, match="world_rank 1"):
        check_buffers([right[0], right[0]], expected=right)


def test_only_the_last_of_many_calls_may_be_wrong_and_is_found() -> None:
    """Every timed call is checked, and the two sides take turns."""
    order: list[str] = []

    def call(name: str) -> int:
        order.append(name)
        return len(order)

    def check(found: int) -> None:
        if found == 12:
            raise WrongResult("the twelfth")

    settings = Settings(**SMALL | {"runs": (), "iterations": 4})
    calls = {"": lambda: call("ours"), "bare_": lambda: call("bare")}
    with pytest.raises(WrongResult, match="the twelfth"):
        measure(calls, check, settings, Communicator(), WireCounter())
    warm = ["ours", "ours", "bare", "bare"]
    assert order == [*warm, *["bare", "ours", "ours", "bare"] * 2]


def test_long_calls_are_timed_less_often() -> None:
    settings = Settings(**SMALL | {"runs": (), "iterations": 50, "limit_seconds": 1e-9})
    row = measure({"": int}, lambda found: None, settings, Communicator(), WireCounter())
    assert len(row["iteration_seconds"]) == MIN_ITERATIONS


def test_what_does_not_fit_is_named_and_left_out(tmp_path: Path) -> None:
    words = options(max_layout_bytes=3e5, densities="0.25", payload_bytes="2e5", iterations=1)
    job = fedara_here("micro", "collectives", *words, "--results", tmp_path)
    assert "density 0.25, overlap 0, dense: left out, above --max-layout-bytes 300000" in job.out
    _, rows = read_record(tmp_path)
    assert [row.get("path") for row in rows] == [None, "allgather", "split", "allreduce"]


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("payload_bytes", "10k", "numbers from 64"),
        ("payload_bytes", "nan", "numbers from 64"),
        ("densities", "0.5,0", "numbers from 1e-06 to 1"),
        ("overlaps", "", "numbers from 0 to 1"),
        ("paths", "allgather,ring", "allgather, split, allreduce, dense"),
        ("codecs", "zip", "fp32"),
        ("iterations", 0, "1 or more"),
        ("warm_up", 1, "2 or more"),
        ("clients_per_process", -1, "1 or more"),
        ("limit_seconds", "nan", "0.001 or more"),
        ("max_layout_bytes", 0, "1 or more"),
    ],
)
def test_wrong_options_cost_one_line(
    option: str, value: object, allowed: str, tmp_path: Path
) -> None:
    words = options(**{option: value})
    job = fedara_here("micro", "collectives", *words, "--results", tmp_path / "results")
    assert job.code == 2
    (line,) = job.refusals
    assert f"--{option.replace('_', '-')}" in line
    assert allowed in line
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_a_folder_that_can_not_be_made_is_refused_on_every_process(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = ("-m", "bench", "micro", "collectives", *options(), "--results", tmp_path / "file")
    job = launch("mpi", 2, *words)
    assert job.code == 2
    (line,) = job.refusals
    assert "allowed: a folder that can be written to" in line
