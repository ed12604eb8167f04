"""THE round loop: one straight line from a config to records."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.config.schema import DatasetConfig, RunConfig, make_method
from bench.data.partition import draw_client_lora_ranks, label_counts, partition, summary
from bench.data.texts import TextDataset, holdout, load_dataset
from bench.metering.client_cost import (
    ClientCost,
    ClientCounter,
    model_devices,
    profiles,
    reduce_clients,
)
from bench.metering.codecarbon import HostEnergy, add_hosts, no_energy
from bench.metering.devices import Device, check_names, deal, load_devices
from bench.metering.memory import proportional_bytes
from bench.metering.meter import Measured, Meter
from bench.metering.reduce import reduce_energy, reduce_memory, reduce_seconds
from bench.models.encoders import build_model, encode
from bench.run import checkpoint
from bench.run.arrivals import Arrivals, Fleet, make_fleet
from bench.run.evaluate import Judge
from bench.run.provenance import library_fact, process_facts, provenance
from bench.run.record import Recorder
from bench.run.stop import Asked
from fedara_core.adapters import AdapterConfig, inject
from fedara_core.codec import (
    ROW_VALUES,
    decode_rows,
    encode_rows,
    message_widths,
    payload_bytes,
)
from fedara_core.comm.comm import Communicator, together
from fedara_core.errors import Diverged, InputError, Interrupted, JobError
from fedara_core.merge.collectives import RunningMean
from fedara_core.merge.cost import cheapest
from fedara_core.method import (
    Batch,
    Client,
    Method,
    ServerState,
    join_values,
    num_values,
    split_values,
)
from fedara_core.seeds import generator
from fedara_core.train import Encoded, LocalTraining, batches, start_client
from fedara_core.wire import Upload, code, pack, unpack

Report = Callable[[dict[str, Any]], None]
Notice = Callable[[str], None]

HELD_VALUES = 1 << 26  # a process trains and sends clients with so many values in all at a time
_TRAFFIC = {  # record key -> field of the communicator's traffic
    "wire_bytes_sent": "sent",
    "wire_bytes_received": "received",
    "network_bytes_sent": "network_sent",
    "network_bytes_received": "network_received",
}
_SUMMED = ("downlink_bytes", "late_uplink_bytes", *_TRAFFIC)
_RESIDUAL = "codec_residual"  # what a codec's rounding has left out so far


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a run needs, the same on every process."""

    config: RunConfig
    model: nn.Module
    method: Method
    state: ServerState
    fleet: Fleet
    training: LocalTraining
    train: Encoded
    evaluated: Encoded
    shards: Sequence[np.ndarray]  # client_id -> indices into train
    label_counts: np.ndarray  # (num_clients, num_classes)
    partition_summary: list[dict[str, Any]]
    dataset_digest: str
    labels: Sequence[str]
    device: torch.device
    kept: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # of this process's clients
    counter: ClientCounter | None = None
    devices: dict[str, Device] = field(default_factory=dict)  # to model each round on
    prepare_seconds: float = 0.0  # of this process

    @property
    def keeps(self) -> bool:
        """Whether clients keep tensors between rounds, so that each stays on one process."""
        codec = self.config.codec
        return self.method.stateful or (codec.error_feedback and codec.up != "fp32")


def prepare(config: RunConfig, communicator: Communicator) -> Job:
    """Load, split, tokenise, partition, and build model and first state. Raises InputError."""
    start = perf_counter()
    device = choose_device(config.system.device, communicator)
    devices, dealt_devices = _choose_devices(config)
    fleet = make_fleet(config, devices, dealt_devices)
    dataset = load_texts(config.dataset)
    num_classes = len(dataset.labels)
    train_index, validation_index = holdout(
        dataset, config.dataset.validation_fraction, config.seed
    )
    texts, labels = dataset.train_texts, dataset.train_labels
    shards = partition(
        labels[train_index],
        config.partition,
        num_clients=config.federation.num_clients,
        num_classes=num_classes,
        seed=config.seed,
    )
    if config.evaluate.split == "validation" and not len(validation_index):
        raise InputError(
            "evaluate.split = 'validation' needs dataset.validation_fraction above 0, not "
            f"{config.dataset.validation_fraction}"
        )
    evaluated_texts, evaluated_labels = dataset.test_texts, dataset.test_labels
    if config.evaluate.split == "validation":
        evaluated_texts = [texts[i] for i in validation_index]
        evaluated_labels = labels[validation_index]
    model, method, state = build(config, num_classes=num_classes, device=device)
    client_lora_ranks = state.adapter.client_lora_ranks
    counter = ClientCounter(model)
    if config.clients.timed and not counter.counts_flops:
        raise InputError(
            f"model.name = {config.model.name!r}: its FLOPs can not be counted, and modelled time "
            "needs them; allowed: clients.deadline_seconds = 'none', clients.over_selection = 1.0"
        )
    partition_summary = summary(labels[train_index], shards, dataset.labels, client_lora_ranks)
    job = Job(
        config=config,
        model=model,
        method=method,
        state=state,
        fleet=fleet,
        labels=dataset.labels,
        training=LocalTraining(**config.train.model_dump()),
        train=encode(config.model, [texts[i] for i in train_index], labels[train_index]),
        evaluated=encode(config.model, evaluated_texts, evaluated_labels),
        shards=shards,
        label_counts=label_counts(labels[train_index], shards, num_classes),
        partition_summary=[entry | fleet.facts(entry["client_id"]) for entry in partition_summary],
        dataset_digest=dataset.digest,
        device=device,
        counter=counter,
        devices=devices,
    )
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return replace(job, prepare_seconds=perf_counter() - start)


def build(
    config: RunConfig, *, num_classes: int, device: torch.device
) -> tuple[nn.Module, Method, ServerState]:
    """The model with its adapters, the method, and the state before round 0. Raises InputError."""
    classifier = build_model(config.model, num_classes=num_classes, seed=config.seed)
    inject(classifier.model, config.adapter.targets, classifier.head)
    model = classifier.model.to(device)
    adapter = AdapterConfig.of(
        model,
        lora_rank=config.adapter.lora_rank,
        lora_alpha=config.adapter.lora_alpha,
        client_lora_ranks=draw_client_lora_ranks(
            config.adapter, num_clients=config.federation.num_clients, seed=config.seed
        ),
    )
    method = make_method(config.method)
    num_rounds = config.federation.num_rounds
    return model, method, method.init(model, adapter, seed=config.seed, num_rounds=num_rounds)


def run(
    job: Job,
    communicator: Communicator,
    recorder: Recorder,
    report: Report = lambda row: None,
    energy: HostEnergy | None = None,
    asked: Asked | None = None,
    notice: Notice = lambda text: None,
) -> ServerState:
    """Run every round that is not yet on disk; records and checkpoints as it goes.

    Returns the last state. `report` gets each round's record and `notice` what else there is to
    say, on world_rank 0. Without `energy` none is measured. Raises Diverged if a loss stops being
    finite (the run then stays incomplete), Interrupted after the round in which a process was
    `asked` to end, InputError if the checkpoint on disk is damaged or of another run, and JobError
    where the disk takes no more.
    """
    energy, asked = energy or no_energy("not asked for"), asked or Asked()
    state, kept = _resume_or_start(job, communicator, recorder, energy, notice)
    first_round_index = state.round_index
    energy.run.start()
    communicator.barrier()  # so that nobody's round 0 waits for a sampler to start
    interrupted = None
    try:
        state = _rounds(job, state, kept, communicator, recorder, report, energy, asked)
    except Interrupted as error:
        interrupted = error
    except BaseException:
        # The others may be gone, so that only what one process knows can still be recorded.
        part = energy.run.stop()
        if communicator.world_rank == 0 and energy.num_hosts == 1:
            with suppress(OSError):  # a full disk is said already
                recorder.end_part(first_round_index, part)
        raise
    part, facts = _ending(energy, communicator)
    if communicator.world_rank == 0:
        with _storing(recorder, state.round_index):
            recorder.end_part(first_round_index, part)
            if interrupted is None:
                recorder.finish(facts)
    communicator.barrier()
    if interrupted is not None:
        raise interrupted
    return state


def _rounds(
    job: Job,
    state: ServerState,
    kept: checkpoint.Kept,
    communicator: Communicator,
    recorder: Recorder,
    report: Report,
    energy: HostEnergy,
    asked: Asked,
) -> ServerState:
    """The rounds from `state` on. What follows a round counts in the next round's record."""
    belongs_to = identity(job.config, job.dataset_digest, profiles(job.devices))
    meter = Meter(job.device, counters=energy.counters, idle_watts=energy.idle_watts)
    while state.round_index < state.num_rounds:
        state, row = one_round(job, state, communicator, meter)
        with meter.phase("wait"):
            communicator.barrier()
        measured = meter.take()
        with meter.phase("meter"):
            row = _reduce(job, row, measured, communicator)
            signal_name = asked.agree(communicator)
        with meter.phase("checkpoint"):
            kept |= _gather_kept(job, row["cohort"], communicator)
            last = state.round_index == state.num_rounds
            due = last or signal_name or state.round_index % job.config.system.checkpoint_every == 0
            if communicator.world_rank == 0:
                with _storing(recorder, state.round_index - 1):
                    recorder.add_round(row)
                    if due:
                        checkpoint.save_checkpoint(recorder.run_dir, state, kept, belongs_to)
                report(row)
        if signal_name and not last:
            raise Interrupted(
                f"interrupted after round {state.round_index} of {state.num_rounds} by "
                f"{signal_name}; start again to go on"
            )
    return state


def identity(
    config: RunConfig, dataset_digest: str, device_profiles: Mapping[str, Any]
) -> dict[str, Any]:
    """What a checkpoint belongs to: another one's would change the result."""
    found = {"config": config.result_settings(), "dataset_digest": dataset_digest}
    if config.clients.timed:
        found |= {f"device {name}": device_profiles[name] for name in config.devices.shares}
    return found


@contextmanager
def _storing(recorder: Recorder, num_rounds: int) -> Iterator[None]:
    """Say in one line what the disk refused, and how many rounds are safe."""
    try:
        yield
    except OSError as error:
        raise JobError(
            f"{recorder.run_dir}: {error.strerror}; rounds 1 to {num_rounds} are on disk; make "
            "room there and start again to go on"
        ) from error


def _ending(
    energy: HostEnergy, communicator: Communicator
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What codecarbon says of all hosts, and the keys of run.json that only the end knows."""
    run = energy.run
    mine = json.dumps([run.stop(), run.samples, run.missing, proportional_bytes()]).encode()
    results, samples, reasons, shares = zip(
        *(json.loads(part) for part in communicator.gather_bytes(mine)), strict=True
    )
    hosts = [result for result, sampled in zip(results, samples, strict=True) if sampled]
    total = add_hosts(hosts) if hosts else {}
    facts = {} if None in shares else {"pss_bytes_by_process": shares}
    if not total:
        sources = dict.fromkeys(str(host.get("energy_source")) for host in hosts)
        reason = next(filter(None, reasons), "")
        facts["energy_missing"] = reason or f"hosts differ in their source: {', '.join(sources)}"
    return total, facts


def one_round(
    job: Job, state: ServerState, communicator: Communicator, meter: Meter
) -> tuple[ServerState, dict[str, Any]]:
    """One federated round: the next state, and this process's part of the round's record."""
    next_state, row = advance(job, state, communicator, meter)
    with meter.phase("aggregate"):
        row["state_digest"] = next_state.digest()
    with meter.phase("evaluate"):
        row |= _evaluate(job, next_state, communicator)
    if not np.isfinite(row.get("test_loss", 0.0)):  # the same on every process
        raise Diverged(
            f"round {state.round_index}: training diverged (test loss {row['test_loss']}); the run "
            "stays incomplete; allowed: finite losses (try a smaller train.lr)"
        )
    return next_state, row


def advance(
    job: Job, state: ServerState, communicator: Communicator, meter: Meter
) -> tuple[ServerState, dict[str, Any]]:
    """Download, local training, upload, exchange, aggregate; without looking at the result."""
    with meter.phase("download"):
        cohort = draw_cohort(job, state.round_index)
        arrivals = Arrivals(job.fleet, cohort, state.round_index)
        sent, saved_bytes, residual = send_down(job, state)
        reference = job.method.reference(sent) if job.config.codec.up != "fp32" else None
        path = merge_path(job, communicator)
        before = {key: getattr(communicator.traffic, name) for key, name in _TRAFFIC.items()}
        exchange = _Exchange(job, communicator, path, reference)
        goes = [
            place(job, go, communicator.world_size)[communicator.world_rank]
            for go in _goes(job, sent, arrivals.sending, communicator.world_size)
        ]
        dropped = place(job, arrivals.dropped, communicator.world_size)[communicator.world_rank]
        costs = [_as_sent(job, _drop_client(job, sent, c), saved_bytes) for c in dropped]
    for mine in goes:
        uploads: list[Upload] = []
        own_costs, kept = [], dict(job.kept)
        send = uploads.append if job.config.clients.timed else exchange.take
        for client_id in mine:
            cost = train_client(job, sent, client_id, meter, send, reference)
            own_costs.append(_as_sent(job, cost, saved_bytes))
        costs += own_costs
        if job.config.clients.timed:
            with meter.phase("wait"):
                communicator.barrier()
            with meter.phase("exchange"):
                arrivals.agree(own_costs, communicator)
            with meter.phase("pack"):
                for upload in _in_time(job, uploads, arrivals.arrived, kept):
                    exchange.take(upload)
        exchange.meet(meter)
    uploads, uplink_bytes = exchange.result(meter)
    with meter.phase("aggregate"):
        _check_complete(uploads, arrivals.arrived, state.round_index)
        _check_losses(uploads, state.round_index)
        next_state = replace(state, round_index=state.round_index + 1)  # where nobody arrives
        if uploads:
            next_state = job.method.aggregate(sent, uploads)
        if uploads and residual is not None:
            next_state = replace(next_state, extra={**next_state.extra, _RESIDUAL: residual})
        after = {key: getattr(communicator.traffic, name) for key, name in _TRAFFIC.items()}
        return next_state, {
            "round_index": state.round_index,
            "cohort": cohort,
            **({"train_loss": _mean_loss(uploads)} if uploads else {}),
            "merge_path": path,
            "uplink_bytes": uplink_bytes,
            "downlink_bytes": sum(cost.downlink_bytes for cost in costs),
            **{key: after[key] - before[key] for key in _TRAFFIC},
            "live_triplets": sum(next_state.live_triplets.values()),
            "live_adapters": sum(count > 0 for count in next_state.live_triplets.values()),
            "live_triplets_by_adapter": next_state.live_triplets,
            **arrivals.record(costs),
            "clients": costs,
        }


def send_down(job: Job, state: ServerState) -> tuple[ServerState, int, Tensor | None]:
    """The state as clients get it, the bytes that its codec saves for each of them, and what its
    rounding left out, for the next round (None without error feedback)."""
    codec = job.config.codec
    if codec.down == "fp32":
        return state, 0, None
    form = job.method.form(state)
    values = join_values(state.rows, state.whole, state, form)
    left_out = state.extra.get(_RESIDUAL)
    if left_out is not None and len(left_out) == len(values):  # not where triplets died since
        values = values + left_out
    widths = message_widths(len(values))
    draw = generator(state.seed, "codec down", state.round_index)
    decoded = decode_rows(codec.down, encode_rows(codec.down, values, widths, draw), widths)
    rows, whole, _ = split_values(decoded, state, form)
    saved_bytes = 4 * len(values) - payload_bytes(codec.down, len(values))
    residual = values - decoded if codec.error_feedback else None
    return replace(state, rows=rows, whole=whole), saved_bytes, residual


def _goes(
    job: Job, state: ServerState, cohort: Sequence[int], world_size: int
) -> Iterator[Sequence[int]]:
    """The cohort in stretches of client_ids, so that a process holds few clients' values.

    Sums come in the same order however it is cut. All of it where every client's values are needed,
    and where only the fastest ones count.
    """
    size = max(1, len(cohort))
    if not job.method.needs_factors and job.config.clients.over_selection == 1:
        held = HELD_VALUES // max(1, num_values(state, job.method.form(state)))
        size = max(1, held) * world_size
    for first in range(0, len(cohort), size):
        yield cohort[first : first + size]


def _as_sent(job: Job, cost: ClientCost, saved_bytes: int) -> ClientCost:
    """A client's cost under the server's codec, and its modelled time where that decides."""
    if saved_bytes:
        cost = replace(cost, downlink_bytes=cost.downlink_bytes - saved_bytes)
    seconds = job.fleet.seconds(cost)
    return cost if seconds is None else replace(cost, modelled_seconds=seconds)


def _in_time(
    job: Job, uploads: Sequence[Upload], arrived: Sequence[int], kept: checkpoint.Kept
) -> list[Upload]:
    """The uploads that have arrived. A late client keeps what it has kept before the round."""
    in_time = set(arrived)
    late = [upload.client_id for upload in uploads if upload.client_id not in in_time]
    for client_id in late:
        job.kept.pop(client_id, None)
    job.kept.update({client_id: kept[client_id] for client_id in late if client_id in kept})
    return [upload for upload in uploads if upload.client_id in in_time]


class _Exchange:
    """How a round's uploads meet: each process takes its own, then all meet, in one go or several;
    all ask for the result."""

    def __init__(
        self, job: Job, communicator: Communicator, path: str, reference: Tensor | None
    ) -> None:
        self._communicator = communicator
        self._reference = torch.zeros(0) if reference is None else reference
        self._mean = None
        if not job.method.needs_factors:
            self._mean = RunningMean(communicator, path, self._reference)
        self._taken: list[Upload] = []
        self._gathered: list[Upload] = []
        self._num_bytes = 0

    def take(self, upload: Upload) -> None:
        """One of this process's uploads, in client_id order."""
        if self._mean is not None:
            self._mean.take(upload)
        else:
            self._taken.append(upload)

    def meet(self, meter: Meter) -> None:
        """Bring together what all processes have taken since they last met."""
        if self._mean is not None:
            with meter.phase("wait"):
                self._communicator.barrier()
            with meter.phase("exchange"):
                self._mean.meet()
            return
        with meter.phase("pack"):
            packed = pack(self._taken)
            self._taken.clear()
        with meter.phase("wait"):
            self._communicator.barrier()
        with meter.phase("exchange"):
            buffers = self._communicator.allgather(packed)
        with meter.phase("aggregate"):
            for buffer in buffers:
                self._gathered += unpack(buffer, self._reference)
                self._num_bytes += buffer.numel()

    def result(self, meter: Meter) -> tuple[list[Upload], int]:
        """All uploads in client_id order, and their bytes; where only their mean is needed, each
        has it as its values."""
        if self._mean is not None:
            with meter.phase("exchange"):
                return self._mean.result()
        with meter.phase("aggregate"):
            uploads = sorted(self._gathered, key=lambda upload: upload.client_id)
        return uploads, self._num_bytes


def merge_path(job: Job, communicator: Communicator) -> str:
    """The merge path of this run: for auto the cheaper of those that keep the bits."""
    wanted = job.config.federation.merge_path
    if wanted != "auto":
        return wanted
    if job.method.needs_factors:
        return "allgather"
    # All clients send the same rows, so their number decides nothing; sums travel as float32.
    return cheapest(
        num_parts=job.config.federation.cohort,
        world_size=communicator.world_size,
        part_values=payload_bytes(job.config.codec.up, ROW_VALUES) / (4 * ROW_VALUES),
        union_values=1,
        layout_values=1,
    )


def train_client(
    job: Job,
    state: ServerState,
    client_id: int,
    meter: Meter,
    send: Callable[[Upload], None],
    reference: Tensor | None = None,
) -> ClientCost:
    """One client's download, local training and upload; what it cost, before `state`'s codec.

    send: gets the upload. reference: what a lossy codec codes its difference from; None for fp32.
    """
    with meter.phase("download"):
        client = _client(job, client_id)
        downlink_bytes = job.method.download(job.model, state, client)
        start_client(client, job.method, job.training, state)
    step = job.counter.step_cost() if job.counter else None
    shapes = []
    with meter.phase("local_train"):
        for batch in client_batches(job, state.round_index, client_id):
            shapes.append(tuple(batch["input_ids"].shape))  # (n, length)
            job.method.local_step(client, batch)
    counts = job.counter.counts(client, step, shapes) if job.counter else {}
    counts["activation_bytes"] = meter.device_bytes_above_rest()
    with meter.phase("pack"):
        upload = job.method.upload(client, state)
        if not isinstance(upload, Upload) or upload.client_id != client_id:
            raise RuntimeError(f"round {state.round_index}: client {client_id} sent no upload")
        if reference is not None:
            upload = _code_up(job, client, upload, state.round_index, reference)
        if job.keeps:
            job.kept[client_id] = client.kept
        send(upload)
    num_bytes = upload.num_bytes
    return ClientCost(
        client_id=client_id, uplink_bytes=num_bytes, downlink_bytes=downlink_bytes, **counts
    )


def _drop_client(job: Job, state: ServerState, client_id: int) -> ClientCost:
    """What a client costs that vanishes after its download."""
    downlink_bytes = job.method.download(job.model, state, _client(job, client_id))
    return ClientCost(client_id=client_id, uplink_bytes=0, downlink_bytes=downlink_bytes, flops=0)


def _code_up(
    job: Job, client: Client, upload: Upload, round_index: int, reference: Tensor
) -> Upload:
    """The upload under the job's codec, with what the codec left out of the client's last one."""
    codec = job.config.codec
    values = upload.values
    left_out = job.kept.get(client.client_id, {}).get(_RESIDUAL)
    if left_out is not None and len(left_out) == len(values):  # not where triplets died since
        values = values + left_out
    draw = generator(job.config.seed, "codec up", round_index, client.client_id)
    coded = code(replace(upload, values=values), codec.up, reference, draw)
    if codec.error_feedback:
        client.kept[_RESIDUAL] = values - coded.values
    return coded


def _client(job: Job, client_id: int) -> Client:
    """A client before its download, with what it has kept since it last took part."""
    return Client(
        client_id=client_id,
        num_examples=len(job.shards[client_id]),
        model=job.model,
        kept=without_residual(job.kept.get(client_id, {})),
    )


def without_residual(kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a client keeps for its method: all but what its codec left out."""
    return {name: tensor for name, tensor in kept.items() if name != _RESIDUAL}


def client_batches(job: Job, round_index: int, client_id: int) -> Iterator[Batch]:
    """A client's batches of a round, the same wherever and whenever they are drawn."""
    return batches(
        job.train,
        job.shards[client_id],
        job.training,
        seed=job.config.seed,
        round_index=round_index,
        client_id=client_id,
        device=job.device,
    )


def draw_cohort(job: Job, round_index: int) -> list[int]:
    """The round's client ids, sorted: a uniform draw without replacement from (seed, round)."""
    drawn = torch.randperm(
        len(job.shards), generator=generator(job.config.seed, "cohort", round_index)
    )
    return sorted(drawn[: job.config.num_drawn].tolist())


def place(job: Job, cohort: Sequence[int], world_size: int) -> list[list[int]]:
    """Clients of each process: the client with most local steps first, to the least loaded process.

    Ties go to the lower client_id and the lower world_rank. Where a client runs changes no result,
    but clients that keep tensors between rounds stay on one process.
    """
    if job.keeps:
        return [
            [client_id for client_id in cohort if _home(client_id, world_size) == world_rank]
            for world_rank in range(world_size)
        ]
    steps = {client_id: job.training.num_steps(len(job.shards[client_id])) for client_id in cohort}
    placed: list[list[int]] = [[] for _ in range(world_size)]
    load = [0] * world_size
    for client_id in sorted(cohort, key=lambda client_id: (-steps[client_id], client_id)):
        least = load.index(min(load))
        placed[least].append(client_id)
        load[least] += max(1, steps[client_id])  # a client that takes no step is work, too
    return [sorted(clients) for clients in placed]


def _home(client_id: int, world_size: int) -> int:
    """world_rank of the process where a client stays that keeps tensors between rounds."""
    return client_id % world_size


def choose_device(wanted: str, communicator: Communicator) -> torch.device:
    """The process's device: with auto a GPU where there is one, shared out by place on the host."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("system.device = 'cuda': torch sees no GPU here; allowed: auto, cpu")
    _same_bits_on_cuda()
    device_index = communicator.host_rank % torch.cuda.device_count()
    return torch.device("cuda", device_index)


def _same_bits_on_cuda() -> None:
    """Ask for deterministic kernels; one that has no such form warns."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # its backward adds in any order


@lru_cache(maxsize=1)
def load_texts(config: DatasetConfig) -> TextDataset:
    """The data set; the points of a sweep mostly share it."""
    return load_dataset(config)


def _check_complete(uploads: Sequence[Upload], cohort: Sequence[int], round_index: int) -> None:
    """Every client of the cohort has sent one upload, and nobody else has."""
    found = [upload.client_id for upload in uploads]
    if found == list(cohort):
        return
    missing = sorted(set(cohort) - set(found))
    if missing:
        raise RuntimeError(f"round {round_index}: no upload came from clients {missing}")
    raise RuntimeError(f"round {round_index}: uploads of {found} came, of a cohort of {cohort}")


def _check_losses(uploads: Sequence[Upload], round_index: int) -> None:
    """Every process sees the same uploads, so all of them stop at the same place."""
    checked = None  # uploads that were averaged on the way share one tensor
    for upload in uploads:
        finite = bool(np.isfinite(upload.train_loss))
        if finite and upload.values is not checked:
            finite, checked = upload.is_finite, upload.values
        if not finite:
            raise Diverged(
                f"client {upload.client_id}, round {round_index}: training diverged "
                f"(loss {upload.train_loss}); the run stays incomplete; allowed: finite losses "
                "(try a smaller train.lr)"
            )


def _mean_loss(uploads: Sequence[Upload]) -> float:
    total = sum(upload.num_examples for upload in uploads)
    return sum(upload.train_loss * upload.num_examples / total for upload in uploads)


def _evaluate(job: Job, state: ServerState, communicator: Communicator) -> dict[str, float]:
    """The evaluation's record keys; none in a round that is not evaluated."""
    settings = job.config.evaluate
    last = state.round_index == state.num_rounds
    if not last and state.round_index % settings.every:
        return {}
    index = torch.arange(len(job.evaluated))
    if settings.eval_examples is not None and not last:
        drawn = torch.randperm(len(index), generator=generator(state.seed, "eval_examples"))
        index = drawn[: settings.eval_examples]
    judge = Judge(
        model=job.model,
        data=job.evaluated,
        label_counts=job.label_counts,
        batch_size=settings.batch_size,
        precision=job.training.precision,
        device=job.device,
        communicator=communicator,
    )
    if not job.method.stateful:
        job.method.download(job.model, state, None)
        return judge.shared_model(index).record(job.label_counts)
    homes = [_home(client_id, communicator.world_size) for client_id in range(len(job.shards))]
    mine = [i for i, home in enumerate(homes) if home == communicator.world_rank]
    return judge.client_models(index, mine, partial(_become, job, state), seed=state.seed)


def _become(job: Job, state: ServerState, client_id: int) -> None:
    """Make the model what this client would use."""
    job.method.download(job.model, state, _client(job, client_id))


def _resume_or_start(
    job: Job,
    communicator: Communicator,
    recorder: Recorder,
    energy: HostEnergy,
    notice: Notice,
) -> tuple[ServerState, checkpoint.Kept]:
    """The state to go on from and what clients keep, and the run's files on disk.

    world_rank 0 reads for all, and what it can not read ends them all.
    """
    facts = process_facts(communicator.world_rank, job.device)
    facts["prepare_seconds"] = round(job.prepare_seconds, 6)
    if energy.idle_watts:
        facts["idle_watts"] = {k: round(watts, 3) for k, watts in energy.idle_watts.items()}
    processes = [json.loads(part) for part in communicator.gather_bytes(json.dumps(facts).encode())]
    belongs_to = identity(job.config, job.dataset_digest, profiles(job.devices))
    # Where nothing is saved, all start from world_rank 0's state: an SVD of the same weights need
    # not give the same bits on another machine.

    def read() -> bytes:
        if communicator.world_rank != 0:
            return b""
        found = checkpoint.find_checkpoint(recorder.run_dir)
        if found is None:
            return checkpoint.dump(job.state, {}, belongs_to)
        if found.notice:
            notice(f"{found.notice}; going on from the one before, after round {found.round_index}")
        return found.data

    data = communicator.broadcast(together(communicator, read))
    # Together: hosts may differ in their data, and one that gave up alone would hang the others.
    state, kept = together(communicator, lambda: checkpoint.restore(job.state, data, belongs_to))
    job.kept.clear()
    for client_id, tensors in kept.items():
        if _home(client_id, communicator.world_size) == communicator.world_rank:
            job.kept[client_id] = tensors
    if communicator.world_rank == 0:
        rows = [row for row in recorder.rounds() if row["round_index"] < state.round_index]
        run_facts = provenance(
            job.config,
            dataset_digest=job.dataset_digest,
            labels=list(job.labels),
            comm=communicator.kind,
            **library_fact(communicator.kind, communicator.library),
            world_size=communicator.world_size,
            processes=processes,
            prepare_seconds=max(process["prepare_seconds"] for process in processes),
            device_profiles=profiles(job.devices) or None,
            num_parameters=sum(p.numel() for p in job.model.parameters()),
            num_adapter_parameters=sum(rows.numel() for rows in job.state.rows.values()),
        )
        with _storing(recorder, state.round_index):
            recorder.start(run_facts, job.partition_summary, rows)
    return state, kept


def _gather_kept(job: Job, cohort: Sequence[int], communicator: Communicator) -> checkpoint.Kept:
    """On world_rank 0 what the round's clients keep, for the checkpoint; nothing elsewhere."""
    if not job.keeps:
        return {}
    mine = {client_id: job.kept[client_id] for client_id in cohort if client_id in job.kept}
    gathered = communicator.gather_bytes(checkpoint.dump_kept(mine))
    kept: checkpoint.Kept = {}
    for part in gathered if communicator.world_rank == 0 else ():
        kept |= checkpoint.load_kept(part)
    return kept


def _reduce(
    job: Job,
    row: dict[str, Any],
    measured: Measured,
    communicator: Communicator,
) -> dict[str, Any]:
    """The round's record from every process's part: bytes are sums, seconds and memory maxima."""
    mine = {**row, "clients": [asdict(cost) for cost in row["clients"]]}
    mine["measured"] = asdict(measured)
    parts = [json.loads(part) for part in communicator.gather_bytes(json.dumps(mine).encode())]
    digests = [part["state_digest"] for part in parts]
    if len(set(digests)) > 1:
        raise RuntimeError(f"processes disagree on the state after a round: {digests}")
    everyone = [Measured(**part["measured"]) for part in parts]
    reduced = {
        **{key: value for key, value in row.items() if key != "clients"},
        **{key: sum(part[key] for part in parts) for key in _SUMMED if key in row},
        **reduce_clients(part["clients"] for part in parts),
        **reduce_seconds([measured.seconds for measured in everyone]),
        **reduce_energy(everyone),
        **reduce_memory([measured.memory for measured in everyone]),
    }
    names, fleet = job.config.devices.names, job.fleet
    return reduced | model_devices(
        reduced, job.devices, names, fleet.dealt, fleet.speeds, fleet.precision
    )


def _choose_devices(config: RunConfig) -> tuple[dict[str, Device], list[str]]:
    """The devices that the config names, and each client's in a mixed federation."""
    settings = config.devices
    known = load_devices(Path(settings.file) if settings.file else None)
    check_names(settings.names, known)
    dealt = []
    if settings.shares:
        num_clients = config.federation.num_clients
        dealt = deal(known, settings.shares, num_clients=num_clients, seed=config.seed)
    return {name: known[name] for name in dict.fromkeys([*settings.names, *settings.shares])}, dealt
