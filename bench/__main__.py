"""python -m bench is the fedara command; jobs start this file by its path (bench/ask.py)."""

import importlib
import sys
from pathlib import Path


def _find_packages() -> None:
    """Import the suite's packages from beside this file, before any others of their names."""
    root = str(Path(__file__).resolve().parents[1])
    sys.path.insert(0, root)
    for name in ("analysis", "bench", "fedara_core"):
        importlib.import_module(name)
    sys.path.remove(root)


if not __package__:  # started by its path
    _find_packages()

importlib.import_module("bench.cli").main()
