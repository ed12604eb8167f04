"""Which package may import which, and how long a file may get."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.launch import ROOT

PACKAGES = ("fedara_core", "bench", "analysis")
ALL = "*"
# Package -> other package -> the modules of it that may be imported.
MAY_IMPORT = {
    "fedara_core": {},
    "analysis": {
        "fedara_core": tuple(
            f"fedara_core.{name}"
            for name in ("errors", "schema", "shapes", "strict_json", "merge.cost")
        )
    },
    "bench": {"fedara_core": (ALL,)},
}
# The only files of bench that may import analysis.
READ_RECORDS = ("bench/cli.py", "bench/tools/reproduce.py")
MOST_LINES = 400


def sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, in functions too. `from a.b import c` gives a.b.c where
    that is a module, else a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield node.lineno, full if is_module(full) else str(node.module)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def refused(path: Path) -> list[str]:
    """The imports of a file that the rules do not allow, as FILE:LINE: imports MODULE."""
    file = path.relative_to(ROOT).as_posix()
    package = file.partition("/")[0]
    allowed: dict[str, tuple[str, ...]] = {package: (ALL,), **MAY_IMPORT[package]}
    if file in READ_RECORDS:
        allowed["analysis"] = (ALL,)
    found = []
    for line, name in imported_modules(path):
        other = name.partition(".")[0]
        modules = allowed.get(other, ())
        if other in PACKAGES and ALL not in modules and name not in modules:
            found.append(f"{file}:{line}: imports {name}")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_it_may(package: str) -> None:
    files = sources(package)
    assert len(files) > 10
    assert [line for path in files for line in refused(path)] == []


def test_the_walk_sees_every_kind_of_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rules would be worth nothing if the walk missed what they forbid."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    for module in ("bench/run/rounds", "analysis/stats", "fedara_core/errors", "fedara_core/wire"):
        path = tmp_path / f"{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    core, records = tmp_path / "fedara_core" / "wire.py", tmp_path / "analysis" / "stats.py"
    core.write_text("import torch\nimport fedara_core.errors\ndef late():\n    import bench.run\n")
    assert refused(core) == ["fedara_core/wire.py:4: imports bench.run"]
    records.write_text(
        "from fedara_core import errors, wire\nfrom fedara_core.errors import InputError\n"
        "if True:\n    from bench.run.rounds import run\n"
    )
    assert refused(records) == [
        "analysis/stats.py:1: imports fedara_core.wire",
        "analysis/stats.py:4: imports bench.run.rounds",
    ]


def test_no_file_of_source_is_long() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources(*PACKAGES)
    }
    assert {file: count for file, count in lengths.items() if count > MOST_LINES} == {}
