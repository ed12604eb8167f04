"""Configs of the papers: one per method, all valid, and their "Here:" lines really train."""

import math
import re
import shlex
import sys
from pathlib import Path

import pytest

from bench.config.load import load_runs
from bench.config.schema import RunConfig
from bench.run.job import prepare
from bench.tools.catalog import CONFIGS
from fedara_core.comm.base import Communicator
from fedara_core.method import load_method, method_names
from support.rounds import play_rounds

PAPERS = CONFIGS / "papers"
NAMES = sorted(path.stem for path in PAPERS.glob("*.toml"))
SUMMARY = re.compile(r"# [^:()]+ \(arXiv \d{4}\.\d{5}[^()]*\): [^:]+\.")
ARXIV_ID = re.compile(r"\d{4}\.\d{5}")

# On top of a "Here:" line: one round of one step on a model of a few thousand weights.
TINY = (
    "model.name=tiny",
    "model.max_length=16",
    "dataset.name=toy",
    "federation.num_clients=4",
    "federation.cohort=2",
    "federation.num_rounds=1",
    "train.local_steps=1",
    "adapter.lora_rank=4",
    "system.device=cpu",
    "system.threads=1",
)
TINY_RANKS = (
    "adapter.client_lora_ranks=[{ lora_rank = 4, share = 0.5 }, { lora_rank = 2, share = 0.5 }]"
)


def config_file(name: str) -> Path:
    return PAPERS / f"{name}.toml"


def command(name: str) -> str:
    return f"fedara run bench/configs/papers/{name}.toml"


def load(name: str, *overrides: str) -> RunConfig:
    (config,) = load_runs(config_file(name), list(overrides))
    return config


def here(name: str) -> list[str]:
    """The overrides of a config's "Here:" line, as a shell would hand them over."""
    line = config_file(name).read_text(encoding="utf-8").splitlines()[2]
    words = shlex.split(line.removeprefix(f"# Here: {command(name)} "))
    assert words[::2] == ["--set"] * (len(words) // 2)
    return words[1::2]


def test_every_method_but_the_head_alone_has_a_config() -> None:
    assert sorted(set(method_names()) - {"head_only"}) == NAMES  # head_only is in no paper


@pytest.mark.parametrize("name", NAMES)
def test_config_is_valid_and_of_a_hub(name: str) -> None:
    config = load(name)
    assert config.method.name == name
    assert config.model.pooling == "model"
    for hub_name in (config.model.name, config.dataset.name):
        assert re.fullmatch(r"[\w-]+/[\w.-]+(:\w+)?", hub_name)


@pytest.mark.parametrize("name", NAMES)
def test_head_comment(name: str) -> None:
    lines = config_file(name).read_text(encoding="utf-8").splitlines()
    assert SUMMARY.fullmatch(lines[0])
    assert lines[1] == f"# {command(name)}"
    assert lines[2].startswith(
        f"# Here: {command(name)} --set model.name=minilm --set model.pooling=mean "
        "--set dataset.name=docstrings --set "
    )
    assert lines[3].startswith("# Source: ")
    assert all(len(line) <= 100 for line in lines[:2] + lines[3:])


@pytest.mark.parametrize("name", NAMES)
def test_summary_names_the_methods_paper(name: str) -> None:
    summary = config_file(name).read_text(encoding="utf-8").splitlines()[0]
    docstring = sys.modules[load_method(name).__module__].__doc__ or ""
    assert set(ARXIV_ID.findall(summary)) <= set(ARXIV_ID.findall(docstring))


# The authors' lora_dropout, and whose learning rate they let decay linearly in each round.
DROPOUT = dict.fromkeys(["fed_sb", "fedsa_lora", "fedsvd", "flexlora", "flora", "lora"], 0.05)
DROPOUT |= {"fedrot_lora": 0.05, "fedex_lora": 0.1, "fslora": 0.1}
LINEAR = {"bitfit", "fedadapter", "fedex_lora", "flexlora", "flora", "full", "lora"}


@pytest.mark.parametrize("name", sorted(DROPOUT.keys() | LINEAR))
def test_authors_dropout_and_decay(name: str) -> None:
    config = load(name)
    assert config.adapter.dropout == DROPOUT.get(name, 0.0)
    assert config.train.schedule == ("linear" if name in LINEAR else "constant")
    assert config.train.round_schedule == "constant"


@pytest.mark.parametrize("name", NAMES)
def test_here_is_small_and_needs_no_hub(name: str) -> None:
    config = load(name, *here(name))
    assert config.method.name == name
    assert (config.model.name, config.model.pooling) == ("minilm", "mean")
    assert config.dataset.name == "docstrings"
    assert config.model.max_length <= 32
    assert config.federation.num_clients <= 20
    assert config.federation.cohort <= 10
    assert config.federation.num_rounds <= 5
    assert config.train.local_steps is not None
    assert config.train.local_steps <= 5
    assert config.train.batch_size <= 8


@pytest.mark.parametrize("name", NAMES)
def test_here_trains(name: str) -> None:
    ranks = [TINY_RANKS] if load(name).adapter.client_lora_ranks else []
    (played,) = play_rounds(prepare(load(name, *here(name), *TINY, *ranks), Communicator()))
    assert math.isfinite(played.row["train_loss"])
    assert played.row["uplink_bytes"] > 0
    assert played.after.round_index == 1
