"""The command line: what there is to choose from, and the doctor."""

import dataclasses
import platform
import re
import shlex
import subprocess
import sys
from functools import partial

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

from bench.cli import app
from bench.config.load import load_runs
from bench.models.source import BUILT_IN
from bench.tools import doctor
from bench.tools.catalog import CATALOGS, CONFIGS
from fedara_core.method import load_method, method_names
from support.launch import ROOT, TINY


def invoke(*arguments: str, columns: int = 80) -> str:
    """What a command prints on a screen so many columns wide; it must succeed."""
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(columns)})
    assert result.exit_code == 0, result.output
    return result.output


NAMES = {
    "methods": method_names(),
    "datasets": ["docstrings", "toy", "file:DIR", "NAME"],
    "models": [*BUILT_IN, "DIR", "NAME"],
    "configs": [str(path.relative_to(CONFIGS)) for path in sorted(CONFIGS.rglob("*.toml"))],
}


def test_there_is_a_list_of_everything_that_has_names() -> None:
    assert list(CATALOGS) == [*NAMES, "keys"]


@pytest.mark.parametrize("what", NAMES)
def test_list_names_every_choice_with_a_text(what: str) -> None:
    lines = invoke("list", what).splitlines()
    assert [line.split(maxsplit=1)[0] for line in lines] == NAMES[what]
    for line in lines:
        name, text = re.split(r"\s+", line, maxsplit=1)
        assert len(text.split()) >= 2, line
        assert text != name


def test_verbose_tells_bytes_and_hyperparameters_of_every_method() -> None:
    text = invoke("list", "methods", "-v")
    for name in method_names():
        (part,) = [p for p in text.split("\n\n") if p.startswith(f"{name}: ")]
        assert re.search(r"^    up: +\S", part, re.MULTILINE)
        assert re.search(r"^    down: +\S", part, re.MULTILINE)
        for field in dataclasses.fields(load_method(name)):
            assert f"\n    {field.name} = {field.default!r}" in part


def test_list_refuses_what_it_does_not_know() -> None:
    result = CliRunner().invoke(app, ["list", "colours"])
    assert result.exit_code == 2
    assert "'colours': allowed: methods, datasets, models, configs, keys" in result.stderr


def test_every_key_of_a_config_is_explained() -> None:
    lines = dict(line.split(maxsplit=1) for line in invoke("list", "keys").splitlines())
    config = load_runs(TINY, [])[0].model_dump(exclude={"method"})
    sections = {key: value for key, value in config.items() if isinstance(value, dict)}
    keys = {f"{section}.{key}" for section, table in sections.items() for key in table}
    assert lines.keys() == keys | {"seed", "method.name"}
    assert lines["train.lr"] == "Learning rate. Default: 0.001."


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.toml")), ids=lambda path: path.stem)
def test_every_config_that_comes_along_is_valid(path: object) -> None:
    assert load_runs(path, [])


def test_doctor_shows_every_finding_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row for each check, in order: mark, name, what was found, what to do."""
    findings = {
        "works": doctor.Finding(state="ok", text="version 3 of it"),
        "absent": doctor.Finding(state="none", text="not here", advice="only on a cluster"),
        "broken": doctor.Finding(state="bad", text="does not start", advice="pip install it"),
    }
    checks = {name: partial(findings.get, name) for name in findings}
    monkeypatch.setattr(doctor, "CHECKS", checks)
    rows = [line.split("\u2502")[1:-1] for line in invoke("doctor", columns=200).splitlines()]
    assert [tuple(cell.strip() for cell in row) for row in rows if row] == [
        ("ok", "works", "version 3 of it", ""),
        ("-", "absent", "not here", "only on a cluster"),
        ("no", "broken", "does not start", "pip install it"),
    ]


@pytest.mark.parametrize("name", doctor.CHECKS)
def test_a_check_that_finds_a_fault_says_what_to_do(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.ask.ask.__kwdefaults__", {"seconds": 1.0})  # a Slurm that is down
    finding = doctor.CHECKS[name]()
    assert finding.state in ("ok", "none", "bad")
    assert finding.text
    assert finding.state != "bad" or finding.advice


def test_doctor_finds_the_torch_that_runs_here() -> None:
    finding = doctor.CHECKS["torch"]()
    assert finding.state == "ok"
    assert f"torch {torch.__version__}," in finding.text
    assert f"python {platform.python_version()}" in finding.text


def test_doctor_says_what_to_do_when_the_encoder_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bench.models.source.importlib.util.find_spec", lambda name: None)
    doctor.minilm_folder.cache_clear()
    finding = doctor.CHECKS["minilm"]()
    doctor.minilm_folder.cache_clear()
    assert finding.state == "bad"
    assert "pip install" in finding.advice


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["list", "configs"]])
def test_help_and_lists_import_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from bench.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "sys.exit(bool({'torch', 'datasets', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT).returncode == 0


def test_help_shows_the_launchers() -> None:
    """One example each, and all examples are commands that the command line takes."""
    examples = [
        shlex.split(line.strip())
        for line in invoke("run", "--help", columns=150).splitlines()
        if re.match(r"  +(fedara|mpiexec|torchrun) ", line)
    ]
    assert [words[0] for words in examples] == ["fedara", "mpiexec", "torchrun"]
    run = get_command(app).commands["run"]
    for words in examples:
        assert " fedara run " in f" {shlex.join(words)} "
        given = words[words.index("run") + 1 :]
        with run.make_context("run", list(given)) as context:  # raises where an option is not known
            assert str(context.params["config"]) == given[0]
        assert given[0] == "my.toml" or (ROOT / given[0]).is_file()
