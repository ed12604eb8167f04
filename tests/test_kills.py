"""kill -9 of any process at 20 random moments: nothing that was finished is lost or doubled."""

import json
from pathlib import Path

import pytest

from support.launch import TINY, Launched, digests_in, fedara_here

pytestmark = [pytest.mark.xdist_group("jobs"), pytest.mark.slow]

KILL_JOB = Path(__file__).parent / "support" / "kill_job.py"
KILLS = 20
SEED = 7
NUM_ROUNDS = 12
CONFIG = (
    *("run", TINY, "--set", f"federation.num_rounds={NUM_ROUNDS}"),
    *("--set", "train.local_steps=1", "--set", "method.name=fedsa_lora"),  # clients keep tensors
)


def test_a_job_killed_at_any_moment_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    assert fedara_here(*CONFIG, "--results", tmp_path / "whole").code == 0
    expected = digests_in(tmp_path / "whole")
    words = (KILL_JOB, tmp_path / "killed", SEED, KILLS, *CONFIG)
    job = Launched("plain", 1, *words).wait(limit_seconds=400)
    assert job.code == 0, job.out + job.err
    kills = [json.loads(line) for line in job.out.splitlines() if line.startswith("{")]
    assert len(kills) == KILLS
    assert {kill["world_rank"] for kill in kills} == {0, 1}
    assert {"local_train", "exchange", "checkpoint"} <= {kill["phase"] for kill in kills}
    finished: dict[str, int] = {}  # folder -> rounds on disk
    for kill in kills:
        digests = kill["digests"]
        assert digests == expected[: len(digests)]
        # A round of which the record was written and the checkpoint not yet runs again.
        assert len(digests) >= finished.get(kill["folder"], 0) - 1
        finished[kill["folder"]] = len(digests)
    for folder in (tmp_path / "killed").iterdir():
        assert fedara_here(*CONFIG, "--results", folder).code == 0
        assert digests_in(folder) == expected
