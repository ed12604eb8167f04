"""The real command line with a fault in one process.

fault_job.py KIND WORLD_RANK STAMP RESULTS ARGS: KIND is raise or sigkill; the
fault comes in round 1, and STAMP gets the time of it.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from bench import cli, rounds


def main() -> None:
    kind, faulty_rank = sys.argv[1], int(sys.argv[2])
    stamp, results = Path(sys.argv[3]), Path(sys.argv[4])
    sys.argv[1:] = sys.argv[5:]
    start_client = rounds.start_client
    one_round = rounds.one_round
    world_ranks: list[int] = []

    def note_world_rank(job: Any, state: Any, communicator: Any, meter: Any) -> Any:
        world_ranks.append(communicator.world_rank)
        return one_round(job, state, communicator, meter)

    def faulty(client: Any, method: Any, training: Any, state: Any) -> None:
        if state.round_index == 1 and world_ranks[-1] == faulty_rank:
            # Round 0 is on disk once it has a checkpoint; world_rank 0 may be behind this one.
            while not list(results.glob("*/checkpoint.safetensors")):
                time.sleep(0.01)
            stamp.write_text(repr(time.time()))
            if kind == "sigkill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("injected")
        start_client(client, method, training, state)

    rounds.one_round = note_world_rank
    rounds.start_client = faulty
    cli.main()


if __name__ == "__main__":
    main()
