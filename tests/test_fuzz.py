"""Damaged configs, data, records and environments: no command ends in a traceback, or never.

A case is a command, the file that it reads, and what is done to that file; seeds choose where. It
may end with exit code 0, with 1 and a cause, or with 2 and one line.
"""

import contextlib
import io
import random
import re
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch

from bench.cli import app
from bench.jobs.plan import make_plan
from support.launch import ROOT, TINY
from support.stand_in import put_first, stand_in

LIMIT_SECONDS = 30
SLOW_SEEDS = [1, 2]  # of all mutations and commands; a seed takes 40 seconds
SITE = ROOT / "slurm" / "sites" / "generic_cpu.toml"

# ---- what is done to a file ----

Mutation = Callable[[random.Random, bytes], bytes]

# In place of a number, a text, a list or a table of TOML, JSON, or a table of data. Some are right.
VALUES = [
    *("-1", "0", "3", "0.5", "1e400", "nan", "NaN", "true", "null", '""', '"x"', "[]", "{}", "[1]"),
    *('"$x$"', '"[bold]"', '"[/bold]"', '"a b"', '"\\ud800"', '"a\\nb"', '"\\u4e2d"', '"../.."'),
    *('"<script>"', '"%j"', '"~{}^\\\\"', '"nobody/nothing"', '"file:/dev/null"'),
]
HUGE = [
    "1" + 30 * "0",
    "9" * 5000,
    "0x" + 5000 * "f",
    "9007199254740993",
    '"' + 3000 * "x" + '"',
    3000 * "[",
]
_TOKEN = re.compile(rb'"[^"\n]*"|-?\b\d[\d.e+-]*\b|\b(true|false|null)\b')


def _one_of(values: list[str]) -> Mutation:
    def change(rng: random.Random, content: bytes) -> bytes:
        found = list(_TOKEN.finditer(content))
        if not found:
            return content
        token = rng.choice(found)
        return content[: token.start()] + rng.choice(values).encode() + content[token.end() :]

    return change


def _flip(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(min(8, len(changed))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _drop_line(rng: random.Random, content: bytes) -> bytes:
    lines = content.splitlines(keepends=True)
    del lines[rng.randrange(len(lines))]
    return b"".join(lines)


def _repeat_line(rng: random.Random, content: bytes) -> bytes:
    lines = content.splitlines(keepends=True)
    place = rng.randrange(len(lines))
    return b"".join([*lines[:place], lines[place], *lines[place:]])


MUTATIONS: dict[str, Mutation] = {
    "value": _one_of(VALUES),
    "truncated": lambda rng, content: content[: rng.randrange(len(content))],
    "flipped bytes": _flip,
    "a line lost": _drop_line,
    "a line twice": _repeat_line,
    "empty": lambda rng, content: b"",
    "a list": lambda rng, content: b"[1, 2]\n",
    "an object": lambda rng, content: b"{}\n",
    "binary": lambda rng, content: rng.randbytes(200),
    "byte order mark": lambda rng, content: b"\xef\xbb\xbf" + content,
    "carriage returns": lambda rng, content: content.replace(b"\n", b"\r\n"),
    "zero bytes": lambda rng, content: content + 100 * b"\0",
    "latin-1": lambda rng, content: content.replace(b"e", b"\xe9"),
    "huge value": _one_of(HUGE),
}

# ---- which files, and the commands that read them ----


@dataclass(frozen=True)
class Target:
    """file: below the folder of a case. commands: words after `fedara`, with {folder} and {run}.

    without: mutations that are not tried: what they make takes long by right.
    """

    file: str
    commands: tuple[str, ...]
    without: tuple[str, ...] = ()


RUN = "run {folder}/config.toml --results {folder}/results --comm serial"
RESUME = "run {folder}/config.toml --results {folder}/unfinished --comm serial"
NEW = "run {folder}/config.toml --results {folder}/new --comm serial"
SWEEP = "sweep {folder}/config.toml --results {folder}/new --dry-run"
SUBMIT = f"submit {{folder}}/config.toml --site {SITE} --results {{folder}}/new --dry-run"
STATUS = "status {folder}/results"
REPORT = "report {folder}/results --out {folder}/out"
EXPORT = "export {run} {folder}/out"
REPRODUCE = "reproduce {run} --results {folder}/new --comm serial"
PLANNED = "run {folder}/plans/plan-fuzz.jsonl --results {folder}/new --comm serial"
OF_RECORDS = (STATUS, REPORT, EXPORT, REPRODUCE, RUN)

TARGETS = {
    "config, planned": Target("config.toml", (SWEEP, SUBMIT)),
    "config, run": Target("config.toml", (NEW,), ("huge value",)),
    "site": Target("site.toml", (SUBMIT.replace(str(SITE), "{folder}/site.toml"),)),
    "train.csv": Target("data/train.csv", (NEW,)),
    "test.jsonl": Target("data/test.jsonl", (NEW,)),
    "labels.json": Target("data/labels.json", (NEW,)),
    "parquet": Target("parquet/train.parquet", (NEW.replace("config", "parquet"),)),
    "run.json": Target("results/{id}/run.json", OF_RECORDS, ("huge value",)),
    "rounds.jsonl": Target("results/{id}/rounds.jsonl", OF_RECORDS),
    "partition.json": Target("results/{id}/partition.json", (REPORT, STATUS, RUN)),
    "checkpoint": Target("results/{id}/checkpoint.safetensors", (EXPORT, RUN)),
    "unfinished run.json": Target("unfinished/{id}/run.json", (RESUME,)),
    "unfinished rounds.jsonl": Target("unfinished/{id}/rounds.jsonl", (RESUME,)),
    "unfinished checkpoint": Target("unfinished/{id}/checkpoint.safetensors", (RESUME,)),
    "plan": Target("plans/plan-fuzz.jsonl", (PLANNED, "status {folder}/plans"), ("huge value",)),
    "costs": Target("costs.toml", (f"{REPORT} --costs {{folder}}/costs.toml",)),
}

# ---- environment variables ----

ENVIRONMENT = {
    "MPLBACKEND": ["module://matplotlib_inline.backend_inline", "rubbish", ""],
    "COLUMNS": ["0", "-1", "x", "1"],
    "TERM": ["dumb", "", "x"],
    "HOME": ["", "/nonexistent"],
    "OMP_NUM_THREADS": ["x", "0", "-1", ""],
    "SLURM_JOB_ID": ["x", ""],
    "SLURM_CPUS_PER_TASK": ["x", "0"],
    "SLURM_NTASKS": ["x", "4"],
    "SLURM_PROCID": ["x"],
    "SLURM_ARRAY_TASK_ID": ["x"],
    "RANK": ["x", "7"],
    "WORLD_SIZE": ["x", "-1"],
    "LOCAL_RANK": ["x"],
    "PMI_RANK": ["x"],
    "OMPI_COMM_WORLD_SIZE": ["x"],
    "CUDA_VISIBLE_DEVICES": ["99", "x", ""],
    "TZ": ["x"],
    "NO_COLOR": ["1"],
    "FORCE_COLOR": ["1"],
}
IN_ENVIRONMENT = (NEW, STATUS, REPORT, SWEEP, SUBMIT, "list methods -v", "list keys")


# ---- the runner ----


@dataclass(frozen=True)
class Ended:
    """How a command ended. fault: the traceback, if it was not by an exit."""

    code: int
    out: str
    err: str
    fault: str = ""


def fedara(words: list[str]) -> Ended:
    """`fedara WORDS` in this process, ended after LIMIT_SECONDS."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"still running after {LIMIT_SECONDS} s")

    out, err = io.StringIO(), io.StringIO()
    threads = torch.get_num_threads()
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_SECONDS)
    code, fault = 0, ""
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            app(words, prog_name="fedara")
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 0
    except BaseException:
        fault = traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        torch.set_num_threads(threads)
    return Ended(code=code, out=out.getvalue(), err=err.getvalue(), fault=fault)


def wrong(ended: Ended) -> str:
    """What is wrong with an end; "" if nothing is."""
    lines = [line for line in ended.err.splitlines() if not line.startswith("warning: ")]
    if ended.fault:
        return ended.fault
    if ended.code == 0 or "Usage: fedara" in ended.err:
        return ""
    if ended.code == 1:
        named = any(line.startswith("fedara: ") for line in lines) or "other bits" in ended.out
        return "" if named else "exit code 1 without a cause"
    if ended.code != 2:
        return f"exit code {ended.code}"
    return "" if len(lines) == 1 else f"exit code 2 with {len(lines)} lines: {ended.err}"


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the hub, and without a Slurm, which may let each command wait."""
    programs = put_first(tmp_path / "bin", monkeypatch)
    for name in ("scontrol", "squeue"):
        stand_in(programs, name, "exit 1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every target, undamaged: a config, data, a finished and an unfinished run."""
    folder = tmp_path_factory.mktemp("whole")
    rows = pd.DataFrame({"text": [f"word{i} a" for i in range(40)], "label": 20 * ["yes", "no"]})
    for name in ("data", "parquet"):
        (folder / name).mkdir()
        (folder / name / "labels.json").write_text('["no", "yes"]\n')
        rows[:8].to_json(folder / name / "test.jsonl", orient="records", lines=True)
        config = TINY.read_text()
        for old, new in (
            ("num_rounds = 6", "num_rounds = 2"),
            ("num_clients = 8\ncohort = 5", "num_clients = 4\ncohort = 2"),
            ("local_steps = 4", "local_steps = 1"),
            ('[dataset]\nname = "toy"', f'[dataset]\nname = "file:{folder / name}"'),
        ):
            assert old in config
            config = config.replace(old, new)
        (folder / f"{name}.toml").write_text(config)
    (folder / "data.toml").rename(folder / "config.toml")
    rows.to_csv(folder / "data" / "train.csv", index=False)
    rows.to_parquet(folder / "parquet" / "train.parquet")
    shutil.copy(SITE, folder / "site.toml")
    (folder / "costs.toml").write_text("[all]\nalpha_seconds = 1e-6\nbeta_seconds_per_byte = 1e-9")
    plan = make_plan(folder / "config.toml", None, [])
    (folder / "plans").mkdir()
    (folder / "plans" / "plan-fuzz.jsonl").write_text(plan.text)
    ended = fedara(RUN.format(folder=folder).split())
    assert wrong(ended) == "", wrong(ended)
    shutil.copytree(folder / "results", folder / "unfinished")
    next((folder / "unfinished").glob("*/DONE")).unlink()
    return folder


def copy_of(whole: Path, folder: Path) -> Path:
    """A copy for one case, whose configs and plan name the copy's data."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    for config in (*folder.glob("*.toml"), *folder.glob("plans/*.jsonl")):
        config.write_text(config.read_text().replace(str(whole), str(folder)))
    return folder


def words_of(command: str, folder: Path) -> list[str]:
    run = next((folder / "results").iterdir(), folder)
    return [word.format(folder=folder, run=run) for word in command.split()]


def check(target_name: str, seed: int, whole: Path, tmp_path: Path, mutations: list[str]) -> None:
    """Every command of a target after these mutations; fails with all that is wrong."""
    target = TARGETS[target_name]
    folder = tmp_path / "case"
    faults = []
    for mutation in mutations:
        for command in target.commands:
            if mutation in target.without:
                continue
            copy_of(whole, folder)
            run_id = next((folder / "results").iterdir()).name
            file = folder / target.file.format(id=run_id)
            rng = random.Random(f"{seed} {target_name} {mutation}")
            file.write_bytes(MUTATIONS[mutation](rng, file.read_bytes()))
            if reason := wrong(fedara(words_of(command, folder))):
                case = (target_name, command.split()[0], mutation)
                faults.append(f"{case}, seed {seed}:\n{reason}")
    assert not faults, "\n".join(faults)


def some_mutations(target_name: str) -> list[str]:
    """Three of the mutations, other ones for each target, so that the fast part tries them all."""
    place = list(TARGETS).index(target_name)
    names = [name for name in MUTATIONS if name not in TARGETS[target_name].without]
    return [names[(3 * place + step) % len(names)] for step in range(3)]


@pytest.mark.parametrize("target", TARGETS)
def test_a_damaged_file_is_told(target: str, whole: Path, tmp_path: Path) -> None:
    check(target, 0, whole, tmp_path, some_mutations(target))


@pytest.mark.slow
@pytest.mark.parametrize("seed", SLOW_SEEDS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_damaged_file_is_told_by_all_commands(
    target: str, seed: int, whole: Path, tmp_path: Path
) -> None:
    check(target, seed, whole, tmp_path, list(MUTATIONS))


@pytest.mark.parametrize("what", ["gone", "a folder"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_lost_file_is_told(target: str, what: str, whole: Path, tmp_path: Path) -> None:
    folder = copy_of(whole, tmp_path / "case")
    run_id = next((folder / "results").iterdir()).name
    file = folder / TARGETS[target].file.format(id=run_id)
    file.unlink()
    if what == "a folder":
        file.mkdir()
    for command in TARGETS[target].commands:
        assert wrong(fedara(words_of(command, folder))) == "", (command, what)


def environments(seed: int) -> Iterator[tuple[str, str]]:
    rng = random.Random(seed)
    for name, values in ENVIRONMENT.items():
        yield name, rng.choice(values)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 5))]
)
def test_a_wrong_environment_is_told(
    seed: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = []
    for number, (name, value) in enumerate(environments(seed)):
        command = IN_ENVIRONMENT[(seed + number) % len(IN_ENVIRONMENT)]
        folder = copy_of(whole, tmp_path / "case")
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            if reason := wrong(fedara(words_of(command, folder))):
                faults.append(f"{name}={value!r} fedara {command}, seed {seed}:\n{reason}")
    assert not faults, "\n".join(faults)
