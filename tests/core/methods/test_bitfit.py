"""BitFit: which parameters train, a plain loop, the reduction to full fine-tuning, bytes."""

from collections.abc import Mapping

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from bench.models.encoders import build_model
from bench.run.clients import client_batches
from bench.run.job import Job
from fedara_core.adapters import AdapterSpec, inject
from fedara_core.errors import InputError
from fedara_core.methods.bitfit import BitFit
from fedara_core.state import Start, with_parts
from support.rounds import make_tiny_job, play_rounds

BITFIT = ("method.name=bitfit", "model.dropout=0.0", "train.lr=1e-2", "train.local_steps=3")
# tiny.toml's model: the embeddings' layer norm; in each of two layers five linear layers of 32, one
# of 64 and two layer norms.
NUM_BIASES = 32 + 2 * (5 * 32 + 64 + 2 * 32)
NUM_HEAD = 4 * 32 + 4


def expected_names(prefix: str) -> set[str]:
    linear = ("attention.self.query", "attention.self.key", "attention.self.value")
    linear += ("attention.output.dense", "intermediate.dense", "output.dense")
    norms = ("attention.output.LayerNorm", "output.LayerNorm")
    layers = [f"{prefix}encoder.layer.{i}." for i in (0, 1)]
    return (
        {f"{prefix}embeddings.LayerNorm.bias"}
        | {f"{layer}{name}.base.bias" for layer in layers for name in linear}
        | {f"{layer}{name}.bias" for layer in layers for name in norms}
    )


def test_the_biases_and_the_head_train() -> None:
    job = make_tiny_job(*BITFIT)
    assert job.state.parts == {}
    head = {"classifier.bias", "classifier.weight"}
    assert set(job.state.whole) == expected_names("encoder.") | head
    trained = {name for name, p in job.model.module.named_parameters() if p.requires_grad}
    assert trained == set(job.state.whole)


def test_a_pooler_in_use_has_a_bias_that_trains() -> None:
    job = make_tiny_job(*BITFIT, "model.name=tiny", "model.pooling=model")
    rest = {"model.bert.pooler.dense.base.bias", "model.classifier.bias", "model.classifier.weight"}
    assert set(job.state.whole) == expected_names("model.bert.") | rest


def test_targets_have_no_say() -> None:
    """A bias has another name outside an adapter, and trains all the same."""
    wide, narrow = make_tiny_job(*BITFIT), make_tiny_job(*BITFIT, "adapter.targets=['query']")
    assert len(wide.state.whole) == len(narrow.state.whole) == 19
    ours, theirs = play_rounds(wide, num_rounds=1)[0].row, play_rounds(narrow, num_rounds=1)[0].row
    for key in ("train_loss", "accuracy", "uplink_bytes", "downlink_bytes"):
        assert ours[key] == theirs[key]


def plain_client(
    job: Job, weights: Mapping[str, Tensor], round_index: int, client_id: int
) -> dict[str, Tensor]:
    """One client's training of what `weights` names, by the names before `inject`."""
    model = build_model(job.config.model, num_classes=4, seed=job.config.seed).model
    model.load_state_dict(weights, strict=False)
    trained = {name: p for name, p in model.named_parameters() if name in weights}
    model.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.values(), lr=job.training.lr, weight_decay=0.0)
    model.train()
    for batch in client_batches(job, round_index, client_id):
        optimizer.zero_grad()
        logits = model(batch["input_ids"], batch["attention_mask"])
        functional.cross_entropy(logits, batch["labels"]).backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
    return {name: p.detach().clone() for name, p in trained.items()}


def plain_names(whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(".base.", "."): tensor for name, tensor in whole.items()}


def test_rounds_equal_plain_loops_and_their_weighted_mean() -> None:
    job = make_tiny_job(*BITFIT, "federation.cohort=3")
    start = weights = plain_names(job.state.whole)
    for played in play_rounds(job, num_rounds=2):
        num_examples = [len(job.shards[client_id]) for client_id in played.row["cohort"]]
        assert len(set(num_examples)) > 1
        clients = [
            plain_client(job, weights, played.before.round_index, client_id)
            for client_id in played.row["cohort"]
        ]
        weights = {
            name: sum(
                n / sum(num_examples) * client[name]
                for n, client in zip(num_examples, clients, strict=True)
            )
            for name in weights
        }
        found = plain_names(played.after.whole)
        assert found.keys() == weights.keys()
        for name, tensor in weights.items():
            if ".key." not in name:  # it moves no softmax: its gradient is rounding alone
                torch.testing.assert_close(tensor, found[name], rtol=0, atol=1e-6)
                assert (tensor - start[name]).abs().max() > 1e-3, name


def test_it_is_full_fine_tuning_with_all_else_frozen() -> None:
    bitfit, full = make_tiny_job(*BITFIT), make_tiny_job("method.name=full", *BITFIT[1:])
    for name, parameter in full.model.module.named_parameters():
        parameter.requires_grad_(name in bitfit.state.whole)
    biases = {name: full.state.whole[name] for name in bitfit.state.whole}
    start = with_parts(full.state, full.method.form(full.state), {}, biases)
    ours, theirs = play_rounds(bitfit, None, 2), play_rounds(full, start, 2)
    assert [r.row["state_digest"] for r in ours] == [r.row["state_digest"] for r in theirs]


def test_bytes_by_hand() -> None:
    """First and later participations alike, but for round 0, whose start is free."""
    expected = 24 + 4 * (NUM_BIASES + NUM_HEAD)
    for played in play_rounds(make_tiny_job(*BITFIT), num_rounds=3):
        assert played.row["uplink_bytes"] == 5 * expected
        assert played.row["downlink_bytes"] == 5 * (expected if played.row["round_index"] else 24)
        assert played.row["live_triplets"] == 0


def test_an_encoder_without_biases_is_refused() -> None:
    settings = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0,
    )  # fmt: skip
    model = inject(transformers.AutoModel.from_config(settings), "all-linear", ())
    adapter = AdapterSpec(lora_rank=4, lora_alpha=4.0, client_lora_ranks=(4,), shapes=model.shapes)
    with pytest.raises(InputError, match="encoder has no bias; allowed: a model with biases"):
        BitFit().init(Start(model=model, adapter=adapter, seed=0, num_rounds=1))
