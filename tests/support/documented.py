"""What results/README.md documents, to compare records with."""

import re
from collections.abc import Iterable
from fnmatch import fnmatch

from support.launch import ROOT


def documented(heading: str) -> set[str]:
    """The keys in the first columns of the tables below this heading of results/README.md."""
    text = (ROOT / "results" / "README.md").read_text()
    section = text.partition(f"\n{heading}\n")[2].partition("\n#")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {key for cell in cells for key in re.findall("`(.+?)`", cell)}


def check_documented(rows: Iterable[Iterable[str]], heading: str) -> None:
    """The rows' keys are those below the heading: none is missing on either side. A key documented
    as bare_* stands for all of that beginning."""
    keys, patterns = {key for row in rows for key in row}, documented(heading)
    assert not [key for key in keys if not any(fnmatch(key, pattern) for pattern in patterns)]
    assert not [pattern for pattern in patterns if not any(fnmatch(k, pattern) for k in keys)]
