"""One run's config: its sections, what they demand of each other, and the run's identity."""

import dataclasses
import hashlib
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from bench.config import sections
from fedara_core.errors import InputError
from fedara_core.method import Method, load_method, method_names
from fedara_core.server import ServerOptimizer

_MAX_NAME_BYTES = 255  # of a file or folder on most file systems
_SHORTENED_BYTES = 100

# Sections that change no result, and so are no part of run_id.
_NO_RESULT = ("system", "energy", "devices")
# Keys that came after the first records: at their defaults they are no part of run_id either.
YOUNGER_KEYS = {
    "adapter": ("dropout", "fused"),
    "federation": (
        *("server_optimizer", "server_lr"),
        *("server_momentum", "server_beta2", "server_tau"),
    ),
    "model": ("attention", "packing", "dropout_masks"),
    "train": ("schedule", "round_schedule", "proximal_mu", "frozen_prefix"),
}


class RunConfig(sections.Section):
    """One run: one method, one data set, one seed."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of every random draw: partition, head, cohorts, batches, codecs."""

    method: sections.MethodConfig
    adapter: sections.AdapterConfig = sections.AdapterConfig()
    model: sections.ModelConfig = sections.ModelConfig()
    dataset: sections.DatasetConfig = sections.DatasetConfig()
    partition: sections.PartitionConfig = sections.PartitionConfig()
    federation: sections.FederationConfig = sections.FederationConfig()
    clients: sections.ClientsConfig = sections.ClientsConfig()
    codec: sections.CodecConfig = sections.CodecConfig()
    train: sections.TrainConfig
    evaluate: sections.EvaluateConfig = sections.EvaluateConfig()
    system: sections.SystemConfig = sections.SystemConfig()
    energy: sections.EnergyConfig = sections.EnergyConfig()
    devices: sections.DevicesConfig = sections.DevicesConfig()

    @model_validator(mode="after")
    def _method_exists(self) -> "RunConfig":
        method = make_method(self.method)
        if self.adapter.client_lora_ranks and not method.uses_client_lora_ranks:
            able = [name for name in method_names() if load_method(name).uses_client_lora_ranks]
            raise ValueError(
                f"adapter.client_lora_ranks is set, and method.name = {self.method.name!r} trains "
                f"the same lora_rank at every client; allowed: {', '.join(able) or 'none'}"
            )
        if self.adapter.dropout and not method.low_rank:
            raise ValueError(
                f"adapter.dropout = {self.adapter.dropout:g} acts on the input of low-rank "
                f"branches, and method.name = {self.method.name!r} has none; allowed: 0"
            )
        if method.combine == "gather" and self.federation.merge_path in ("split", "allreduce"):
            raise ValueError(
                f"federation.merge_path = {self.federation.merge_path!r} sums on the way, and "
                f"method.name = {self.method.name!r} needs every client's factors; allowed: "
                "allgather, auto"
            )
        if not self.server.keeps_the_mean and not method.plain_mean:
            name, lr = self.federation.server_optimizer, self.federation.server_lr
            raise ValueError(
                f"federation.server_optimizer = {name!r} with server_lr = {lr:g} goes on along the "
                f"clients' mean, and the rows of method.name = {self.method.name!r} do not keep "
                "their meaning from round to round; allowed: fedavg with server_lr = 1"
            )
        if self.codec.down != "fp32" and "down" not in method.coded:
            raise ValueError(
                f"codec.down = {self.codec.down!r}: what method.name = {self.method.name!r} sends "
                "down is not what trains, or differs by client; allowed: fp32"
            )
        if self.codec.error_feedback and "feedback" not in method.coded:
            raise ValueError(
                f"codec.error_feedback = true: method.name = {self.method.name!r} uploads other "
                "rows or another basis from round to round, and errors are of the last one; "
                "allowed: false"
            )
        return self

    @model_validator(mode="after")
    def _clients_fit(self) -> "RunConfig":
        num_clients, cohort = self.federation.num_clients, self.federation.cohort
        if self.num_drawn > num_clients:
            raise ValueError(
                f"clients.over_selection = {self.clients.over_selection:g} draws {self.num_drawn} "
                f"clients, and federation.num_clients = {num_clients}; allowed: 1 to "
                f"{num_clients / cohort:g}"
            )
        if self.clients.timed and not self.devices.shares:
            raise ValueError(
                "clients.deadline_seconds and clients.over_selection go by modelled time, and "
                "devices.shares is empty; allowed: the clients' devices, such as "
                "devices.shares = { orin_nano = 1.0 }"
            )
        return self

    @property
    def server(self) -> ServerOptimizer:
        """What the server does with the clients' mean."""
        federation = self.federation
        return ServerOptimizer(
            name=federation.server_optimizer,
            lr=federation.server_lr,
            momentum=federation.server_momentum,
            beta2=federation.server_beta2,
            tau=federation.server_tau,
        )

    @property
    def num_drawn(self) -> int:
        """Clients that a round draws: the cohort, or more if clients.over_selection says so."""
        # The decimal as written: 10 x 1.1 is 11, and in binary floating point a little more.
        return math.ceil(self.federation.cohort * Fraction(str(self.clients.over_selection)))

    def settings(self) -> dict[str, Any]:
        """Every setting with its default filled in, the method's hyperparameters included."""
        hyperparameters = dataclasses.asdict(make_method(self.method))
        settings = self.model_dump(mode="json")
        settings["method"] = {"name": self.method.name, **hyperparameters}
        return settings

    def canonical(self) -> dict[str, Any]:
        """The settings with only the names of files, not their place on this machine; the record
        holds the data's digest and the devices' numbers."""
        settings = self.settings()
        settings["dataset"]["name"] = self.dataset.recorded_name
        if self.devices.file is not None:
            settings["devices"]["file"] = Path(self.devices.file).name
        return settings

    def result_settings(self) -> dict[str, Any]:
        """The canonical settings that the result depends on."""
        canonical = self.canonical()
        settings = {k: value for k, value in canonical.items() if k not in _NO_RESULT}
        if self.clients == sections.ClientsConfig():  # as in runs from before this section existed
            del settings["clients"]
        for section, keys in YOUNGER_KEYS.items():  # likewise
            fields = type(getattr(self, section)).model_fields
            for key in keys:
                if getattr(getattr(self, section), key) == fields[key].default:
                    del settings[section][key]
        method = make_method(self.method)
        for key in method.younger:
            if getattr(method, key) == getattr(type(method), key):
                del settings["method"][key]
        if self.clients.timed:  # the order of the devices decides who has which
            devices = canonical["devices"]
            settings["devices"] = [
                [list(pair) for pair in devices["shares"].items()],
                devices["file"],
            ]
        return settings

    @property
    def config_hash(self) -> str:
        """SHA-256 of the result's settings, in hex."""
        text = json.dumps(self.result_settings(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def run_id(self) -> str:
        """The run's folder: data set, method, seed, and a part of config_hash. Of a data
        set's name that would make it too long, the start and a digest."""
        dataset = self.dataset.short_name.replace(":", "-")
        end = f"-{self.method.name}-seed{self.seed}-{self.config_hash[:10]}"
        if len((dataset + end).encode()) > _MAX_NAME_BYTES:
            digest = hashlib.sha256(dataset.encode()).hexdigest()
            dataset = dataset.encode()[:_SHORTENED_BYTES].decode(errors="ignore")
            dataset += f"-{digest[:10]}"
        return dataset + end


def make_method(config: sections.MethodConfig) -> Method:
    """The method with its hyperparameters. Raises InputError for an unknown key or a wrong type."""
    cls = load_method(config.name)
    hints = get_type_hints(cls)
    allowed = [item.name for item in dataclasses.fields(cls)]
    strict = ConfigDict(strict=True, allow_inf_nan=False)
    values = {}
    for key, value in config.hyperparameters.items():
        if key not in allowed:
            has = ", ".join(allowed) or "no hyperparameters of its own"
            raise InputError(f"unknown key method.{key}; {config.name} has {has}")
        try:
            values[key] = TypeAdapter(hints[key], config=strict).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise InputError(f"method.{key} = {value!r} is not allowed: {reason}") from None
    return cls(**values)
