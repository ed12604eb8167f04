"""The command line: what there is to choose from, and the doctor."""

import dataclasses
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from bench.cli import app
from bench.config.load import load_runs
from bench.tools import doctor
from bench.tools.catalog import CATALOGS, CONFIGS
from fedara_core.method import load_method, method_names
from support.launch import ROOT, TINY


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("what", CATALOGS)
def test_list_names_every_choice_with_a_text(what: str) -> None:
    lines = invoke("list", what).splitlines()
    names = [line.split(maxsplit=1) for line in lines]
    assert all(len(parts) == 2 for parts in names), lines
    if what == "methods":
        assert [name for name, _ in names] == method_names()


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


def test_doctor_finds_torch_and_tells_about_every_check() -> None:
    output = invoke("doctor")
    assert "torch" in output
    for name in doctor.CHECKS:
        assert name.split()[0] in output
    assert doctor.CHECKS["torch"]().state == "ok"


def test_doctor_says_what_to_do_when_the_encoder_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bench.models.encoders.importlib.util.find_spec", lambda name: None)
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
    output = invoke("run", "--help")
    assert re.search(r"mpiexec -n 4 fedara run", output)
    assert "torchrun" in output
