"""Synthetic records of runs and launches, and one row of a table of them."""

import json
import zlib
from pathlib import Path
from typing import Any

import pandas as pd

# Bytes up per round; down are twice that.
UPLINK = {"lora": [1000, 1000, 1000], "fedara": [1000, 600, 200], "head_only": [10, 10, 10]}


def write_record(
    folder: Path,
    method: str,
    seed: int,
    /,
    *,
    alpha: float = 0.1,
    lr: float = 0.001,
    done: bool = True,
    **sections: Any,
) -> Path:
    """Write one synthetic record of three rounds, evaluated in rounds 0 and 2; sections: more of
    its config."""
    run_id = "-".join(["synthetic", method, f"seed{seed}", str(alpha), str(lr), *sections])
    run = folder / run_id
    run.mkdir(parents=True)
    config = {
        "seed": seed,
        "method": {"name": method},
        "adapter": {"lora_rank": 4, "lora_alpha": 4.0, "targets": "all-linear"},
        "model": {"name": "tiny", "pooling": "mean", "max_length": 16, "dropout": None},
        "dataset": {"name": "synthetic"},
        "partition": {"scheme": "dirichlet", "alpha": alpha},
        "federation": {"num_clients": 4, "cohort": 2, "num_rounds": 3},
        "train": {"lr": lr, "local_steps": 5, "local_epochs": None},
        "evaluate": {"every": 2, "split": "test", "eval_examples": None},
        "system": {"device": "cpu", "threads": 1},
        **sections,
    }
    pid = zlib.crc32(run_id.encode())  # every run has a process of its own
    (run / "run.json").write_text(
        json.dumps(
            {
                "schema_version": 1,
                "run_id": run_id,
                "config": config,
                "git_commit": "0123456789abcdef",
                "git_dirty": False,
                "comm": "serial",
                "world_size": 1,
                "processes": [
                    {"world_rank": 0, "host": "h", "pid": pid, "threads": 1, "device": "cpu"}
                ],
                "cpu": "a CPU",
                "total_seconds": 10.0 + seed,
            }
        )
    )
    lines = [json.dumps(synthetic_round(method, seed, index)) for index in range(3)]
    (run / "rounds.jsonl").write_text("\n".join(lines) + "\n")
    if done:
        (run / "DONE").touch()
    return run


def synthetic_round(method: str, seed: int, round_index: int) -> dict[str, Any]:
    uplink = UPLINK[method][round_index]
    record: dict[str, Any] = {
        "round_index": round_index,
        "cohort": [0, 1],
        "train_loss": 1.0,
        "uplink_bytes": uplink,
        "downlink_bytes": 2 * uplink,
        "live_triplets": 40 - 10 * round_index,
        "live_triplets_by_adapter": {"a": 1},
        "seconds": {"local_train": 2.0 - 0.5 * round_index, "total": 3.0},
    }
    if round_index != 1:
        record |= {"accuracy": 0.5 + 0.1 * round_index + 0.02 * seed, "macro_f1": 0.4}
    return record


def row_of(frame: pd.DataFrame, **values: Any) -> pd.Series:
    for column, value in values.items():
        frame = frame[frame[column] == value]
    assert len(frame) == 1
    return frame.iloc[0]


def add_energy(run: Path, *, counted: bool) -> None:
    """Give a record codecarbon's energy of the run, and maybe counters' of its rounds."""
    facts = json.loads((run / "run.json").read_text())
    modelled = {
        "energy_joules": {"cpu": 30.0, "ram": 10.0},
        "energy_source": "codecarbon-load-model",
    }
    (run / "run.json").write_text(json.dumps(facts | modelled))
    if not counted:
        return
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    joules = {"energy_joules": {"local_train": 5.0, "total": 7.0}, "energy_source": "rapl"}
    text = "".join(json.dumps(line | joules) + "\n" for line in lines)
    (run / "rounds.jsonl").write_text(text)


def make_launch(
    folder: Path, benchmark: str, number: int, *rows: dict[str, Any], **facts: Any
) -> None:
    """Write a launch of these rows on two processes; facts: more of its run.json."""
    comm = facts.get("comm", "mpi")
    run_id = f"micro-{benchmark}-{comm}-p2-{number}"
    (folder / run_id).mkdir(parents=True)
    run = {
        "schema_version": 1,
        "benchmark": f"micro-{benchmark}",
        "run_id": run_id,
        "config": {"model": "minilm"},
        "comm": comm,
        "mpi_library": "MPICH Version: 5",
        "world_size": 2,
        "cpu": "some CPU",
        "num_cores": 2,
        "processes": [{"host": "a"}],
    }
    (folder / run_id / "run.json").write_text(json.dumps(run | facts))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / run_id / "rows.jsonl").write_text(lines)
    (folder / run_id / "DONE").touch()


def overhead_row(seconds: float, ratio: float) -> dict[str, Any]:
    return {
        **{"method": "lora", "num_clients": 5, "local_steps": 5, "max_length": 64},
        **{"median_seconds": seconds, "bare_loop_median_seconds": seconds / ratio},
        **{"ratio_to_bare_loop": ratio, "meter_share": 0.0012},
    }


def step_row(seconds: float, ratio: float, **more: Any) -> dict[str, Any]:
    row = {
        **{"method": "lora", "precision": "fp32", "lengths": "full", "max_length": 64},
        **{"batch_size": 16, "lora_rank": 12, "token_share": 1.0, "levers": "all"},
        **{"attention": "eager", "packed": True},
        **{"median_seconds": seconds, "bare_loop_median_seconds": seconds / ratio},
        **{"ratio_to_bare_loop": ratio, "step_peak_bytes": 3e8},
    }
    return row | more


def prepare_row(cache: str, seconds: float) -> dict[str, Any]:
    """Without memory, as where the platform does not tell."""
    return {
        **{"cache": cache, "dataset": "docstrings", "max_length": 64, "load_seconds": 2.0},
        **{"prepare_seconds": seconds, "cpu_seconds": 2 * seconds},
    }
