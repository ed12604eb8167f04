"""Bottleneck adapters: a module written by hand, placements, the reduction to a probe, bytes."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from bench.models.encoders import build_model
from bench.run.clients import client_batches
from fedara_core.adapters import AdapterSpec, inject
from fedara_core.errors import InputError
from fedara_core.methods.fedadapter import Bottleneck, FedAdapter
from fedara_core.state import Start, with_parts
from support.adapted import join_rows
from support.rounds import logits_at_start, make_tiny_job, play_rounds

FEDADAPTER = ("method.name=fedadapter", "method.width=5", "model.dropout=0.0", "train.lr=1e-2")
NUM_HEAD = 4 * 32 + 4
HEAD = ("classifier.bias", "classifier.weight")
_BERT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}
_DISTILBERT = {"vocab_size": 50, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}
ENCODERS: dict[str, tuple[Any, str, str, str]] = {
    "bert": (
        transformers.BertConfig(**_BERT),
        *("encoder.layer", "attention.output.dense", "output.dense"),
    ),
    "roberta": (
        transformers.RobertaConfig(**_BERT, pad_token_id=1),
        *("encoder.layer", "attention.output.dense", "output.dense"),
    ),
    "distilbert": (
        transformers.DistilBertConfig(**_DISTILBERT, max_position_embeddings=40),
        *("transformer.layer", "attention.out_lin", "ffn.lin2"),
    ),
    "llama": (
        transformers.LlamaConfig(**_BERT, num_key_value_heads=1, pad_token_id=0),
        *("layers", "self_attn.o_proj", "mlp.down_proj"),
    ),
}


class PlainBottleneck(nn.Module):
    """A linear layer, then Houlsby's adapter with nn.Linear; no bias on the way up."""

    def __init__(self, base: nn.Linear, rows: Tensor, activation: nn.Module) -> None:
        super().__init__()
        d = base.out_features
        self.base, self.activation = base, activation
        self.down, self.up = nn.Linear(d, len(rows)), nn.Linear(len(rows), d, bias=False)
        with torch.no_grad():
            self.down.weight.copy_(rows[:, :d])
            self.down.bias.copy_(rows[:, d])
            self.up.weight.copy_(rows[:, d + 1 :].T)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.up(self.activation(self.down(y)))

    def rows(self) -> Tensor:
        parts = [self.down.weight, self.down.bias[:, None], self.up.weight.T]
        return torch.cat(parts, dim=1).detach()


@pytest.mark.parametrize(
    ("placement", "activation"), [("houlsby", nn.GELU()), ("pfeiffer", nn.ReLU())]
)
def test_one_client_trains_like_a_module_written_by_hand(
    placement: str, activation: nn.Module
) -> None:
    job = make_tiny_job(
        *(*FEDADAPTER, f"method.placement={placement}", "method.init_std=0.2"),
        *("federation.num_clients=1", "federation.cohort=1", "train.local_steps=6"),
    )
    model = build_model(job.config.model, num_classes=4, seed=job.config.seed).model
    model.requires_grad_(False)
    wrapped = {}
    for name, rows in join_rows(job.state.parts).items():
        parent, _, child = name.rpartition(".")
        wrapped[name] = PlainBottleneck(model.get_submodule(name), rows, activation)
        setattr(model.get_submodule(parent), child, wrapped[name])
    for name in HEAD:
        model.get_parameter(name).requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.training.lr, weight_decay=0.0)
    for batch in client_batches(job, 0, 0):
        optimizer.zero_grad()
        logits = model(batch["input_ids"], batch["attention_mask"])
        functional.cross_entropy(logits, batch["labels"]).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    after = play_rounds(job, num_rounds=1)[0].after
    first, last = join_rows(job.state.parts), join_rows(after.parts)
    assert last.keys() == wrapped.keys()
    for name, module in wrapped.items():
        torch.testing.assert_close(last[name], module.rows(), rtol=0, atol=1e-5)
        moved = (last[name] - first[name]).abs().amax(dim=0)
        assert all(part.max() > 1e-3 for part in (moved[:32], moved[32], moved[33:]))
    for name in HEAD:
        torch.testing.assert_close(after.whole[name], model.get_parameter(name), rtol=0, atol=1e-5)


def test_the_start_is_nearly_the_identity() -> None:
    job = make_tiny_job("method.name=fedadapter")
    drawn = torch.cat(list(join_rows(job.state.parts).values()))
    assert drawn.shape == (4 * 64, 65)
    assert not drawn[:, 32].any()
    for half in (drawn[:, :32], drawn[:, 33:]):
        assert half.abs().max() <= 0.02
        assert float(half.std()) == pytest.approx(0.0088, rel=0.02)  # 0.88 x 0.01: the cut
    assert len(drawn[:, 0].unique()) == len(drawn)  # no two layers start alike
    before, after = logits_at_start(job)
    assert 0 < (after - before).abs().max() < 1e-2


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_without_a_living_unit_it_is_a_linear_probe(placement: str) -> None:
    """Zero rows never move, as each half's gradient is a product with the other."""
    job = make_tiny_job(*FEDADAPTER, f"method.placement={placement}")
    zero = {
        part: {name: torch.zeros_like(rows) for name, rows in own.items()}
        for part, own in job.state.parts.items()
    }
    start = with_parts(job.state, job.method.form(job.state), zero, job.state.whole)
    ours = play_rounds(job, start, 2)
    probe = play_rounds(make_tiny_job("method.name=head_only", *FEDADAPTER[2:]), num_rounds=2)
    for our, their in zip(ours, probe, strict=True):
        assert our.row["train_loss"] == pytest.approx(their.row["train_loss"], abs=1e-6)
        for name, tensor in their.after.whole.items():
            torch.testing.assert_close(our.after.whole[name], tensor, rtol=0, atol=1e-6)
    assert not any(rows.any() for rows in join_rows(ours[-1].after.parts).values())
    living = play_rounds(job, num_rounds=2)[-1].row["train_loss"]
    assert abs(living - probe[-1].row["train_loss"]) > 1e-4


@pytest.mark.parametrize("architecture", list(ENCODERS))
def test_bottlenecks_follow_the_layers_that_end_a_sub_layer(architecture: str) -> None:
    config, layers, attention, feed_forward = ENCODERS[architecture]
    encoder = transformers.AutoModel.from_config(config)
    if hasattr(encoder, "pooler"):
        encoder.pooler = None
    model = inject(encoder, "all-linear", ())
    adapter = AdapterSpec(lora_rank=4, lora_alpha=4.0, client_lora_ranks=(4,), shapes=model.shapes)
    for placement, endings in {
        "houlsby": (attention, feed_forward),
        "pfeiffer": (feed_forward,),
    }.items():
        method = FedAdapter(placement=placement, width=7)  # type: ignore[arg-type]
        state = method.init(Start(model=model, adapter=adapter, seed=0, num_rounds=1))
        rows = join_rows(state.parts)
        assert set(rows) == {f"{layers}.{i}.{end}" for i in (0, 1) for end in endings}
        assert {tuple(own.shape) for own in rows.values()} == {(7, 33)}
        method.download(model, state, None)
        for name, layer in model.adapters.items():
            assert layer.num_live == (7 if name in rows else 0)


def test_a_model_of_its_own_head_has_no_bottleneck_in_pooler_or_head() -> None:
    job = make_tiny_job(
        *FEDADAPTER, "model.name=tiny", "model.pooling=model", "method.placement=pfeiffer"
    )
    layers = {f"model.bert.encoder.layer.{i}.output.dense" for i in (0, 1)}
    assert set(job.state.rank_masks) == set(job.state.parts["down"]) == layers


@pytest.mark.parametrize(
    ("placement", "targets", "missing"),
    [
        ("pfeiffer", "['query', 'value']", "feed-forward"),
        ("pfeiffer", "['attention.output.dense']", "feed-forward"),
        ("houlsby", "['intermediate.dense', 'attention.output.dense']", "feed-forward"),
        ("houlsby", "['layer.0.output.dense']", "attention"),
    ],
)
def test_targets_without_a_place_are_refused(placement: str, targets: str, missing: str) -> None:
    with pytest.raises(InputError, match=f"targets match no {missing} output layer; allowed: all-"):
        make_tiny_job(*FEDADAPTER, f"method.placement={placement}", f"adapter.targets={targets}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, r"method\.width = 0 must be above 0"),
        ({"init_std": 0.0}, r"method\.init_std = 0\.0 must be above 0"),
    ],
)
def test_wrong_hyperparameters_are_refused(settings: Mapping[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FedAdapter(**settings)


@pytest.mark.parametrize(("placement", "num_layers"), [("houlsby", 4), ("pfeiffer", 2)])
def test_bytes_by_hand(placement: str, num_layers: int) -> None:
    """First and later participations alike, but for round 0, whose start is free; lora_rank has no
    say."""
    expected = 24 + 4 * (num_layers * 5 * (32 + 1 + 32) + NUM_HEAD)
    job = make_tiny_job(*FEDADAPTER, f"method.placement={placement}", "adapter.lora_rank=2")
    for played in play_rounds(job, num_rounds=3):
        assert played.row["uplink_bytes"] == 5 * expected
        assert played.row["downlink_bytes"] == 5 * (expected if played.row["round_index"] else 24)
        assert played.row["live_triplets"] == num_layers * 5
        assert played.row["live_adapters"] == num_layers


def test_forms_of_equal_activation_are_equal() -> None:
    assert Bottleneck(activation="gelu") == Bottleneck(activation="gelu")
    assert Bottleneck(activation="gelu") != Bottleneck(activation="relu")
