"""Reads TOML files that users write; imports no torch."""

import tomllib
from pathlib import Path
from typing import Any

from fedara_core.errors import InputError


def read_toml(path: Path, what: str, allowed: str = "a readable TOML file") -> dict[str, Any]:
    """The file's table. Raises InputError with one line that starts with what it is to be."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        reason = f"is not valid TOML ({error})"
    raise InputError(f"{what} {path} {reason}; allowed: {allowed}")
