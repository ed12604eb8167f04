"""`fedara export`: a finished run as a Hugging Face PEFT adapter, or as a merged model.

A method whose layers are W0 + scale B A becomes a PEFT LoRA folder, with a lora_rank for each layer
and E folded into B. Any other whose layers are linear becomes a model with merged weights.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.config.load import parse_run
from bench.config.schema import RunConfig
from bench.models.encoders import MeanPooled, build_model
from bench.models.fit import FromConv1D, with_conv1d
from bench.models.source import load_tokenizer
from bench.run import checkpoint
from bench.run.clients import without_residual
from bench.run.identity import identity, weights_digest
from bench.run.job import adapt
from bench.run.record import read_run
from fedara_core import shapes
from fedara_core.adapters import AdaptedModel, Adapter
from fedara_core.errors import InputError
from fedara_core.method import Client
from fedara_core.state import ServerState

HUB_NAMES = {"minilm": "sentence-transformers/all-MiniLM-L6-v2"}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run's model with its trained state in it."""

    config: RunConfig
    adapted: AdaptedModel
    state: ServerState
    labels: list[str]

    @property
    def model(self) -> nn.Module:
        """The classifier."""
        return self.adapted.module

    @property
    def inner(self) -> Any:
        """The transformers model in the classifier."""
        return self.model.encoder if isinstance(self.model, MeanPooled) else self.model.model

    @property
    def prefix(self) -> str:
        """What stands before the inner model's own names."""
        return "encoder." if isinstance(self.model, MeanPooled) else "model."

    def is_encoder(self, name: str) -> bool:
        """Whether a parameter is the encoder's and not the head's."""
        pooled = isinstance(self.model, MeanPooled)
        return name.startswith("encoder." if pooled else f"model.{self.inner.base_model_prefix}.")

    @property
    def base_name(self) -> str:
        return HUB_NAMES.get(self.config.model.name, self.config.model.name)


def export(run_dir: Path, out: Path, client_id: int | None) -> str:
    """Write `out` and return what it is. Raises InputError; an existing folder is not touched."""
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; allowed: a new or an empty folder")
    trained = load_trained(run_dir, client_id)
    if trained.config.model.name == "toy":
        raise InputError(f"{run_dir}: 'toy' is no transformers model; allowed: runs of the others")
    pairs = lora_pairs(trained.adapted)
    in_encoder = [name for name in trained.adapted.whole_parameters if trained.is_encoder(name)]
    if pairs and not in_encoder:  # a LoRA folder holds no parameters that trained whole
        write, kind = write_peft, "PEFT adapter (LoRA)"
    else:
        write, kind = write_merged, "merged model"
        merge(trained.adapted)
    out.mkdir(parents=True, exist_ok=True)
    write(trained, out)
    if isinstance(trained.model, MeanPooled):
        # No transformers model has this head.
        save_file(trained.model.classifier.state_dict(), out / "head.safetensors")
    if trained.config.model.name != "tiny":
        load_tokenizer(trained.config.model).save_pretrained(out)
    rounds = f"round {trained.state.round_index} of {trained.state.num_rounds}"
    (out / "README.md").write_text(_readme(trained, kind, rounds), encoding="utf-8")
    return f"{kind}, {trained.config.method.name} after {rounds}"


def load_trained(run_dir: Path, client_id: int | None = None) -> Trained:
    """The model of a run as its last checkpoint has it; of one client where clients keep a part."""
    run_json, found = run_dir / "run.json", checkpoint.find_checkpoint(run_dir)
    if not run_json.exists() or not found:
        missing = checkpoint.FILE if run_json.exists() else "run.json"
        raise InputError(f"{run_dir} has no {missing}; allowed: the folder of a run with both")
    run = read_run(run_dir)
    shapes.require_keys(run, ["labels"], str(run_json))
    config = parse_run(run["config"])
    num_classes = len(run["labels"])
    classifier = build_model(config.model, num_classes=num_classes, seed=config.seed)
    found_digests = dict(run)
    if "weights_digest" in run:  # those of the record may lie elsewhere
        found_digests["weights_digest"] = weights_digest(classifier)
    model, method, state = adapt(config, classifier, torch.device("cpu"))
    state, client_state = checkpoint.restore(
        state, found.data, identity(config, found_digests, run.get("device_profiles", {}))
    )
    client = None
    if method.personal:
        if client_id not in client_state:
            raise InputError(
                f"--client {client_id}: {config.method.name} has a model for each client; "
                f"allowed: {', '.join(map(str, sorted(client_state)))}"
            )
        own = without_residual(client_state[client_id])
        client = Client(client_id=client_id, num_examples=0, model=model, kept=own)
    elif client_id is not None:
        raise InputError(
            f"--client {client_id}: {config.method.name} has one model for all "
            "clients; allowed: no --client"
        )
    method.download(model, state, client)
    model.module.eval()
    return Trained(config=config, adapted=model, state=state, labels=run["labels"])


def lora_pairs(model: AdaptedModel) -> dict[str, tuple[Tensor, Tensor]]:
    """A (r, d_in), B (d_out, r) of each adapter with live rows; none if one has no such form."""
    pairs = {}
    for name, adapter in model.adapters.items():
        if adapter.form is None:
            continue
        pair = adapter.form.pair(adapter)
        if pair is None or adapter.weight is not adapter.base.weight:
            return {}
        pairs[name] = pair
    return pairs


def write_peft(trained: Trained, out: Path) -> None:
    """adapter_config.json and adapter_model.safetensors."""
    scale, lora_rank = trained.state.adapter.scale, trained.state.adapter.lora_rank
    tensors, ranks = {}, {}
    for name, (a, b) in lora_pairs(trained.adapted).items():
        own = name.removeprefix(trained.prefix)
        ranks[own] = len(a)
        tensors[f"base_model.model.{own}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{own}.lora_B.weight"] = b.contiguous()
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": trained.base_name,
        "target_modules": sorted(ranks),
        "r": lora_rank,
        "lora_alpha": scale * lora_rank,
        # PEFT scales a layer by its alpha / its r; ours is one scale for all.
        "rank_pattern": {name: r for name, r in ranks.items() if r != lora_rank},
        "alpha_pattern": {name: scale * r for name, r in ranks.items() if r != lora_rank},
        "fan_in_fan_out": any(isinstance(layer, FromConv1D) for layer in trained.inner.modules()),
        "lora_dropout": trained.config.adapter.dropout,
        "bias": "none",
        "inference_mode": True,
    }
    if not isinstance(trained.model, MeanPooled):
        heads = {
            n.removeprefix(trained.prefix): p for n, p in trained.adapted.whole_parameters.items()
        }
        tensors |= {f"base_model.model.{n}": p.detach().contiguous() for n, p in heads.items()}
        config["task_type"] = "SEQ_CLS"
        config["modules_to_save"] = sorted({name.split(".")[0] for name in heads})
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, out / "adapter_model.safetensors")


def merge(model: AdaptedModel) -> None:
    """Replace each adapter by the linear layer that acts the same, read off its answers to the unit
    vectors. Raises InputError if the adapter is not linear."""
    for name, adapter in model.adapters.items():
        layer = _as_linear(adapter)
        if layer is None:
            raise InputError(
                f"layer {name} is no linear layer after training, so it has neither a PEFT form "
                "nor a merged one; allowed: runs of the other methods"
            )
        parent, _, child = name.rpartition(".")
        setattr(model.module.get_submodule(parent), child, layer)


@torch.no_grad()
def _as_linear(adapter: Adapter) -> nn.Linear | None:
    layer = adapter.base
    if adapter.form is None:
        return layer
    d_in = adapter.shape[1]
    zero, unit = torch.zeros(1, d_in), torch.eye(d_in)
    probe = torch.randn(8, d_in, generator=torch.Generator().manual_seed(0))
    expected = adapter(probe)
    bias = adapter(zero)  # (1, d_out)
    layer.weight.copy_((adapter(unit) - bias).T)
    if layer.bias is not None:
        layer.bias.copy_(bias[0])
    return layer if torch.allclose(layer(probe), expected, atol=1e-4) else None


def write_merged(trained: Trained, out: Path) -> None:
    """The transformers model with merged weights."""
    trained.inner.config.id2label = dict(enumerate(trained.labels))
    trained.inner.config.label2id = {label: i for i, label in enumerate(trained.labels)}
    with_conv1d(trained.inner)
    trained.inner.save_pretrained(out)


def _readme(trained: Trained, kind: str, rounds: str) -> str:
    """How to load the folder; logits need the mean-pooled head where there is one."""
    pooled = isinstance(trained.model, MeanPooled)
    auto = "AutoModel" if pooled else "AutoModelForSequenceClassification"
    labels = f", num_labels={len(trained.labels)}" if not pooled else ""
    lines = [f"# {trained.config.method.name}, {rounds}: {kind}", "", "```python"]
    lines.append(f"from transformers import {auto}")
    if kind == "merged model":
        lines.append(f'model = {auto}.from_pretrained("DIR")')
    else:
        lines += [
            "from peft import PeftModel",
            f'base = {auto}.from_pretrained("{trained.base_name}"{labels})',
            'model = PeftModel.from_pretrained(base, "DIR")',
        ]
    if pooled:
        lines += [
            "from safetensors.torch import load_file",
            'head = load_file("DIR/head.safetensors")',
            "hidden = model(**batch).last_hidden_state",
            'kept = batch["attention_mask"][..., None]',
            "pooled = (hidden * kept).sum(1) / kept.sum(1)",
            'logits = pooled @ head["weight"].T + head["bias"]',
        ]
    lines += ["```", "", f"Labels, in the order of the logits: {', '.join(trained.labels)}."]
    return "\n".join(lines) + "\n"
