"""Stand-ins for the programs that the suite asks: squeue, sbatch, scontrol, module, git ..."""

import os
from pathlib import Path

import pytest


def stand_in(folder: Path, name: str, script: str) -> Path:
    """A shell script of this name in a folder."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return program


def put_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new folder that is the first on PATH."""
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder
