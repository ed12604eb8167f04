"""A job of several points: threads, a diverging point, and data that changed before a resume."""

from pathlib import Path

import pytest

from bench.config.load import load_runs
from bench.data import cache
from bench.run.job import prepare
from bench.run.record import Recorder
from bench.run.rounds import run
from bench.run.runner import _num_threads, run_all, set_threads
from fedara_core.comm.base import Communicator
from fedara_core.errors import Diverged, InputError

TINY = Path(__file__).parents[2] / "tiny.toml"


def test_a_diverging_point_does_not_stop_the_others(tmp_path: Path) -> None:
    config = tmp_path / "sweep.toml"
    sweep = 'points = [{ train = { optimizer = "sgd", lr = 1e30 } }, {}]'
    config.write_text(f"{TINY.read_text()}\n[sweep]\n{sweep}\n")
    diverging, sound = load_runs(config, [])
    with pytest.raises(Diverged, match="client"):
        run_all(config, tmp_path, [], Communicator())
    assert not Recorder(tmp_path, diverging).done
    assert Recorder(tmp_path, sound).done


def test_a_run_does_not_go_on_with_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (config,) = load_runs(TINY, [])
    recorder = Recorder(tmp_path, config)
    rows = []

    def stop_after_two(row: dict[str, object]) -> None:
        rows.append(row)
        if len(rows) == 2:
            raise KeyboardInterrupt

    job = prepare(config, Communicator())
    with pytest.raises(KeyboardInterrupt):
        run(job, Communicator(), recorder, stop_after_two)
    monkeypatch.setenv(cache.FOLDER_KEY, str(tmp_path / "cache"))
    monkeypatch.setattr("bench.data.texts.TextDataset.digest", "0123")
    with pytest.raises(InputError, match=r'dataset_digest is .* and "0123" here'):
        run(prepare(config, Communicator()), Communicator(), recorder)
    assert len(recorder.rounds()) == 2


@pytest.mark.parametrize(
    ("wanted", "host_size", "environ", "threads"),
    [
        (3, 2, {"OMP_NUM_THREADS": "8"}, 3),
        ("auto", 2, {"OMP_NUM_THREADS": "8", "SLURM_CPUS_PER_TASK": "4"}, 8),
        ("auto", 2, {"SLURM_CPUS_PER_TASK": "4"}, 4),
        ("auto", 10_000, {}, 1),
    ],
)
def test_threads(wanted: int | str, host_size: int, environ: dict[str, str], threads: int) -> None:
    assert _num_threads(wanted, host_size, environ) == threads


def test_every_process_takes_the_smallest_share(monkeypatch: pytest.MonkeyPatch) -> None:
    class Uneven(Communicator):
        def gather_bytes(self, data: bytes) -> list[bytes]:
            return [data, b"2"]

    chosen = []
    monkeypatch.setattr("torch.set_num_threads", chosen.append)
    set_threads(5, Uneven())
    assert chosen == [2]
