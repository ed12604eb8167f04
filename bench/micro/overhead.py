"""`fedara micro overhead`: a round of the suite against a bare PyTorch loop of the same steps."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.config.load import parse_run
from bench.config.schema import RunConfig
from bench.models.encoders import build_model
from bench.run.record import Recorder
from bench.run.rounds import Job, client_batches, draw_cohort, prepare, run
from fedara_core.comm.comm import Communicator
from fedara_core.method import Batch

NUM_CLIENTS, COHORT, LOCAL_STEPS = 20, 5, 5


class _BareLora(nn.Module):
    """LoRA as one would write it in a notebook; nothing of fedara_core."""

    def __init__(self, base: nn.Linear, r: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.A = nn.Parameter(torch.empty(r, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, r))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + functional.linear(functional.linear(x, self.A), self.B) * self.scale


class Pair(NamedTuple):
    """Seconds of one round: the suite's, the bare loop's, and what measuring takes of the first."""

    suite: float
    bare: float
    meter: float


def measure(repeats: int, model: str, max_length: int) -> list[Pair]:
    """Seconds of one LoRA round, evaluation left out, for each repeat.

    Both sides run in this process, turn about, one thread, on the same batches; the suite's side
    includes packing, unpacking, records and the checkpoint.
    """
    torch.set_num_threads(1)
    config = _config(model, max_length)
    communicator = Communicator()
    job = prepare(config, communicator)
    bare_batches = _batches(job)
    _bare_round(config, job, bare_batches[:1])  # warm up allocator and kernels
    pairs = []
    for repeat in range(repeats):
        if repeat % 2:
            bare = _bare_round(config, job, bare_batches)
            suite, meter = _suite_round(job, communicator)
        else:
            suite, meter = _suite_round(job, communicator)
            bare = _bare_round(config, job, bare_batches)
        pairs.append(Pair(suite, bare, meter))
    return pairs


def describe(pairs: list[Pair]) -> str:
    """The figures in one line."""
    ratios = [pair.suite / pair.bare for pair in pairs]
    metering = statistics.median(pair.meter / pair.suite for pair in pairs)
    return (
        f"suite {statistics.median(pair.suite for pair in pairs):.3f} s "
        f"(metering {100 * metering:.2f} % of it), "
        f"bare loop {statistics.median(pair.bare for pair in pairs):.3f} s a round "
        f"({COHORT} clients x {LOCAL_STEPS} steps); ratio: median {statistics.median(ratios):.3f}, "
        f"{min(ratios):.3f} to {max(ratios):.3f} over {len(pairs)} pairs"
    )


def _config(model: str, max_length: int) -> RunConfig:
    return parse_run(
        {
            "method": {"name": "lora"},
            "model": {"name": model, "max_length": max_length},
            "dataset": {"name": "docstrings", "validation_fraction": 0.01},
            "partition": {"scheme": "iid"},
            "federation": {"num_clients": NUM_CLIENTS, "cohort": COHORT, "num_rounds": 1},
            "train": {"local_steps": LOCAL_STEPS, "lr": 1e-3},
            "evaluate": {"split": "validation"},
            "system": {"device": "cpu", "threads": 1},
        }
    )


def _suite_round(job: Job, communicator: Communicator) -> tuple[float, float]:
    """Seconds of the round, and those of its phase "meter"."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run(job, communicator, Recorder(Path(folder), job.config), rows.append)
        seconds = time.perf_counter() - start
    return seconds - rows[0]["seconds"]["evaluate"], rows[0]["seconds"]["meter"]


def _batches(job: Job) -> list[list[Batch]]:
    """Every client's batches of round 0, as the suite draws them."""
    return [list(client_batches(job, 0, client_id)) for client_id in draw_cohort(job, 0)]


def _bare_round(config: RunConfig, job: Job, cohort: list[list[Batch]]) -> float:
    """Seconds to train each client from the same start and to average what they trained."""
    num_classes = job.label_counts.shape[1]
    model = build_model(config.model, num_classes=num_classes, seed=config.seed).model
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "classifier":
            parent, _, child = name.rpartition(".")
            lora = _BareLora(module, config.adapter.lora_rank, 1.0)
            setattr(model.get_submodule(parent), child, lora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start_values = [parameter.detach().clone() for parameter in trained]
    model.train()
    start = time.perf_counter()
    totals = [torch.zeros_like(value) for value in start_values]
    for own_batches in cohort:
        with torch.no_grad():
            for parameter, value in zip(trained, start_values, strict=True):
                parameter.copy_(value)
        optimizer = torch.optim.AdamW(trained, lr=config.train.lr, weight_decay=0.0)
        for batch in own_batches:
            logits = model(batch["input_ids"], batch["attention_mask"])
            functional.cross_entropy(logits, batch["labels"]).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        for total, parameter in zip(totals, trained, strict=True):
            total += parameter.detach() / len(cohort)
    return time.perf_counter() - start
