"""The set "docstrings": texts of the standard library's docstrings, labelled by topic."""

import ast
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from bench.data.texts import TextDataset
from fedara_core.errors import InputError

MIN_WORDS = 4
# Label -> its modules: files or folders of the standard library, private implementations included.
# Modules that the running Python lacks are skipped (_pydatetime came with 3.12). Those that
# distributions package apart from python3 (tkinter, turtle, idlelib, distutils) are not listed.
TOPICS: dict[str, tuple[str, ...]] = {
    "argparse": ("argparse", "optparse", "getopt", "configparser", "shlex", "cmd"),
    "asyncio": ("asyncio",),
    "codecs": ("codecs", "encodings", "locale", "gettext", "base64", "quopri", "stringprep"),
    "collections": ("collections", "_collections_abc", "operator", "heapq", "bisect", "weakref"),
    "datetime": ("datetime", "_pydatetime", "_strptime", "calendar", "zoneinfo"),
    "decimal": ("decimal", "_pydecimal", "numbers", "fractions", "statistics", "random"),
    "email": ("email", "mailbox"),
    "http": ("http", "wsgiref", "socketserver", "xmlrpc"),
    "importlib": ("importlib", "pkgutil", "runpy", "zipimport", "modulefinder"),
    "inspect": ("inspect", "ast", "dis", "symtable", "tokenize", "pydoc", "pyclbr"),
    "logging": ("logging", "warnings"),
    "multiprocessing": ("multiprocessing", "concurrent"),
    "pathlib": (
        *("pathlib", "shutil", "os", "posixpath", "ntpath", "genericpath", "glob", "stat"),
        *("io", "_pyio", "tempfile", "fileinput"),
    ),
    "pdb": ("pdb", "bdb", "traceback", "trace", "tracemalloc", "timeit", "pstats"),
    "smtplib": ("smtplib", "imaplib", "poplib", "ftplib", "netrc"),
    "socket": ("socket", "ssl", "ipaddress", "selectors"),
    "tarfile": ("tarfile", "zipfile", "gzip", "bz2", "lzma", "_compression", "compression"),
    "threading": ("threading", "_threading_local", "queue", "sched", "contextlib", "functools"),
    "typing": ("typing", "types", "enum", "dataclasses", "abc", "_py_abc"),
    "unittest": ("unittest", "doctest"),
    "urllib": ("urllib",),
    "xml": ("xml",),
}


def load(stdlib: Path) -> TextDataset:
    """Docstrings of modules, classes and functions under `stdlib`; the label is the topic.

    The names of all topics' modules are removed from all texts. Removed from their own topic's
    texts only, a name would show which topic a text does not belong to. Texts with fewer than
    MIN_WORDS words are dropped, and so are texts that occur under several topics.
    """
    files = _files(stdlib)
    names = _module_names(stdlib, files)
    found: dict[str, tuple[str, set[str]]] = {}
    for label, paths in files.items():
        for path in paths:
            for docstring in _file_docstrings(path):
                text = _without_names(docstring, names)
                if len(text.split()) >= MIN_WORDS:
                    found.setdefault(text.lower(), (text, set()))[1].add(label)
    labels = tuple(TOPICS)
    examples = [
        (hashlib.sha256(key.encode()).digest(), text, labels.index(topics.pop()))
        for key, (text, topics) in found.items()
        if len(topics) == 1
    ]
    missing = set(range(len(labels))) - {label_id for _, _, label_id in examples}
    if missing:
        raise InputError(
            f"dataset.name = 'docstrings': no docstrings of "
            f"{', '.join(labels[label_id] for label_id in sorted(missing))} under {stdlib}; "
            "allowed: a Python that has its standard library as .py files"
        )
    # Order and split come from the text alone, so a file that moves changes neither.
    examples.sort()
    train = [example for example in examples if example[0][0] % 5]
    test = [example for example in examples if example[0][0] % 5 == 0]
    return TextDataset(
        name="docstrings",
        labels=labels,
        train_texts=[text for _, text, _ in train],
        train_labels=np.array([label_id for _, _, label_id in train], dtype=np.int64),
        test_texts=[text for _, text, _ in test],
        test_labels=np.array([label_id for _, _, label_id in test], dtype=np.int64),
    )


def source_files(stdlib: Path) -> list[Path]:
    """The files that `load` reads, in a fixed order."""
    return [path for paths in _files(stdlib).values() for path in paths]


def _files(stdlib: Path) -> dict[str, list[Path]]:
    """Label -> its modules' files."""
    return {label: list(_topic_files(stdlib, modules)) for label, modules in TOPICS.items()}


def _topic_files(stdlib: Path, modules: Sequence[str]) -> Iterator[Path]:
    """The .py files of the modules, in a fixed order, without those of test folders."""
    for module in modules:
        file = stdlib / f"{module}.py"
        if file.is_file():
            yield file
        for path in sorted((stdlib / module).rglob("*.py")):
            if not {"test", "tests"} & set(path.relative_to(stdlib).parts):
                yield path


def _module_names(stdlib: Path, files: dict[str, list[Path]]) -> frozenset[str]:
    """Lower-case names of all topics, packages and modules, without underscores at either end."""
    parts = {
        part
        for paths in files.values()
        for path in paths
        for part in path.relative_to(stdlib).with_suffix("").parts
    }
    names = parts - {"__init__", "__main__"} | set(TOPICS)
    return frozenset(name.strip("_").lower() for name in names)


def _file_docstrings(path: Path) -> Iterator[str]:
    """Docstrings of the module and of all classes and functions in it, outermost first."""
    pending: list[ast.AST] = [ast.parse(path.read_bytes())]
    for node in pending:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
        # Expressions hold no definitions; skipping them saves most of the walk's time.
        children = ast.iter_child_nodes(node)
        pending.extend(x for x in children if isinstance(x, ast.stmt | ast.excepthandler))


def _without_names(text: str, names: frozenset[str]) -> str:
    """Remove `names` and compounds of them with "." or "_" from the text; make white space single.
    The rest of a dotted name stays: "asyncio.Task" becomes "Task"."""

    def strip(match: re.Match[str]) -> str:
        return ".".join(part for part in match[0].split(".") if not is_named(part.lower()))

    def is_named(part: str) -> bool:
        return part.strip("_") in names or not names.isdisjoint(part.strip("_").split("_"))

    return " ".join(re.sub(r"\w+(?:\.\w+)*", strip, text).split())
