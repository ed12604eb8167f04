"""The keys of a config, one class per section: types, limits, defaults and what each key means. The
string under a key is its reference; `fedara list keys` prints them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _none(value: Any) -> Any:
    return None if value == "none" else value  # TOML has no null


# Of something elsewhere: a file, a folder, or on the hub.
_Name = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f]*$")]
Schedule = Literal["constant", "linear", "cosine"]
Codec = Literal["fp32", "bf16", "fp16", "int8", "int4"]
_PositiveOrNone = Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(_none)]
_CountryOrNone = Annotated[
    Annotated[str, Field(pattern="^[A-Z]{3}$")] | None, BeforeValidator(_none)
]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class MethodConfig(BaseModel):
    """The method and its hyperparameters."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: str
    """A file of fedara_core/methods. Other keys of this section are that method's hyperparameters;
    `fedara list methods -v` lists them."""

    @property
    def hyperparameters(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class ClientLoraRank(Section):
    """A group of clients that can afford the same lora_rank."""

    lora_rank: int = Field(ge=1)
    """The largest lora_rank that these clients can train."""

    share: float = Field(gt=0, le=1)
    """The group's share of all clients."""


class AdapterConfig(Section):
    """The adapters. All methods share these settings, so that no method has better defaults."""

    lora_rank: int = Field(default=12, ge=1)
    """Triplets (LoRA's rank) of each adapter."""

    lora_alpha: float = Field(default=12.0, gt=0)
    """LoRA's alpha: an adapter's output is scaled by lora_alpha / lora_rank."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """LoRA dropout (PEFT's lora_dropout): in training each input of a low-rank branch is zero with
    this probability. Only for methods that have such branches."""

    fused: bool = True
    """Whether low-rank adapters have products and a backward pass of their own: in fp32 W0 + s B A
    is formed once a step. If not, torch differentiates the plain products. Other last bits."""

    targets: str | list[str] = "all-linear"
    """Layers that get an adapter: "all-linear", or endings of layer names, such as ["query"]."""

    client_lora_ranks: list[ClientLoraRank] = []
    """Groups of clients with unequal capacities, such as [{ lora_rank = 4, share = 1.0 }]. Empty:
    every client trains lora_rank. Only for methods that use it."""

    @model_validator(mode="after")
    def _targets_some(self) -> "AdapterConfig":
        if not self.targets:
            raise ValueError(
                f"targets = {self.targets!r} adapts nothing, which is method.name = 'head_only'; "
                "allowed: all-linear, or names of layers"
            )
        return self

    @model_validator(mode="after")
    def _client_lora_ranks_fit(self) -> "AdapterConfig":
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


class ModelConfig(Section):
    """The encoder and its classification head."""

    name: _Name = "minilm"
    """A built-in model (`fedara list models`), a transformers model's folder, or a hub name."""

    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """How attention is computed: torch's "sdpa", or plain products, "eager". "auto": "eager" on
    CPUs, where it is as fast in fp32 and faster in bf16, "sdpa" on GPUs. run.json tells which."""

    packing: bool = True
    """Whether the texts of a batch follow one another without padding, in models that allow it.
    run.json tells whether they do."""

    dropout_masks: Literal["words", "torch"] = "words"
    """Where dropout's masks come from on a CPU: "words" of 16 random bits, or torch's slower
    generator of probabilities."""

    pooling: Literal["model", "mean"] = "mean"
    """The head. "mean": a linear layer on the mean of the last hidden states; "model": the head
    that the architecture comes with."""

    max_length: int = Field(default=64, ge=4)
    """Tokens; longer texts are cut."""

    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout of the encoder in training. If it is not set, the model's own."""


class DatasetConfig(Section):
    """The texts and their labels."""

    name: _Name = "docstrings"
    """A built-in set (`fedara list datasets`), file:DIR, or a hub name[:configuration]."""

    text_column: str = "text"
    """Column of the texts, in file:DIR and hub sets."""

    label_column: str = "label"
    """Column of the labels, in file:DIR and hub sets."""

    validation_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Part of the training examples that no client gets; evaluate.split = "validation" uses it."""

    @property
    def short_name(self) -> str:
        """The last part of a folder's path or of a hub name."""
        return self.name.removeprefix("file:").rstrip("/").split("/")[-1]

    @property
    def recorded_name(self) -> str:
        """The name without the place of a folder on this machine, for records."""
        return f"file:{self.short_name}" if self.name.startswith("file:") else self.name


class PartitionConfig(Section):
    """How the training examples are split among the clients; see bench/data/partition.py."""

    scheme: Literal["iid", "dirichlet", "shards", "quantity"] = "dirichlet"
    """ "iid": equal random parts. "dirichlet": skewed labels. "shards": few labels per client.
    "quantity": skewed sizes."""

    alpha: float = Field(default=0.1, gt=0, le=1e6)
    """Concentration of "dirichlet" and "quantity"; the smaller, the more skew."""

    labels_per_client: int = Field(default=2, ge=1)
    """Shards that each client gets, for "shards"."""

    min_examples: int = Field(default=1, ge=1)
    """Every client has at least so many examples."""


class FederationConfig(Section):
    """Clients, rounds, and how uploads are combined."""

    num_clients: int = Field(default=20, ge=1)
    """Clients in all."""

    cohort: int = Field(default=10, ge=1)
    """Clients whose uploads make a round."""

    num_rounds: int = Field(default=10, ge=1)
    """Communication rounds."""

    merge_path: Literal["allgather", "split", "allreduce", "auto"] = "allgather"
    """How uploads are combined; see fedara_core/merge. "allgather" and "split" give the same bits
    for any number of processes, "allreduce" does not. "auto": the cheaper of the first two."""

    server_optimizer: Literal["fedavg", "fedavgm", "fedadam", "fedyogi"] = "fedavg"
    """What the server does with the clients' mean; see fedara_core/server.py. "fedavg": it is the
    next state (at server_lr 1); the others take its change as a pseudo-gradient (arXiv 1909.06335,
    2003.00295). Only for methods whose rows keep their meaning from round to round."""

    server_lr: float = Field(default=1.0, gt=0)
    """The server's learning rate. If it is not set, 0.01 for "fedadam" and "fedyogi" (their paper
    tunes it), which move every value by about as much in a round."""

    server_momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of "fedavgm", beta1 of "fedadam" and "fedyogi"."""

    server_beta2: float = Field(default=0.99, ge=0, lt=1)
    """beta2 of "fedadam" and "fedyogi"."""

    server_tau: float = Field(default=1e-3, gt=0)
    """tau of "fedadam" and "fedyogi": the smaller, the more adaptive."""

    @model_validator(mode="before")
    @classmethod
    def _lr_of_adaptive(cls, table: Any) -> Any:
        if isinstance(table, dict) and table.get("server_optimizer") in ("fedadam", "fedyogi"):
            return {"server_lr": 0.01, **table}
        return table

    @model_validator(mode="after")
    def _cohort_fits(self) -> "FederationConfig":
        if self.cohort > self.num_clients:
            raise ValueError(
                f"cohort = {self.cohort} is larger than num_clients = {self.num_clients}; "
                f"allowed: 1 to {self.num_clients}"
            )
        return self


class ClientsConfig(Section):
    """Clients that fail a round; see bench/run/arrivals.py. By default none does."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability that a drawn client vanishes after its download."""

    speed_spread: float = Field(default=0.0, ge=0, le=3)
    """Standard deviation of the logarithm of clients' speeds."""

    over_selection: float = Field(default=1.0, ge=1)
    """Clients drawn per round, as a multiple of federation.cohort; the first uploads count."""

    deadline_seconds: _PositiveOrNone = None
    """Longest round, in modelled time; later uploads are dropped. "none": no deadline."""

    @property
    def timed(self) -> bool:
        """Whether modelled time decides whose upload counts."""
        return self.over_selection > 1 or self.deadline_seconds is not None


class CodecConfig(Section):
    """How values travel between clients and server; see fedara_core/codec.py."""

    up: Codec = "fp32"
    """Codec of the uploads."""

    down: Codec = "fp32"
    """Codec of the downloads."""

    error_feedback: bool = False
    """Whether a sender adds to each message what rounding left out of its last one."""

    @model_validator(mode="after")
    def _feedback_has_errors(self) -> "CodecConfig":
        if self.error_feedback and self.up == self.down == "fp32":
            raise ValueError(
                "error_feedback = true, and fp32 leaves nothing out; allowed: a lossy up or down "
                "(bf16, fp16, int8, int4), or false"
            )
        return self


class TrainConfig(Section):
    """Local training of one client. Set either local_steps or local_epochs."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """The clients' optimiser; it starts afresh in each round."""

    lr: float = Field(default=1e-3, gt=0)
    """Learning rate."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of what trains."""

    warmup_rounds: int = Field(default=0, ge=0)
    """Rounds in which the learning rate grows linearly to lr."""

    schedule: Schedule = "constant"
    """The learning rate within a round: after s of a client's S local steps the round's is
    multiplied by 1 ("constant"), 1 - s / S ("linear") or (1 + cos(pi s / S)) / 2 ("cosine")."""

    round_schedule: Schedule = "constant"
    """The same across rounds: after s of the S rounds that follow warmup_rounds."""

    proximal_mu: float = Field(default=0.0, ge=0)
    """FedProx's mu (arXiv 1812.06127, eq. 2): mu / 2 times the squared distance of all that trains
    from where the round started is added to the clients' loss."""

    max_grad_norm: _PositiveOrNone = 1.0
    """Gradients are clipped to this norm. "none": they are not clipped."""

    local_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps of a client in a round."""

    local_epochs: int | None = Field(default=None, ge=1)
    """Passes of a client over its examples in a round."""

    batch_size: int = Field(default=16, ge=1, le=1 << 20)
    """Examples of an optimiser step."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the forward and backward pass; parameters stay in fp32."""

    frozen_prefix: Literal["recompute", "cache"] = "recompute"
    """Layers below the lowest one that trains: "recompute" runs them in every step. "cache" runs
    them once for each text, without dropout, and keeps the hidden states, in bf16 where precision
    is. In models that read packed texts (model.packing)."""

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if (self.local_steps is None) == (self.local_epochs is None):
            raise ValueError("set exactly one of local_steps and local_epochs")
        return self


class EvaluateConfig(Section):
    """When and on what the model is evaluated."""

    every: int = Field(default=1, ge=1)
    """Rounds between two evaluations; the last round is always evaluated."""

    split: Literal["test", "validation"] = "test"
    """ "validation" to tune, "test" to report."""

    eval_examples: int | None = Field(default=None, ge=1)
    """Examples to evaluate on in all rounds but the last. If it is not set, all."""

    batch_size: int = Field(default=64, ge=1, le=1 << 20)
    """Examples of a forward pass."""


class SystemConfig(Section):
    """Where the run executes; no part of run_id."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """ "auto": a GPU if torch sees one, else the CPU."""

    threads: int | Literal["auto"] = "auto"
    """Threads of each process. "auto": OMP_NUM_THREADS, SLURM_CPUS_PER_TASK, or an equal share of
    the host's cores. Other numbers of threads give other bits."""

    checkpoint_every: int = Field(default=1, ge=1)
    """Rounds between two checkpoints. A job that was killed repeats the rounds after the last."""

    prefix_mb: int = Field(default=1024, ge=1)
    """Most megabytes of each process for train.frozen_prefix = "cache". The bits do not depend on
    it."""

    @model_validator(mode="after")
    def _threads_positive(self) -> "SystemConfig":
        if self.threads != "auto" and not 1 <= self.threads <= 4096:
            raise ValueError(
                f"threads = {self.threads} is not allowed; allowed: auto, or 1 to 4096"
            )
        return self


class EnergyConfig(Section):
    """How energy is measured; no part of run_id."""

    enabled: bool = True
    """Whether energy is measured."""

    country_iso_code: _CountryOrNone = None
    """Three letters, such as "DEU": whose electricity mix gives the CO2. "none": no CO2."""

    idle_seconds: float = Field(default=3.0, ge=0)
    """Length of the idle window before the first run, on hosts with counters; 0: none."""


class DevicesConfig(Section):
    """Edge devices to model each round on; see bench/metering/devices.py. No part of run_id, unless
    modelled time decides whose upload counts."""

    names: list[str] = ["agx_orin", "orin_nano", "raspberry_pi_5"]
    """Devices to model one by one, as if all clients had that device."""

    shares: dict[str, float] = {}
    """A mixed federation: device -> share of the clients."""

    file: str | None = None
    """TOML file with more devices, in the format of bench/metering/devices.toml."""
