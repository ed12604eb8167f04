"""`fedara micro step`: one local step of the suite against that of a bare PEFT loop.

A step is forward, backward, clipping and optimiser, on one batch, in one process. The suite's runs
with all levers that make it fast, with each of them off, and with none. All loops take turns on the
same batches, and each turn begins with another one.
"""

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from bench.config.load import parse_run
from bench.config.schema import RunConfig
from bench.config.sections import DatasetConfig
from bench.data.texts import load_dataset
from bench.metering.memory import peak_bytes_above_rest
from bench.micro.peft_loop import build_peft_model, peft_step, require_peft
from bench.micro.record import record_rows
from bench.micro.timing import against_bare_loop
from bench.models.encoders import build_model
from bench.models.source import load_config
from bench.models.tokens import encode
from bench.run.job import adapt
from bench.run.runner import keep_freed_memory, set_threads
from fedara_core.comm.base import Communicator
from fedara_core.errors import InputError
from fedara_core.method import Batch, Client
from fedara_core.seeds import generator
from fedara_core.train import Encoded, LocalTraining, start_client

BENCHMARK = "micro-step"
PRECISIONS = ("fp32", "bf16")
FULL = "full"
BATCH_SIZE, LORA_RANK, LR = 16, 12, 1e-3
_NUM_CLASSES = 20  # of batches of full length
_WARM_UP = 2
_CPU = torch.device("cpu")
# What each lever's key is set to where the lever is off.
OFF: dict[str, Any] = {
    "adapter.fused": False,
    "model.packing": False,
    "model.dropout_masks": "torch",
    "model.attention": "sdpa",
}

_Step = Callable[[Batch], object]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The axes. lengths: "full", batches of max_length tokens a text, or names of data sets, whose
    texts have the lengths that they have. repeats: timed steps of each loop."""

    model: str
    methods: tuple[str, ...]
    precisions: tuple[str, ...]
    lengths: tuple[str, ...]
    max_length: int
    repeats: int


class Batches(NamedTuple):
    """suite: the batches, cut to the longest text of each; padded: the same texts up to max_length,
    as PEFT's loop gets them. token_share: tokens of texts in the padded positions."""

    suite: list[Batch]
    padded: list[Batch]
    num_classes: int
    token_share: float


def run_step(settings: Settings, results: Path, communicator: Communicator) -> None:
    """Measure every combination and record them. Raises InputError."""
    require_peft()
    if settings.model == "toy":
        raise InputError(
            "--model toy: it is none of transformers; allowed: minilm, tiny, a folder or a hub name"
        )
    set_threads(1, communicator)
    keep_freed_memory()  # as in every run of the suite; PEFT's loop gains as much
    # First all that can be refused, so that wrong input leaves no record.
    batches = {name: make_batches(settings, name) for name in settings.lengths}
    for method in settings.methods:
        suite_step(make_config(settings, FULL, method, PRECISIONS[0], {}), _NUM_CLASSES)
    rows = _rows(settings, batches)
    names = tuple(DatasetConfig(name=name).recorded_name for name in settings.lengths)
    recorded = replace(settings, lengths=names)
    record_rows(BENCHMARK, recorded, results, communicator, rows, describe)


def levers() -> dict[str, dict[str, Any]]:
    """The keys that differ from their defaults, by the name of the levers that are left on."""
    each = {f"all but {key}": {key: value} for key, value in OFF.items()}
    return {"all": {}, **each, "none": OFF}


def _rows(settings: Settings, batches: Mapping[str, Batches]) -> Iterator[dict[str, Any]]:
    axes = itertools.product(settings.methods, settings.precisions, batches.items())
    for method, precision, (lengths, own) in axes:
        gc.collect()  # the models of the last combination
        configs = {
            name: make_config(settings, lengths, method, precision, off)
            for name, off in levers().items()
        }
        facts = {
            "method": method,
            "precision": precision,
            "lengths": FULL if lengths == FULL else configs["all"].dataset.short_name,
            "max_length": settings.max_length,
            "batch_size": BATCH_SIZE,
            "lora_rank": LORA_RANK,
            "token_share": float(f"{own.token_share:.6g}"),
        }
        yield from ({**facts, **row} for row in _measure(configs, own))


def _measure(configs: Mapping[str, RunConfig], batches: Batches) -> Iterator[dict[str, Any]]:
    """One object per config: what its loop's steps take, and those of PEFT's loop beside it."""
    num_classes = batches.num_classes
    first = configs["all"]
    built = {name: suite_step(config, num_classes) for name, config in configs.items()}
    peft_model = build_peft_model(first.model, num_classes=num_classes, lora_rank=LORA_RANK)
    bare = peft_step(peft_model, lr=LR, precision=first.train.precision)
    loops = [(bare, batches.padded), *((step, batches.suite) for step, _ in built.values())]
    bare_seconds, *seconds = _take_turns(loops)
    bare_peak, *peaks = (peak_bytes_above_rest(partial(step, own[-1])) for step, own in loops)
    for (name, (_, computes)), own, peak in zip(built.items(), seconds, peaks, strict=True):
        known = {"step_peak_bytes": peak, "bare_loop_step_peak_bytes": bare_peak}
        yield {
            **{"levers": name, **computes, **against_bare_loop(own, bare_seconds)},
            **{key: value for key, value in known.items() if value is not None},
        }


def _take_turns(loops: Sequence[tuple[_Step, Sequence[Batch]]]) -> list[list[float]]:
    """Seconds of each loop's steps but the first ones. In a turn each loop takes one step."""
    seconds: list[list[float]] = [[] for _ in loops]
    for turn in range(len(loops[0][1])):
        for place in range(len(loops)):
            number = (turn + place) % len(loops)  # each turn begins with another loop
            step, batches = loops[number]
            start = time.perf_counter()
            step(batches[turn])
            seconds[number].append(time.perf_counter() - start)
    return [own[_WARM_UP:] for own in seconds]


def suite_step(config: RunConfig, num_classes: int) -> tuple[_Step, dict[str, Any]]:
    """A call that takes the method's local step of the first round on a batch, and how the model
    computes."""
    classifier = build_model(config.model, num_classes=num_classes, seed=config.seed)
    model, method, state = adapt(config, classifier, _CPU)
    client = Client(client_id=0, num_examples=BATCH_SIZE, model=model)
    method.download(model, state, client)
    start_client(client, method, LocalTraining(**config.train.model_dump()), state)
    return partial(method.local_step, client), classifier.facts


def make_config(
    settings: Settings, lengths: str, method: str, precision: str, off: Mapping[str, Any]
) -> RunConfig:
    """One run's config. The head is the model's own, as PEFT's loop has it. Raises InputError."""
    tables: dict[str, dict[str, Any]] = {
        "method": {"name": method},
        "model": {"name": settings.model, "max_length": settings.max_length, "pooling": "model"},
        "adapter": {"lora_rank": LORA_RANK, "lora_alpha": float(LORA_RANK)},
        "dataset": {} if lengths == FULL else {"name": lengths},
        "train": {"local_steps": 1, "lr": LR, "precision": precision},
    }
    for key, value in off.items():
        section, _, name = key.partition(".")
        tables[section][name] = value
    return parse_run(tables)


def make_batches(settings: Settings, lengths: str) -> Batches:
    """A batch for each turn. Raises InputError for a model or data that is not there."""
    config = make_config(settings, lengths, settings.methods[0], PRECISIONS[0], {})
    text_settings = load_config(config.model).get_text_config()
    num_examples = (_WARM_UP + settings.repeats) * BATCH_SIZE
    draw = generator(config.seed, "step")
    if lengths == FULL:
        shape = (num_examples, settings.max_length)
        examples = Encoded(
            input_ids=torch.randint(1, text_settings.vocab_size, shape, generator=draw),
            lengths=torch.full((num_examples,), settings.max_length),
            labels=torch.randint(_NUM_CLASSES, (num_examples,), generator=draw),
        )
        num_classes = _NUM_CLASSES
    else:
        texts = load_dataset(config.dataset)
        examples = encode(config.model, texts.train_texts, texts.train_labels)
        num_classes = len(texts.labels)
    order = torch.randperm(len(examples), generator=draw)
    index = order[torch.arange(num_examples) % len(order)]  # a small set comes round again
    suite = [examples.batch(part, _CPU) for part in torch.split(index, BATCH_SIZE)]
    pad = getattr(text_settings, "pad_token_id", None) or 0
    return Batches(
        suite=suite,
        padded=[_padded(batch, settings.max_length, pad) for batch in suite],
        num_classes=num_classes,
        token_share=float(examples.lengths[index].double().mean()) / settings.max_length,
    )


def _padded(batch: Batch, length: int, pad: int) -> Batch:
    """The batch (n, longest) with its texts padded to (n, length)."""
    more = (0, length - batch["input_ids"].shape[1])
    return {
        **batch,
        "input_ids": functional.pad(batch["input_ids"], more, value=pad),
        "attention_mask": functional.pad(batch["attention_mask"], more),
    }


def describe(row: dict[str, Any]) -> str:
    ratios, memory = row["pair_ratios"], ""
    if "step_peak_bytes" in row:
        peaks = (row["step_peak_bytes"], row["bare_loop_step_peak_bytes"])
        memory = "; peaks {:.0f} and {:.0f} MB".format(*(peak / 1e6 for peak in peaks))
    return (
        f"{row['method']}, {row['precision']}, lengths: {row['lengths']}, levers: {row['levers']}: "
        f"{1e3 * row['median_seconds']:.1f} ms a step, PEFT loop "
        f"{1e3 * row['bare_loop_median_seconds']:.1f} ms; ratio: median "
        f"{row['ratio_to_bare_loop']:.3f}, {min(ratios):.3f} to {max(ratios):.3f} over "
        f"{len(ratios)} turns{memory}"
    )
