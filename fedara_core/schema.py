"""Names that the writer and the reader of records share. Imports no torch."""

from fedara_core.merge.cost import PATHS

__all__ = [
    "CODECS",
    "DONE_FILE",
    "PARTITION_FILE",
    "PATHS",
    "PHASES",
    "ROUNDS_FILE",
    "ROWS_FILE",
    "RUN_FILE",
    "SCHEMA_VERSION",
]

SCHEMA_VERSION = 1

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
