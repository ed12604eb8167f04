"""Tests of fedara report: data behind each figure and table by hand, gaps, the page, its time."""

import subprocess
import sys
from pathlib import Path

from test_analysis import ROOT, write_record


def test_fedara_report_imports_neither_torch_nor_mpi(tmp_path: Path) -> None:
    write_record(tmp_path / "records", "lora", 0)
    code = (
        "import sys; from bench.cli import app\n"
        "app(['report', *sys.argv[1:]], standalone_mode=False)\n"
        "print([m for m in ('torch', 'mpi4py') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "records"), "--out", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "out" / "accuracy_rounds.pdf").exists()
