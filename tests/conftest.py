"""One thread, no network, a cache of its own, and which tests one worker of xdist runs one after
another."""

import os
from functools import cache
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test and no job of a test reads or writes the user's cache."""
    os.environ["FEDARA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.hookimpl(optionalhook=True)  # xdist's
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of one file share a worker, so that its fixtures are made once.

    Files that start jobs share one, too: two jobs at a time are too many processes. They are marked
    xdist_group("jobs"). `--dist=loadgroup` would do, but xdist 3.8 loses the groups under pytest
    9.2 (it writes them to item._nodeid, which pytest no longer reads); a scheduler knows no marks.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(config.rootpath / nodeid.partition("::")[0])

    return ByFile(config, log)


@cache
def group(file: Path) -> str:
    return "jobs" if 'xdist_group("jobs")' in file.read_text(encoding="utf-8") else str(file)
