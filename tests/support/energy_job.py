"""The real command line on a host whose one counter gives WATTS watts.

energy_job.py KIND ARGS: with KIND "apart" every process has another SLURMD_NODENAME; with
"no-scontrol" the job has an id of Slurm's, and no command of Slurm's.
"""

import os
import sys
import time

from bench import cli
from bench.metering import counters
from bench.metering.counters import Counter

WATTS = 10


def open_clock(*_: object) -> list[Counter]:
    """In place of RAPL: microjoules since the machine started."""
    read = lambda: int(time.monotonic() * 1e6 * WATTS)  # noqa: E731
    return [Counter(part="package", name="package-0", read=read, joules_per_count=1e-6)]


def main() -> None:
    counters.open_rapl = open_clock
    if sys.argv[1] == "apart":
        os.environ["SLURMD_NODENAME"] = f"n{os.environ['PMI_RANK']}"
    if sys.argv[1] == "no-scontrol":
        os.environ |= {"SLURM_JOB_ID": "77", "PATH": os.devnull}
    del sys.argv[1]
    cli.main()


if __name__ == "__main__":
    main()
