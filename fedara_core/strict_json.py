"""JSON whose every fault is a ValueError, and whose numbers are finite."""

import json
from typing import Any


def loads(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError, also where json.loads takes NaN and makes 1e400
    an infinity, and where its nesting or digits are too many for Python. JSONDecodeError, a
    ValueError, tells line and column."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite, parse_int=_whole)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(name: str) -> float:
    raise ValueError(f"{name}; allowed: finite numbers")


def _finite(text: str) -> float:
    value = float(text)
    if abs(value) == float("inf"):
        _refuse(f"{text:.20}")
    return value


def _whole(text: str) -> int:
    _finite(text)
    return int(text)
