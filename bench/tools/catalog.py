"""What `fedara list` prints: methods, data sets, models, configs."""

import dataclasses
import re
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"


def _methods() -> Iterator[tuple[str, str]]:
    from fedara_core.method import load_method, method_names  # torch: only for those who need it

    for name in method_names():
        module = sys.modules[load_method(name).__module__]
        yield name, _first_sentence(module.__doc__ or "")


def _datasets() -> Iterator[tuple[str, str]]:
    yield "docstrings", "the standard library's own docstrings; label = topic; built at run time"
    yield "toy", "520 synthetic texts of 4 classes, for tests"
    yield "file:DIR", "train.* and test.* in DIR (.parquet, .csv or .jsonl), text and label columns"
    yield "NAME", "a hub name for datasets.load_dataset, such as fancyzhx/ag_news"


def _models() -> Iterator[tuple[str, str]]:
    from bench.models.encoders import BUILT_IN

    yield from BUILT_IN.items()
    yield "DIR", "a folder with a transformers model"
    yield "NAME", "a hub name for transformers' AutoModel, such as FacebookAI/roberta-base"


def _configs() -> Iterator[tuple[str, str]]:
    for path in sorted(CONFIGS.rglob("*.toml")):
        tomllib.loads(path.read_text(encoding="utf-8"))  # a listed config can at least be read
        comment = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        yield str(path.relative_to(CONFIGS)), comment


def describe_methods() -> Iterator[str]:
    """Lines for `fedara list methods -v`: paper, what travels, hyperparameters with defaults."""
    from fedara_core.method import load_method, method_names

    for name in method_names():
        cls = load_method(name)
        text = sys.modules[cls.__module__].__doc__ or ""
        yield f"{name}: {_first_sentence(text)}"
        for way in ("Up", "Down"):
            yield from _wrapped(way.lower(), _paragraph(text, way))
        for field in dataclasses.fields(cls):
            yield f"    {field.name} = {field.default!r}"
        yield ""


def _paragraph(text: str, word: str) -> str:
    """What follows `word:` in a docstring, with its indented continuation lines."""
    found = re.search(rf"^{word}:((?:.*)(?:\n    .*)*)", text, re.MULTILINE)
    assert found, f"a method's docstring needs a line that starts with {word}:"
    return " ".join(found.group(1).split())


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, 100, initial_indent=f"    {label + ':':<6}", subsequent_indent=" " * 10
    )


def _first_sentence(text: str) -> str:
    """A docstring's first line, or the first two where the first does not end a sentence."""
    lines = text.strip().splitlines()
    first = lines[0]
    return first if first.endswith(".") or len(lines) == 1 else f"{first} {lines[1]}"


CATALOGS: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
    "methods": _methods,
    "datasets": _datasets,
    "models": _models,
    "configs": _configs,
}
