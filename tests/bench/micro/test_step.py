"""fedara micro step: what its record holds, the numbers behind a row by hand, and that all loops
train the same function."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from typer.testing import CliRunner

from bench.cli import app
from bench.metering.memory import peak_bytes_above_rest
from bench.micro import step as micro_step
from bench.micro.peft_loop import build_peft_model, peft_step
from bench.micro.step import (
    LORA_RANK,
    LR,
    Settings,
    levers,
    make_batches,
    make_config,
    suite_step,
)
from bench.micro.timing import against_bare_loop
from fedara_core.method import Client
from support.documented import check_documented
from support.launch import launch
from support.models import GPT2, SIZES, write_model

pytestmark = pytest.mark.xdist_group("jobs")

STEP = ("micro", "step", "--model", "tiny", "--max-length", "16", "--repeats", "2")
SETTINGS = Settings(
    model="tiny",
    methods=("lora",),
    precisions=("fp32",),
    lengths=("full", "toy"),
    max_length=16,
    repeats=2,
)


def test_a_launch_is_a_record(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    for split in ("train", "test"):
        lines = [json.dumps({"text": "a b c", "label": i % 2}) for i in range(20)]
        (tmp_path / "own" / f"{split}.jsonl").write_text("\n".join(lines))
    lengths = ("--lengths", f"file:{tmp_path / 'own'}")
    words = ("--methods", "lora,head_only", "--precision", "bf16", *lengths)
    job = launch("plain", 1, "-m", "bench", *STEP, *words, "--results", tmp_path / "out")
    assert job.code == 0, job.err
    assert "over 2 turns" in job.out
    (folder,) = (tmp_path / "out").iterdir()
    assert folder.name.startswith("micro-step-serial-p1-")
    assert (folder / "DONE").exists()
    run = json.loads((folder / "run.json").read_text())
    assert run["config"]["lengths"] == ["file:own"]  # not where they lie
    assert run["processes"][0]["threads"] == 1
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [(row["method"], row["levers"]) for row in rows] == [
        (method, name) for method in ("lora", "head_only") for name in levers()
    ]
    for row in rows:
        assert (row["precision"], row["lengths"], row["max_length"]) == ("bf16", "own", 16)
        assert len(row["iteration_seconds"]) == len(row["pair_ratios"]) == 2
        low, high = sorted(row["pair_ratios"])
        assert 0.02 < low - 1e-5 <= row["ratio_to_bare_loop"] <= high + 1e-5 < 50
        assert 0 < row["token_share"] < 1
    assert {row["packed"] for row in rows if row["levers"] == "all"} == {True}
    assert {row["attention"] for row in rows if row["levers"] == "none"} == {"sdpa"}
    check_documented(rows, "## Micro-benchmark of a local step")


def test_ratios_are_of_turns_by_hand() -> None:
    """The ratio is the median over turns (2, 1, 4), not that of the medians (4 / 2)."""
    row = against_bare_loop([4.0, 2.0, 16.0], [2.0, 2.0, 4.0])
    assert row["pair_ratios"] == [2.0, 1.0, 4.0]
    assert row["ratio_to_bare_loop"] == 2.0
    assert (row["median_seconds"], row["bare_loop_median_seconds"]) == (4.0, 2.0)
    assert against_bare_loop([4.0, 5.0, 9.0], [4.0, 1.0, 2.0])["ratio_to_bare_loop"] == 4.5


def test_every_loop_is_first_and_last_and_steps_on_the_batch_of_the_turn() -> None:
    seen: list[tuple[int, Any]] = []
    loops = [
        (lambda batch, number=number: seen.append((number, batch)), [f"{number}{t}" for t in "abc"])
        for number in range(3)
    ]
    seconds = micro_step._take_turns(loops)
    assert [number for number, _ in seen] == [0, 1, 2, 1, 2, 0, 2, 0, 1]
    assert all(batch == f"{number}{'abc'[i // 3]}" for i, (number, batch) in enumerate(seen))
    assert [len(own) for own in seconds] == [1, 1, 1]  # two turns warm up


def test_each_lever_is_off_alone() -> None:
    configs = {
        name: make_config(SETTINGS, "full", "lora", "fp32", off) for name, off in levers().items()
    }
    default = configs.pop("all").model_dump()
    changed = {}
    for name, config in configs.items():
        mine = config.model_dump()
        changed[name] = {
            f"{section}.{key}"
            for section in ("adapter", "model", "train")
            for key, value in mine[section].items()
            if value != default[section][key]
        }
    assert changed.pop("none") == set().union(*changed.values())
    assert changed == {f"all but {key}": {key} for key in micro_step.OFF}


@pytest.mark.parametrize("lengths", ["full", "toy"])
def test_batches_differ_in_padding_alone(lengths: str) -> None:
    batches = make_batches(SETTINGS, lengths)
    assert len(batches.suite) == len(batches.padded) == 4  # 2 warm up
    num_tokens = 0
    for own, padded in zip(batches.suite, batches.padded, strict=True):
        assert padded["input_ids"].shape == padded["attention_mask"].shape == (16, 16)
        shape = own["input_ids"].shape
        assert shape == (16, int(own["attention_mask"].sum(dim=1).max()))
        for key in ("input_ids", "attention_mask"):
            assert torch.equal(padded[key][:, : shape[1]], own[key])
            assert not padded[key][:, shape[1] :].any()
        assert torch.equal(padded["labels"], own["labels"])
        assert int(own["labels"].max()) < batches.num_classes
        num_tokens += int(own["attention_mask"].sum())
    assert batches.token_share == pytest.approx(num_tokens / (4 * 16 * 16))
    assert (batches.token_share == 1) == (lengths == "full")


def test_a_small_set_comes_round_again() -> None:
    """The set has 400 texts."""
    assert len(make_batches(replace(SETTINGS, repeats=30), "toy").suite) == 32


@pytest.mark.parametrize("name", levers())
@pytest.mark.parametrize("lengths", ["full", "toy"])
def test_all_loops_train_the_same_function(name: str, lengths: str) -> None:
    """From the same weights and without dropout their losses are equal, step by step."""
    batches = make_batches(SETTINGS, lengths)
    config = make_config(SETTINGS, lengths, "lora", "fp32", levers()[name])
    model = config.model.model_copy(update={"dropout": 0.0})
    step, _ = suite_step(config.model_copy(update={"model": model}), batches.num_classes)
    client = step.args[0]
    theirs = build_peft_model(model, num_classes=batches.num_classes, lora_rank=LORA_RANK)
    start_alike(theirs, client)
    assert client.vector.numel() == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    bare = peft_step(theirs, lr=LR, precision="fp32")
    expected = [float(bare(batches.padded[0])) for _ in range(4)]
    for _ in expected:
        step(batches.suite[0])
    assert [float(loss) for loss in client.losses] == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0] - 5e-3


@pytest.mark.parametrize(
    "settings",
    [
        transformers.DistilBertConfig(
            **{"vocab_size": 20, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16}
        ),
        transformers.RobertaConfig(**SIZES),
        transformers.LlamaConfig(**SIZES),
        GPT2,
    ],
    ids=["distilbert", "roberta", "llama", "gpt2"],
)
def test_both_loops_train_as_much_of_other_models(settings: Any, tmp_path: Path) -> None:
    write_model(tmp_path, settings, pad_token="!", eos_token="<end>")
    own = replace(SETTINGS, model=str(tmp_path))
    batches = make_batches(own, "full")
    config = make_config(own, "full", "lora", "bf16", {})
    step, _ = suite_step(config, batches.num_classes)
    step(batches.suite[0])
    theirs = build_peft_model(config.model, num_classes=batches.num_classes, lora_rank=LORA_RANK)
    peft_step(theirs, lr=LR, precision="bf16")(batches.padded[0])
    num_trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert step.args[0].vector.numel() == num_trained


def start_alike(theirs: nn.Module, client: Client) -> None:
    """Give PEFT's model the weights of the client's, and no dropout."""
    ours = client.model.module.state_dict()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            own = name.removeprefix("base_model.").replace(".modules_to_save.default", "")
            if ".lora_A." in name or ".lora_B." in name:
                layer, _, part = own.partition(".lora_")
                rows = client.model.adapters[layer].parts[part[0]]
                parameter.copy_(rows if part[0] == "A" else rows.T)
            elif ".original_module." not in name:
                parameter.copy_(ours[own.replace(".base_layer.", ".base.")])
    for module in theirs.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


# ---- memory ----


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's peak is Linux's")
def test_a_peak_is_what_a_call_needs_at_once() -> None:
    """Two tensors of 64 MB, one after the other, then both at once."""

    def filled() -> Tensor:
        return torch.ones(16 << 20)

    def in_turn() -> None:
        filled()
        filled()

    one, two = peak_bytes_above_rest(in_turn), peak_bytes_above_rest(lambda: [filled(), filled()])
    assert one == pytest.approx(64 << 20, rel=0.1)
    assert two == pytest.approx(128 << 20, rel=0.1)


# ---- refusals ----


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--precision", "both"), "--precision 'both': allowed: fp32, bf16, separated by commas"),
        (("--methods", "loraa"), "--methods 'loraa': allowed: "),
        (("--repeats", "0"), "--repeats 0: allowed: 1 or more"),
        (("--model", "toy"), "--model toy: "),
        (("--lengths", "file:/nowhere"), "/nowhere"),
        (("--max-length", "100000"), "model.max_length"),
    ],
)
def test_what_is_refused_leaves_no_record(
    words: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, [*STEP, *words, "--results", str(tmp_path / "results")])
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_without_peft_one_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    result = CliRunner().invoke(app, [*STEP, "--results", str(tmp_path / "results")])
    assert result.exit_code == 2
    assert "peft is not installed" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "results").exists()
