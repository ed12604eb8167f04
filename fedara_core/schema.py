"""Names that the writer and the reader of records share. Imports no torch."""

from collections.abc import Sequence

from fedara_core.merge.cost import PATHS

__all__ = [
    "CODECS",
    "DONE_FILE",
    "PARTITION_FILE",
    "PATHS",
    "PHASES",
    "RESULTS_VERSION",
    "ROUNDS_FILE",
    "ROWS_FILE",
    "RUN_FILE",
    "SCHEMA_VERSION",
    "rounds_fault",
]

SCHEMA_VERSION = 1
# Of what a run computes. It grows with every change of results beyond rounding that is not one
# method's own (`Method.version`); runs of unlike versions are never taken for each other.
RESULTS_VERSION = 2

# A run's folder holds the first three; a micro-benchmark's holds RUN_FILE and ROWS_FILE. DONE_FILE
# is empty and is written last: a record without it is incomplete.
RUN_FILE = "run.json"
ROUNDS_FILE = "rounds.jsonl"
PARTITION_FILE = "partition.json"
ROWS_FILE = "rows.jsonl"
DONE_FILE = "DONE"

# Of a round, in the order in which they run.
PHASES = (
    *("download", "local_train", "pack", "wait", "exchange"),
    *("aggregate", "evaluate", "checkpoint", "meter"),
)

# A message's header holds the codec as its place here.
CODECS = ("fp32", "bf16", "fp16", "int8", "int4")


def rounds_fault(round_indices: Sequence[object], num_rounds: int) -> str:
    """What is wrong with the rounds of a record that should have so many; "" if nothing is. One
    round is on each line."""
    for place, found in enumerate(round_indices):
        if found != place or place >= num_rounds:
            allowed = f"0 to {num_rounds - 1}, each once and in order"
            return f"{ROUNDS_FILE}:{place + 1}: round_index = {found}; allowed: {allowed}"
    if len(round_indices) < num_rounds:
        return f"{ROUNDS_FILE}: holds {len(round_indices)} of {num_rounds} rounds"
    return ""
