"""Full fine-tuning: against plain loops and FedAvg by hand; nothing travels that can not train."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from bench.config.sections import ModelConfig
from bench.models.encoders import build_model
from bench.run.clients import client_batches
from bench.run.job import Job
from fedara_core.adapters import AdaptedModel, AdapterSpec, inject
from fedara_core.methods.full import Full
from fedara_core.state import Start
from support.rounds import make_tiny_job, play_rounds

FULL = (
    *("method.name=full", "model.name=tiny", "model.dropout=0.0"),
    *("train.lr=2e-3", "train.local_steps=3"),
)
# The tiny model: embeddings with their layer norm, two layers, the head.
NUM_EMBEDDINGS = (2000 + 128 + 2) * 32 + 2 * 32
NUM_LAYER = 4 * (32 * 32 + 32) + (64 * 32 + 64) + (32 * 64 + 32) + 2 * 2 * 32
NUM_VALUES = NUM_EMBEDDINGS + 2 * NUM_LAYER + 4 * 32 + 4


def plain_client(
    job: Job, weights: Mapping[str, Tensor], round_index: int, client_id: int
) -> tuple[dict[str, Tensor], float]:
    """One client's plain fine-tuning; weights go by the names they have before `inject`."""
    model = build_model(job.config.model, num_classes=4, seed=job.config.seed).model
    model.load_state_dict(weights, strict=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.training.lr, weight_decay=0.0)
    losses = []
    model.train()
    for batch in client_batches(job, round_index, client_id):
        optimizer.zero_grad()
        logits = model(batch["input_ids"], batch["attention_mask"])
        loss = functional.cross_entropy(logits, batch["labels"])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    return after, sum(losses) / len(losses)


def plain_names(whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(".base.", "."): tensor for name, tensor in whole.items()}


def assert_weights(whole: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    found = plain_names(whole)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if not name.endswith(".key.bias"):  # it moves no softmax: its gradient is rounding alone
            # AdamW carries the rounding of small gradients into whole steps, by CPU differently.
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=3e-6)


def test_one_client_is_plain_fine_tuning() -> None:
    job = make_tiny_job(*FULL, "federation.num_clients=1", "federation.cohort=1")
    weights = plain_names(job.state.whole)
    assert len(weights) == 39
    for played in play_rounds(job, num_rounds=2):
        weights, loss = plain_client(job, weights, played.before.round_index, 0)
        assert_weights(played.after.whole, weights)
        assert played.row["train_loss"] == pytest.approx(loss, abs=1e-6)
    moved = {
        name: float((tensor - job.state.whole[name]).abs().max())
        for name, tensor in played.after.whole.items()
    }
    assert min(moved.values()) > 0
    assert moved["encoder.embeddings.word_embeddings.weight"] > 1e-3


def test_the_server_takes_the_weighted_mean_of_all_weights() -> None:
    job = make_tiny_job(*FULL, "federation.cohort=3")
    weights: Mapping[str, Tensor] = plain_names(job.state.whole)
    for played in play_rounds(job, num_rounds=2):
        num_examples = [len(job.shards[client_id]) for client_id in played.row["cohort"]]
        assert len(set(num_examples)) > 1
        clients = [
            plain_client(job, weights, played.before.round_index, client_id)[0]
            for client_id in played.row["cohort"]
        ]
        weights = {
            name: sum(
                n / sum(num_examples) * client[name]
                for n, client in zip(num_examples, clients, strict=True)
            )
            for name in weights
        }
        assert_weights(played.after.whole, weights)


def test_with_a_frozen_encoder_it_is_a_linear_probe() -> None:
    job = make_tiny_job(*FULL)
    for name, parameter in job.model.module.named_parameters():
        parameter.requires_grad_(name.startswith("classifier."))
    start = Start(model=job.model, adapter=job.state.adapter, seed=0, num_rounds=6)
    state = start.state(job.method, {})
    ours = play_rounds(job, state, 2)
    probe = play_rounds(make_tiny_job("method.name=head_only", *FULL[1:]), num_rounds=2)
    assert [r.row["state_digest"] for r in ours] == [r.row["state_digest"] for r in probe]


@pytest.mark.parametrize("targets", ["all-linear", "['query', 'value']"])
def test_bytes_by_hand(targets: str) -> None:
    """First and later participations alike; adapter.targets have no say."""
    job = make_tiny_job(*FULL, f"adapter.targets={targets}")
    for played in play_rounds(job, num_rounds=2):
        assert played.row["uplink_bytes"] == 5 * (24 + 4 * NUM_VALUES)
        num_values = NUM_VALUES if played.row["round_index"] else 0  # the start is everybody's
        assert played.row["downlink_bytes"] == 5 * (24 + 4 * num_values)
        assert played.row["live_triplets"] == 0


# ---- what has no gradient does not travel ----

_BERT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
_DISTILBERT = {"vocab_size": 50, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2}
ENCODERS = {
    "bert": transformers.BertConfig(**_BERT),
    "roberta": transformers.RobertaConfig(**_BERT),
    "distilbert": transformers.DistilBertConfig(**_DISTILBERT),
    "llama": transformers.LlamaConfig(**_BERT, num_key_value_heads=1),
}


def assert_every_parameter_has_a_gradient(config: ModelConfig) -> nn.Module:
    classifier = build_model(config, num_classes=3, seed=0)
    model = inject(classifier.model, "all-linear", classifier.head)
    adapter = AdapterSpec(lora_rank=4, lora_alpha=4.0, client_lora_ranks=(4,), shapes=model.shapes)
    state = Full().init(Start(model=model, adapter=adapter, seed=0, num_rounds=1))
    assert set(state.whole) == {name for name, _ in model.module.named_parameters()}
    ids = torch.arange(3, 19).reshape(2, 8)
    model.module(ids, torch.ones_like(ids)).square().sum().backward()
    unused = [name for name, p in model.module.named_parameters() if p.grad is None]
    assert unused == []
    return model.module


@pytest.mark.parametrize("pooling", ["mean", "model"])
@pytest.mark.parametrize("architecture", list(ENCODERS))
def test_no_parameter_travels_without_training(architecture: str, pooling: str) -> None:
    """With mean pooling there is no pooler; with the model's own head BERT's pooler is used."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        transformers.AutoModel.from_config(ENCODERS[architecture]).save_pretrained(folder)
        config = ModelConfig(name=folder, pooling=pooling, max_length=16)  # type: ignore[arg-type]
        model = assert_every_parameter_has_a_gradient(config)
    has_pooler = any(".pooler." in name for name, _ in model.named_parameters())
    assert has_pooler == (architecture == "bert" and pooling == "model")


def test_nor_does_one_of_the_demo_encoder() -> None:
    assert_every_parameter_has_a_gradient(ModelConfig(name="minilm", max_length=16))


def test_a_shared_parameter_travels_once() -> None:
    job = make_tiny_job(*FULL)
    module = job.model.module
    first, second = (module.encoder.encoder.layer[i].intermediate.dense for i in (0, 1))
    second.base.weight = first.base.weight
    job = replace(job, model=AdaptedModel(module), counter=None)  # which found them before
    state = job.method.init(Start(model=job.model, adapter=job.state.adapter, seed=0, num_rounds=6))
    assert sum(t.numel() for t in state.whole.values()) == NUM_VALUES - 64 * 32
    after = play_rounds(job, state, 1)[0].after
    name = "encoder.encoder.layer.0.intermediate.dense.base.weight"
    assert not torch.equal(after.whole[name], state.whole[name])
    assert torch.equal(second.base.weight, after.whole[name])
