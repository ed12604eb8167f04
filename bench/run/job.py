"""What a run needs, made once: data, shards, model, method and first state."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.config.schema import RunConfig, make_method
from bench.data.partition import draw_client_lora_ranks, label_counts, partition, summary
from bench.data.texts import holdout
from bench.metering.client_cost import ClientCounter, profiles
from bench.metering.devices import Device, check_names, deal, load_devices
from bench.models.encoders import Classifier, build_model
from bench.run.arrivals import Fleet, make_fleet
from bench.run.encoded import EncodedSet, load_encoded
from bench.run.frozen import share_frozen
from bench.run.identity import Digests, digests, identity, weights_digest
from fedara_core.adapters import AdaptedModel, AdapterSpec, inject
from fedara_core.comm.base import Communicator
from fedara_core.comm.launch import together
from fedara_core.compression import Compression
from fedara_core.dropout import with_fast_dropout
from fedara_core.errors import InputError
from fedara_core.method import Method
from fedara_core.prefix import FrozenPrefix
from fedara_core.state import ServerState, Start
from fedara_core.train import Encoded, LocalTraining

ClientState = dict[int, dict[str, Tensor]]  # client_id -> name -> tensor


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a run needs, the same on every process but for client_state."""

    config: RunConfig
    model: AdaptedModel
    method: Method
    state: ServerState
    fleet: Fleet
    training: LocalTraining
    train: Encoded
    evaluated: Encoded
    shards: Sequence[np.ndarray]  # client_id -> indices into train
    label_counts: np.ndarray  # (num_clients, num_classes)
    partition_summary: list[dict[str, Any]]
    digests: Digests
    labels: Sequence[str]
    device: torch.device
    client_state: ClientState = field(default_factory=dict)  # what this process's clients keep
    counter: ClientCounter | None = None
    prefix: FrozenPrefix | None = None  # with train.frozen_prefix = "cache"
    devices: dict[str, Device] = field(default_factory=dict)  # to model each round on
    computes: dict[str, Any] = field(default_factory=dict)  # how the model does, for the record
    data_summary: str = ""  # in one line
    prepare_seconds: float = 0.0  # of this process

    @property
    def compression(self) -> Compression:
        """The codecs of the run's messages."""
        return Compression(**self.config.codec.model_dump())

    @property
    def belongs_to(self) -> dict[str, Any]:
        """What the run's checkpoints belong to."""
        return identity(self.config, self.digests, profiles(self.devices))

    @property
    def keeps_client_state(self) -> bool:
        """Whether clients keep tensors between rounds, so that each stays on one process."""
        return self.method.stateful or self.compression.keeps_at_client


def prepare(config: RunConfig, communicator: Communicator) -> Job:
    """Load, split, tokenise, partition, and build model and first state; every process calls it.
    Raises InputError on every process alike."""
    start = perf_counter()
    device, devices, fleet = together(communicator, lambda: _equipment(config, communicator))
    data = load_encoded(config.dataset, config.model, communicator)
    job = together(communicator, lambda: _job(config, data, device, devices, fleet))
    share_frozen(job.model.module, communicator)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return replace(job, prepare_seconds=perf_counter() - start)


def _equipment(
    config: RunConfig, communicator: Communicator
) -> tuple[torch.device, dict[str, Device], Fleet]:
    """What computes here, the devices that are modelled, and the clients'. Raises InputError."""
    devices, device_of = _choose_devices(config)
    device = choose_device(config.system.device, communicator)
    return device, devices, make_fleet(config, devices, device_of)


def _job(
    config: RunConfig,
    data: EncodedSet,
    device: torch.device,
    devices: dict[str, Device],
    fleet: Fleet,
) -> Job:
    """All that follows from the data. Raises InputError."""
    num_classes = len(data.labels)
    train_index, validation_index = holdout(
        len(data.train), config.dataset.validation_fraction, config.seed
    )
    labels = data.train.labels.numpy()[train_index]
    shards = partition(
        labels,
        config.partition,
        num_clients=config.federation.num_clients,
        num_classes=num_classes,
        seed=config.seed,
    )
    evaluated = data.test
    if config.evaluate.split == "validation":
        if not len(validation_index):
            raise InputError(
                "evaluate.split = 'validation' needs dataset.validation_fraction above 0, not "
                f"{config.dataset.validation_fraction}"
            )
        evaluated = data.train.subset(torch.from_numpy(validation_index))
    classifier = build_model(config.model, num_classes=num_classes, seed=config.seed, device=device)
    weights = weights_digest(classifier)  # before adapters take their places
    model, method, state = adapt(config, classifier, device)
    counter = ClientCounter(model)
    if config.clients.timed and not counter.counts_flops:
        raise InputError(
            f"model.name = {config.model.name!r}: its FLOPs can not be counted, and modelled time "
            "needs them; allowed: clients.deadline_seconds = 'none', clients.over_selection = 1.0"
        )
    partition_summary = summary(labels, shards, data.labels, state.adapter.client_lora_ranks)
    return Job(
        config=config,
        model=model,
        method=method,
        state=state,
        fleet=fleet,
        labels=data.labels,
        training=LocalTraining(**config.train.model_dump()),
        train=data.train,
        evaluated=replace(evaluated, first_text=len(data.train)),
        prefix=_open_prefix(config, model),
        shards=[train_index[shard] for shard in shards],
        label_counts=label_counts(labels, shards, num_classes),
        partition_summary=[entry | fleet.facts(entry["client_id"]) for entry in partition_summary],
        digests=digests(config, dataset=data.digest, weights=weights),
        device=device,
        counter=counter,
        devices=devices,
        computes=classifier.facts,
        data_summary=data.summary,
    )


def _open_prefix(config: RunConfig, model: AdaptedModel) -> FrozenPrefix | None:
    """What keeps the states of the frozen layers, where the config says so. Raises InputError."""
    if config.train.frozen_prefix == "recompute":
        return None
    if not getattr(model.module, "packed", False):
        raise InputError(
            f"train.frozen_prefix = 'cache': model.name = {config.model.name!r} does not read "
            "texts without padding here; allowed: recompute, or a model that does and "
            "model.packing = true"
        )
    return FrozenPrefix(model, config.system.prefix_mb * 10**6)


def build(
    config: RunConfig, *, num_classes: int, device: torch.device
) -> tuple[AdaptedModel, Method, ServerState]:
    """The model with its adapters, the method, and the state before round 0. Raises InputError."""
    classifier = build_model(config.model, num_classes=num_classes, seed=config.seed, device=device)
    return adapt(config, classifier, device)


def adapt(
    config: RunConfig, classifier: Classifier, device: torch.device
) -> tuple[AdaptedModel, Method, ServerState]:
    """As `build`, with a model that is there already. Raises InputError."""
    classifier.model.to(device)
    model = inject(
        classifier.model,
        config.adapter.targets,
        classifier.head,
        dropout=config.adapter.dropout,
        fused=config.adapter.fused,
    )
    if config.model.dropout_masks == "words":
        with_fast_dropout(model.module)
    adapter = AdapterSpec(
        lora_rank=config.adapter.lora_rank,
        lora_alpha=config.adapter.lora_alpha,
        client_lora_ranks=tuple(
            draw_client_lora_ranks(
                config.adapter, num_clients=config.federation.num_clients, seed=config.seed
            )
        ),
        shapes=model.shapes,
    )
    method, num_rounds = make_method(config.method), config.federation.num_rounds
    start = Start(model=model, adapter=adapter, seed=config.seed, num_rounds=num_rounds)
    return model, method, method.init(start)


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


def _choose_devices(config: RunConfig) -> tuple[dict[str, Device], list[str]]:
    """The devices that the config names, and each client's in a mixed federation."""
    settings = config.devices
    known = load_devices(Path(settings.file) if settings.file else None)
    check_names(settings.names, known)
    device_of = []
    if settings.shares:
        num_clients = config.federation.num_clients
        device_of = deal(known, settings.shares, num_clients=num_clients, seed=config.seed)
    names = dict.fromkeys([*settings.names, *settings.shares])
    return {name: known[name] for name in names}, device_of
