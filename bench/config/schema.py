"""RunConfig: one run, read from TOML, validated and hashed; and the points of a [sweep] table."""

import dataclasses
import hashlib
import itertools
import json
import math
import tomllib
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from bench.config.toml_file import read_toml
from fedara_core.errors import InputError
from fedara_core.method import Method, load_method, method_names


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class MethodConfig(BaseModel):
    """`name` is a file of fedara_core/methods; other keys are hyperparameters of that method."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def hyperparameters(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def make_method(config: MethodConfig) -> Method:
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


class ClientLoraRank(_Section):
    """A lora_rank, and the share of the clients that can afford no more."""

    lora_rank: int = Field(ge=1)
    share: float = Field(gt=0, le=1)


class AdapterSection(_Section):
    """Settings that all methods share, so that no method is flattered by defaults of its own.

    client_lora_ranks: which clients can afford how much; empty means lora_rank for all. Only for
    methods that have a use for it.
    """

    lora_rank: int = Field(12, ge=1)
    lora_alpha: float = Field(12.0, gt=0)
    targets: str | list[str] = "all-linear"
    client_lora_ranks: list[ClientLoraRank] = []

    @model_validator(mode="after")
    def _targets_some(self) -> "AdapterSection":
        if not self.targets:
            raise ValueError(
                f"targets = {self.targets!r} adapts nothing, which is method.name = 'head_only'; "
                "allowed: all-linear, or names of layers"
            )
        return self

    @model_validator(mode="after")
    def _client_lora_ranks_fit(self) -> "AdapterSection":
        for entry in self.client_lora_ranks:
            if entry.lora_rank > self.lora_rank:
                raise ValueError(
                    f"client_lora_ranks: {entry.lora_rank} is above lora_rank = {self.lora_rank}; "
                    f"allowed: 1 to {self.lora_rank}"
                )
        total = sum(entry.share for entry in self.client_lora_ranks)
        if self.client_lora_ranks and abs(total - 1) > 1e-6:
            raise ValueError(f"client_lora_ranks: the shares add up to {total:g}; allowed: 1")
        return self


class ModelConfig(_Section):
    """The encoder. attention: transformers' attn_implementation; in bf16 on CPUs "eager" is faster
    than torch's own "sdpa", whose backward pass is slow there."""

    name: str = "minilm"
    attention: Literal["sdpa", "eager"] = "sdpa"
    pooling: Literal["model", "mean"] = "mean"
    max_length: int = Field(64, ge=4)
    dropout: float | None = Field(None, ge=0, lt=1)


class DatasetConfig(_Section):
    name: str = "docstrings"
    text_column: str = "text"
    label_column: str = "label"
    validation_fraction: float = Field(0.1, ge=0, lt=1)

    @property
    def short_name(self) -> str:
        """The last part of a folder's path or of a hub name."""
        return self.name.removeprefix("file:").rstrip("/").split("/")[-1]


class PartitionConfig(_Section):
    scheme: Literal["iid", "dirichlet", "shards", "quantity"] = "dirichlet"
    alpha: float = Field(0.1, gt=0, le=1e6)
    labels_per_client: int = Field(2, ge=1)
    min_examples: int = Field(1, ge=1)


class FederationConfig(_Section):
    """Who takes part, and how uploads meet: see fedara_core/merge for the merge paths.

    allgather and split give the same bits for any number of processes. auto takes the cheapest path
    for the job at hand.
    """

    num_clients: int = Field(20, ge=1)
    cohort: int = Field(10, ge=1)
    num_rounds: int = Field(10, ge=1)
    merge_path: Literal["allgather", "split", "allreduce", "auto"] = "allgather"

    @model_validator(mode="after")
    def _cohort_fits(self) -> "FederationConfig":
        if self.cohort > self.num_clients:
            raise ValueError(
                f"cohort = {self.cohort} is larger than num_clients = {self.num_clients}; "
                f"allowed: 1 to {self.num_clients}"
            )
        return self


def _none(value: Any) -> Any:
    return None if value == "none" else value  # TOML has no null


_Positive = Annotated[float, Field(gt=0)]
_CountryCode = Annotated[str, Field(pattern="^[A-Z]{3}$")]
# What changes no result, and so is no part of run_id.
_OBSERVING = ("system", "energy", "devices")


class ClientsConfig(_Section):
    """Clients that fail a round: see bench/run/arrivals.py. By default none does.

    dropout: probability that a client vanishes in a round; speed_spread: standard deviation of the
    logarithm of clients' speeds; over_selection: clients drawn, as a multiple of the cohort;
    deadline_seconds: of a round, in modelled time; "none": no deadline.
    """

    dropout: float = Field(0.0, ge=0, lt=1)
    speed_spread: float = Field(0.0, ge=0, le=3)
    over_selection: float = Field(1.0, ge=1)
    deadline_seconds: Annotated[_Positive | None, BeforeValidator(_none)] = None

    @property
    def timed(self) -> bool:
        """Whether modelled time decides whose upload counts."""
        return self.over_selection > 1 or self.deadline_seconds is not None


class TrainConfig(_Section):
    """One client's local training. Set local_steps or local_epochs, not both.

    max_grad_norm: gradients are clipped to this norm; "none" leaves them as they are.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_rounds: int = Field(0, ge=0)
    max_grad_norm: Annotated[_Positive | None, BeforeValidator(_none)] = 1.0
    local_steps: int | None = Field(None, ge=1)
    local_epochs: int | None = Field(None, ge=1)
    batch_size: int = Field(16, ge=1, le=1 << 20)
    precision: Literal["fp32", "bf16"] = "fp32"

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if (self.local_steps is None) == (self.local_epochs is None):
            raise ValueError("set exactly one of local_steps and local_epochs")
        return self


Codec = Literal["fp32", "bf16", "fp16", "int8", "int4"]


class CodecConfig(_Section):
    """How values travel between clients and server: see fedara_core/codec.py.

    error_feedback: what a codec's rounding leaves out of one message is added to the next one; kept
    by each client for its uploads, and by the server for what it sends.
    """

    up: Codec = "fp32"
    down: Codec = "fp32"
    error_feedback: bool = False

    @model_validator(mode="after")
    def _feedback_has_errors(self) -> "CodecConfig":
        if self.error_feedback and self.up == self.down == "fp32":
            raise ValueError(
                "error_feedback = true, and fp32 leaves nothing out; allowed: a lossy up or down "
                "(bf16, fp16, int8, int4), or false"
            )
        return self


class EvaluateConfig(_Section):
    every: int = Field(1, ge=1)
    split: Literal["test", "validation"] = "test"
    eval_examples: int | None = Field(None, ge=1)
    batch_size: int = Field(64, ge=1, le=1 << 20)


class SystemConfig(_Section):
    """Where it runs; no part of run_id.

    threads: intra-op threads of each process. checkpoint_every: rounds between two checkpoints; a
    job that is killed goes on after the last one, and runs the rounds after it again.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | Literal["auto"] = "auto"
    checkpoint_every: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _threads_positive(self) -> "SystemConfig":
        if self.threads != "auto" and not 1 <= self.threads <= 4096:
            raise ValueError(
                f"threads = {self.threads} is not allowed; allowed: auto, or 1 to 4096"
            )
        return self


class EnergyConfig(_Section):
    """How energy is measured; no part of run_id.

    country_iso_code: three letters, whose electricity makes the CO2; "none" records no CO2.
    idle_seconds: length of the idle window, once a job, where there are counters; 0: none.
    """

    enabled: bool = True
    country_iso_code: Annotated[_CountryCode | None, BeforeValidator(_none)] = None
    idle_seconds: float = Field(3.0, ge=0)


class DevicesConfig(_Section):
    """Edge devices to model each round on; no part of run_id. See bench/metering/devices.py.

    names: each as if all clients had it. shares: a mixed federation, the share of the clients by
    device. file: TOML with profiles of one's own, as in bench/devices.toml.
    """

    names: list[str] = ["agx_orin", "orin_nano", "raspberry_pi_5"]
    shares: dict[str, float] = {}
    file: str | None = None


class RunConfig(_Section):
    """One run: one method, one data set, one seed."""

    seed: int = Field(0, ge=0, lt=2**31)
    method: MethodConfig
    adapter: AdapterSection = AdapterSection()
    model: ModelConfig = ModelConfig()
    dataset: DatasetConfig = DatasetConfig()
    partition: PartitionConfig = PartitionConfig()
    federation: FederationConfig = FederationConfig()
    clients: ClientsConfig = ClientsConfig()
    codec: CodecConfig = CodecConfig()
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    system: SystemConfig = SystemConfig()
    energy: EnergyConfig = EnergyConfig()
    devices: DevicesConfig = DevicesConfig()

    @model_validator(mode="after")
    def _method_exists(self) -> "RunConfig":
        method = make_method(self.method)
        if self.adapter.client_lora_ranks and not method.uses_client_lora_ranks:
            able = [name for name in method_names() if load_method(name).uses_client_lora_ranks]
            raise ValueError(
                f"adapter.client_lora_ranks is set, and method.name = {self.method.name!r} trains "
                f"the same lora_rank at every client; allowed: {', '.join(able) or 'none'}"
            )
        if method.combine == "gather" and self.federation.merge_path in ("split", "allreduce"):
            raise ValueError(
                f"federation.merge_path = {self.federation.merge_path!r} sums on the way, and "
                f"method.name = {self.method.name!r} needs every client's factors; allowed: "
                "allgather, auto"
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
    def num_drawn(self) -> int:
        """Clients that a round draws: the cohort, and more where some may fail."""
        # Of the decimal as written: 10 x 1.1 is 11, and a little more in binary.
        return math.ceil(self.federation.cohort * Fraction(str(self.clients.over_selection)))

    def settings(self) -> dict[str, Any]:
        """Every setting with its default filled in, the method's hyperparameters included."""
        hyperparameters = dataclasses.asdict(make_method(self.method))
        settings = self.model_dump(mode="json")
        settings["method"] = {"name": self.method.name, **hyperparameters}
        return settings

    def canonical(self) -> dict[str, Any]:
        """The settings without where files lie on this machine."""
        settings = self.settings()
        # Where a folder lies is no setting (the record holds the data's digest); its name is.
        if self.dataset.name.startswith("file:"):
            settings["dataset"]["name"] = f"file:{self.dataset.short_name}"
        if self.devices.file is not None:  # as above; the record holds the numbers
            settings["devices"]["file"] = Path(self.devices.file).name
        return settings

    def deciding(self) -> dict[str, Any]:
        """The canonical config without what changes no result."""
        canonical = self.canonical()
        deciding = {k: value for k, value in canonical.items() if k not in _OBSERVING}
        if self.clients == ClientsConfig():  # as in runs from before there was this section
            del deciding["clients"]
        if self.model.attention == ModelConfig().attention:  # as above
            del deciding["model"]["attention"]
        if self.clients.timed:  # the devices' order decides who has which
            devices = canonical["devices"]
            deciding["devices"] = [
                [list(pair) for pair in devices["shares"].items()],
                devices["file"],
            ]
        return deciding

    @property
    def config_hash(self) -> str:
        """SHA-256 of what decides the result, in hex."""
        return hashlib.sha256(json.dumps(self.deciding(), sort_keys=True).encode()).hexdigest()

    @property
    def run_id(self) -> str:
        dataset = self.dataset.short_name.replace(":", "-")
        return f"{dataset}-{self.method.name}-seed{self.seed}-{self.config_hash[:10]}"


def load_runs(path: Path, overrides: list[str]) -> list[RunConfig]:
    """Read a TOML file, apply `section.key=value` overrides, and expand its [sweep] table.

    A [sweep] table holds `points` (a list of tables, each with the keys that differ) and any number
    of dotted config keys with a list of values; the runs are points x grid, in the order written.
    """
    table = read_toml(path, "config")
    sweep = table.pop("sweep", {})
    if not isinstance(sweep, dict):
        raise InputError("sweep must be a table of lists: [sweep]")
    points = sweep.pop("points", [{}])
    if not isinstance(points, list) or not points or not all(isinstance(p, dict) for p in points):
        raise InputError(f"sweep.points must be a non-empty list of tables, not {points!r}")
    chosen = [_parse_override(text) for text in overrides]
    # A --set of a key that the sweep also varies fixes it.
    grid = dict(sweep)
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"sweep.{key} must be a non-empty list of values, not {values!r}")
    for key, value in chosen:
        grid.pop(key, None)
        points = _fixed(points, key, value)
    runs = []
    for point in points:
        for values in itertools.product(*grid.values()):
            merged = _merge(table, point)
            for key, value in [*zip(grid, values, strict=True), *chosen]:
                merged = _merge(merged, _nested(key, value))
            runs.append(parse_run(merged))
    chosen_runs: dict[str, RunConfig] = {}
    for run in runs:
        first = chosen_runs.setdefault(run.run_id, run)
        if first.settings() != run.settings():
            raise InputError(
                f"sweep: two points differ only in {_unlike(first, run)}, which names no run of "
                "its own; allowed: one of its values, and another --results for each further one"
            )
    return list(chosen_runs.values())


def _unlike(first: RunConfig, second: RunConfig) -> str:
    """The keys in which two configs of one run_id differ."""
    one, other = first.settings(), second.settings()
    keys = [
        f"{section}.{key}"
        for section in one.keys() - {"seed"}
        for key in one[section]
        if one[section][key] != other[section][key]
    ]
    return ", ".join(sorted(keys))


def load_record(path: Path, overrides: list[str]) -> RunConfig:
    """The config of a record's run.json, with overrides: where data lie is not in it."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no record that can be read ({error!r})") from None
    for key, value in map(_parse_override, overrides):
        table = _merge(table, _nested(key, value))
    return parse_run(table)


def _fixed(points: list[dict[str, Any]], key: str, value: Any) -> list[dict[str, Any]]:
    """The points that agree with key = value, if the points vary the key; else all of them.

    So that --set method.name=lora picks the sweep's lora, with the settings written beside it.
    """
    own = [_lookup(point, key) for point in points]
    return [point for point, found in zip(points, own, strict=True) if found == value] or points


def _lookup(table: Any, key: str) -> Any:
    for part in key.split("."):
        table = table.get(part) if isinstance(table, dict) else None
    return table


def parse_run(table: dict[str, Any]) -> RunConfig:
    """Validate one run's table; raises InputError with one line that names key, value and rule."""
    try:
        return RunConfig.model_validate(table)
    except ValidationError as error:
        raise InputError("; ".join(_explain(item) for item in error.errors())) from None


def _explain(item: Any) -> str:
    # Of a union pydantic names the member too, such as "targets.list[str]"; keys have no brackets.
    parts = [str(part) for part in item["loc"]]
    key = ".".join(part for part in parts if "[" not in part and part not in ("str", "int"))
    if item["type"] == "extra_forbidden":
        section = RunConfig.model_fields.get(str(item["loc"][0])) if len(item["loc"]) > 1 else None
        fields = section.annotation.model_fields if section else RunConfig.model_fields  # type: ignore[union-attr]
        return f"unknown key {key}; allowed here: {', '.join(fields)}"
    if item["type"] == "missing":
        return f"{key} is missing; it has no default"
    if item["type"] == "value_error":
        return f"{key}: {item['ctx']['error']}" if key else str(item["ctx"]["error"])
    return f"{key} = {item['input']!r} is not allowed: {item['msg']}"


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {text!r} is not of the form section.key=value")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()  # a bare word is a string: --set method.name=lora


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for one, other in (("local_steps", "local_epochs"), ("local_epochs", "local_steps")):
        if one in over and other not in over:
            merged.pop(other, None)  # the two exclude each other: the later setting counts
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
