"""What each key of a record must be, where it is read; results/README.md says what it means.

A shape is a Kind, a dict of shapes by key ("*": any other key), or a list with the shape of its
entries. Keys without a shape may be anything.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedara_core.errors import InputError

LARGEST = 10**30  # FLOPs of any run; sums of such numbers are finite
_VALUE_LETTERS = 40


@dataclass(frozen=True)
class Kind:
    """allowed: in words. fits: whether a value is of this kind."""

    allowed: str
    fits: Callable[[Any], bool]


Shape = Kind | dict[str, Any] | list[Any]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


TEXT = Kind("text", lambda value: isinstance(value, str) and value != "")
WORDS = Kind("text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
NUMBER = Kind("a number", _is_number)
AMOUNT = Kind("a number, 0 or above", lambda value: _is_number(value) and value >= 0)
POSITIVE = Kind("a number above 0", lambda value: _is_number(value) and value > 0)
SHARE = Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
INTEGER = Kind("an integer", _is_whole)
INDEX = Kind("an integer, 0 or above", lambda value: _is_whole(value) and value >= 0)
COUNT = Kind("an integer, 1 or above", lambda value: _is_whole(value) and value >= 1)
# A legend leaves out what begins with "_", and no method's file does.
METHOD = Kind(
    "the name of a method",
    lambda value: isinstance(value, str) and value.isidentifier() and not value.startswith("_"),
)


def optional(kind: Kind) -> Kind:
    """Also null, which in a config is a setting that was left unset."""
    return Kind(f"{kind.allowed}, or null", lambda value: value is None or kind.fits(value))


_MACHINE: dict[str, Shape] = {
    "run_id": TEXT,
    "git_commit": WORDS,
    "git_dirty": FLAG,
    "cpu": WORDS,
    "num_cores": COUNT,
    "comm": TEXT,
    "world_size": COUNT,
    "mpi_library": WORDS,
    "torch_library": WORDS,
    "processes": [{"host": WORDS, "pid": INTEGER, "threads": COUNT, "device": WORDS}],
}

RUN: dict[str, Shape] = {
    **_MACHINE,
    "config": {
        "seed": INTEGER,
        "method": {"name": METHOD},
        "dataset": {"name": TEXT},
        "partition": {
            "scheme": TEXT,
            "alpha": optional(POSITIVE),
            "labels_per_client": optional(COUNT),
        },
        "federation": {"num_rounds": COUNT, "cohort": COUNT},
        "clients": {
            "dropout": SHARE,
            "over_selection": AMOUNT,
            "speed_spread": AMOUNT,
            "deadline_seconds": optional(AMOUNT),
        },
        "devices": {"shares": {"*": NUMBER}},
    },
    "dataset_digest": WORDS,
    "results_version": COUNT,
    "method_version": COUNT,
    "python": WORDS,
    "package_versions": {"*": WORDS},
    "gpu": WORDS,
    "total_seconds": AMOUNT,
    "energy_joules": {"*": NUMBER},
    "energy_source": TEXT,
    "labels": [WORDS],
    "config_hash": TEXT,
    "prepare_seconds": AMOUNT,
    "co2_grams": NUMBER,
    "device_profiles": {"*": {}},
    "parts": [{"world_size": COUNT}],
    "energy_parts": [{"energy_joules": {"*": NUMBER}, "energy_source": TEXT, "co2_grams": NUMBER}],
}
# Keys of run.json, nested ones joined by a dot, without which no figure knows where a run belongs.
REQUIRED_IN_RUN = [
    *("run_id", "config.seed", "config.method.name", "config.dataset.name"),
    *("config.partition.scheme", "config.federation.num_rounds"),
]

ROUND: dict[str, Shape] = {
    "round_index": INDEX,
    "uplink_bytes": AMOUNT,
    "downlink_bytes": AMOUNT,
    **dict.fromkeys(("accuracy", "macro_f1", "client_accuracy_mean"), SHARE),
    **dict.fromkeys(("client_accuracy_std", "client_accuracy_p10"), SHARE),
    **dict.fromkeys(("train_loss", "test_loss"), NUMBER),
    **dict.fromkeys(("live_triplets", "live_adapters", "num_backward_layers"), AMOUNT),
    **dict.fromkeys(("flops", "adapter_bytes", "optimizer_bytes"), AMOUNT),
    **dict.fromkeys(("peak_memory_bytes", "peak_device_memory_bytes"), AMOUNT),
    **dict.fromkeys(("state_digest", "energy_source", "merge_path"), TEXT),
    "live_triplets_by_adapter": {"*": AMOUNT},
    "seconds": {"*": AMOUNT},
    "energy_joules": {"*": NUMBER},
    "energy_net_joules": {"*": NUMBER},
    "peak_memory_bytes_by_phase": {"*": AMOUNT},
    "peak_device_memory_bytes_by_phase": {"*": AMOUNT},
    "modelled_by_device": {"*": {"*": NUMBER}},
}
REQUIRED_IN_ROUND = ["round_index", "uplink_bytes", "downlink_bytes"]

PARTITION: list[Shape] = [{"client_id": INDEX, "label_counts": {"*": INDEX}}]

LAUNCH: dict[str, Shape] = {
    **_MACHINE,
    "benchmark": TEXT,
    "config": {"model": TEXT},
    "measured_bytes_source": WORDS,
    "transport_environment": {"*": WORDS},
}
REQUIRED_IN_LAUNCH = ["run_id", "benchmark", "comm", "world_size", "num_cores"]

_SECONDS = ("median_seconds", "min_seconds", "p95_seconds", "bare_median_seconds")
_BARE = ("bare_loop_median_seconds", "bare_messages_median_seconds")
_SIZES = ("payload_bytes", "part_bytes", "layout_bytes", "union_bytes")
ROW: dict[str, Shape] = {
    "scaling": Kind("strong or weak", lambda value: value in ("strong", "weak")),
    **dict.fromkeys(("method", "call", "path", "codec", "bare_call"), TEXT),
    **dict.fromkeys(("precision", "lengths", "levers", "attention"), TEXT),
    **dict.fromkeys(("cohort", "num_clients", "local_steps", "max_length"), COUNT),
    **dict.fromkeys(("batch_size", "lora_rank"), COUNT),
    **dict.fromkeys((*_SECONDS, *_BARE, "bare_allgather_median_seconds"), POSITIVE),
    **dict.fromkeys(("ratio", "sizes_first_ratio"), POSITIVE),
    **dict.fromkeys(("ratio_to_bare_loop", "ratio_to_bare_messages"), POSITIVE),
    **dict.fromkeys((*_SIZES, "density", "messages_per_second"), POSITIVE),
    **dict.fromkeys(("num_rows", "counted_bytes_received", "model_bytes"), AMOUNT),
    **dict.fromkeys(("measured_bytes", "peak_memory_bytes", "meter_share"), AMOUNT),
    **dict.fromkeys(("step_peak_bytes", "bare_loop_step_peak_bytes"), AMOUNT),
    "uplink_bytes_per_client": AMOUNT,
    **dict.fromkeys(("overlap", "token_share"), SHARE),
    "packed": FLAG,
    "phase_seconds": {"*": AMOUNT},
}


def require_shape(value: Any, shape: Shape, place: str, name: str = "") -> None:
    """Raises InputError, which begins with `place`, unless the value has the shape."""
    if isinstance(shape, Kind):
        if not shape.fits(value):
            raise InputError(f"{place}: {name} = {_text(value)}; allowed: {shape.allowed}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise InputError(f"{place}: {name} = {_text(value)}; allowed: a JSON list")
        for index, entry in enumerate(value):
            require_shape(entry, shape[0], place, f"{name}[{index}]")
    else:
        if not isinstance(value, dict):
            raise InputError(f"{place}: {name} = {_text(value)}; allowed: a JSON object")
        for key, part in value.items():
            inner = shape.get(key, shape.get("*"))
            if inner is not None:
                require_shape(part, inner, place, f"{name}.{key}" if name else key)


def require_keys(row: dict[str, Any], keys: list[str], place: str) -> None:
    """Raises InputError unless all keys are there; those of nested objects are joined by a dot."""
    if missing := [key for key in keys if not _has(row, key)]:
        raise InputError(f"{place}: missing {', '.join(missing)}; allowed: a whole record")


def _has(row: Any, key: str) -> bool:
    first, _, rest = key.partition(".")
    if not isinstance(row, dict) or first not in row:
        return False
    return not rest or _has(row[first], rest)


def _text(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _VALUE_LETTERS else f"{text[:_VALUE_LETTERS]}..."
