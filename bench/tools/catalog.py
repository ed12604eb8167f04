"""What `fedara list` prints: methods, data sets, models, configs, and the keys of a config."""

import dataclasses
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"


def _methods() -> Iterator[tuple[str, str]]:
    from fedara_core.method import load_method, method_names  # imports torch

    for name in method_names():
        module = sys.modules[load_method(name).__module__]
        yield name, _first_sentence(module.__doc__ or "")


def _datasets() -> Iterator[tuple[str, str]]:
    yield "docstrings", "the docstrings of Python's standard library; the label is the topic"
    yield "toy", "520 synthetic texts of 4 classes, for tests"
    yield "file:DIR", "train.* and test.* in DIR (.parquet, .csv or .jsonl), text and label columns"
    yield "NAME", "a name on the Hugging Face hub, such as fancyzhx/ag_news"


def _models() -> Iterator[tuple[str, str]]:
    from bench.models.source import BUILT_IN

    yield from BUILT_IN.items()
    yield "DIR", "a folder with a transformers model"
    yield "NAME", "a model on the Hugging Face hub, such as FacebookAI/roberta-base"


def _configs() -> Iterator[tuple[str, str]]:
    for path in sorted(CONFIGS.rglob("*.toml")):
        first_line, *_ = path.read_text(encoding="utf-8").splitlines()
        yield str(path.relative_to(CONFIGS)), first_line.lstrip("# ")


def _keys() -> Iterator[tuple[str, str]]:
    from bench.config.schema import RunConfig  # imports torch

    for section, outer in RunConfig.model_fields.items():
        fields = getattr(outer.annotation, "model_fields", None)
        named = {f"{section}.{key}": field for key, field in fields.items()} if fields else {}
        for key, field in (named or {section: outer}).items():
            text = " ".join((field.description or "").split())
            given = not field.is_required() and field.default is not None
            yield key, f"{text} Default: {json.dumps(field.default)}." if given else text


def describe_methods() -> Iterator[str]:
    """Lines for `fedara list methods -v`: paper, what travels, hyperparameters with defaults."""
    from fedara_core.method import load_method, method_names

    for name in method_names():
        cls = load_method(name)
        text = sys.modules[cls.__module__].__doc__ or ""
        yield f"{name}: {_first_sentence(text)}"
        for way in ("Up", "Down"):
            # The line that starts with the word, and its indented continuation lines.
            found = re.search(rf"^{way}:((?:.*)(?:\n    .*)*)", text, re.MULTILINE)
            assert found, f"a method's docstring needs a line that starts with {way}:"
            paragraph = f"    {way.lower()}:".ljust(10) + " ".join(found[1].split())
            yield from textwrap.wrap(paragraph, 100, subsequent_indent=" " * 10)
        for field in dataclasses.fields(cls):
            yield f"    {field.name} = {field.default!r}"
        yield ""


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
    "keys": _keys,
}
