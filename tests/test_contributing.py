"""The method in CONTRIBUTING.md is whole: cut out, it joins the others and keeps the contracts."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.cli import app
from fedara_core import methods
from fedara_core.method import load_method, method_names
from support.rounds import make_tiny_job, play_rounds

ROOT = Path(__file__).parents[1]
NAME = "fedprox_lora"
CONTRACTS = """
import sys, pytest, fedara_core.methods as methods
methods.__path__.append(sys.argv[1])
sys.exit(pytest.main(["-q", "-x", "tests/test_contracts.py", "-k", sys.argv[2]]))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the example's file, searched for methods like the package's own."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(example.splitlines()) <= 30
    (tmp_path / f"{NAME}.py").write_text(example, encoding="utf-8")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    yield tmp_path
    sys.modules.pop(f"{methods.__name__}.{NAME}", None)


def test_the_example_is_a_method(folder: Path) -> None:
    assert NAME in method_names()
    assert load_method(NAME)().mu == 0.01
    listed = CliRunner().invoke(app, ["list", "methods", "-v"]).output
    assert f"{NAME}: FedProx on LoRA" in listed
    assert "mu = 0.01" in listed


def test_the_example_is_lora_with_fedproxs_term(folder: Path) -> None:
    digests = {}
    for name, overrides in {
        "lora": ["method.name=lora"],
        "off": [f"method.name={NAME}", "method.mu=0.0"],
        "on": [f"method.name={NAME}", "method.mu=1.0"],
        "shared": ["method.name=lora", "train.proximal_mu=1.0"],
    }.items():
        digests[name] = play_rounds(make_tiny_job(*overrides), num_rounds=2)[-1].row["state_digest"]
    assert digests["off"] == digests["lora"] != digests["on"] == digests["shared"]


@pytest.mark.slow
def test_the_example_keeps_the_contracts(folder: Path) -> None:
    words = [sys.executable, "-c", CONTRACTS, str(folder), NAME]
    finished = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stdout
    assert re.search(r"2[0-9] passed", finished.stdout), finished.stdout
