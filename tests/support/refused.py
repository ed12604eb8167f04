"""Commands whose input is refused, and a small set of good data to damage."""

import json
from pathlib import Path

from support.launch import Finished, fedara_here


def sets(overrides: list[str]) -> list[str]:
    return [word for text in overrides for word in ("--set", text)]


def check_refused(job: Finished, words: list[str]) -> None:
    assert job.code == 2, job.err
    assert len(job.refusals) == 1, job.err
    assert "Traceback" not in job.err
    missing = [word for word in words if word not in job.refusals[0]]
    assert not missing, (missing, job.refusals[0])


def refuse_here(config: Path, results: Path, words: list[str], *args: str) -> None:
    """In one process stderr holds the one line and nothing else."""
    job = fedara_here("run", config, "--results", results, *args)
    check_refused(job, words)
    assert job.err == job.refusals[0] + "\n"
    assert not list(results.glob("*/DONE"))


def write_data(folder: Path, **changes: str) -> str:
    """A good data set of jsonl files, but for the changed files; its dataset.name."""
    rows = [json.dumps({"text": f"word{i} word", "label": ["a", "b"][i % 2]}) for i in range(40)]
    files = {
        "train.jsonl": "\n".join(rows),
        "test.jsonl": "\n".join(rows[:10]),
        "labels.json": '["a", "b"]',
    }
    for name, text in {**files, **{k.replace("_", "."): v for k, v in changes.items()}}.items():
        (folder / name).write_text(text)
    return f"dataset.name=file:{folder}"
