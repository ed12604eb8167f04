"""Jobs on a real Slurm: an array, four processes on two nodes, signals, requeueing, scancel.

Needs the two emulated nodes of .ci/start_slurm.sh. One fixture submits and disturbs the jobs, and
says what happens whether the tests pass or not; the tests look at what it leaves.
"""

import contextlib
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from launch import ROOT, TINY, environment, fedara_here, rounds_of

from bench.config import load_runs
from bench.plan import make_plan

CLUSTER = "fedara-test"  # the name in start_slurm.sh: no test submits to anybody's real cluster
LIMIT_SECONDS = 300  # for what two free cores do in 40
NUM_ROUNDS = 30  # seconds of training, so that signals arrive in the middle
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
SITE = 'time = "00:10:00"\nnodes = 2\nmpi = "pmi2"\n'
SAME = ("round_index", "cohort", "train_loss", "accuracy", "uplink_bytes", "state_digest")
# The runs, by seed; the last three are an array. Its last task's job id is also the array's.
BY_HAND, WHOLE, CANCELLED, TERMINATED = range(4)


def slurm(*words: object) -> str:
    """What a command prints; fails the test with what it says if it fails."""
    command = [str(word) for word in words]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def facts_of(job_id: str) -> dict[str, str]:
    """JobState, Restarts, StartTime, EndTime, ... of a job, or of one task of an array: 5_1."""
    return dict(re.findall(r"(\w+)=(\S*)", slurm("scontrol", "show", "job", "--oneliner", job_id)))


def fedara(*words: object) -> str:
    return slurm(sys.executable, "-m", "bench", *words)


@dataclass
class Story:
    """The jobs of this file, by name, and what was seen of them."""

    folder: Path
    say: Callable[[str], None]
    jobs: dict[str, str] = field(default_factory=dict)  # Slurm's id -> name
    states: dict[str, str] = field(default_factory=dict)  # id -> the last state seen
    before: dict[int, str] = field(default_factory=dict)  # seed -> rounds.jsonl at the signal
    statuses: list[str] = field(default_factory=list)  # what `fedara status` said, each time

    @property
    def results(self) -> Path:
        return self.folder / "results"

    @property
    def reference(self) -> Path:
        return self.folder / "reference"

    def id_of(self, name: str) -> str:
        return next(job_id for job_id, known in self.jobs.items() if known == name)

    def run_dir(self, seed: int, results: Path | None = None) -> Path:
        (config,) = load_runs(self.folder / "one.toml", [f"seed={seed}"])
        return (results or self.results) / config.run_id

    def rounds_text(self, seed: int) -> str:
        """The whole lines of a run's rounds so far."""
        path = self.run_dir(seed) / "rounds.jsonl"
        text = path.read_text() if path.exists() else ""
        return text[: text.rfind("\n") + 1]

    def log(self, seed: int) -> str:
        """What the jobs of a run printed."""
        if seed == BY_HAND:
            return (self.folder / f"fedara-{self.id_of('by hand')}.log").read_text()
        plan = make_plan(self.folder / "three.toml", self.results, [])
        return plan.log(seed - WHOLE).read_text()

    def look(self) -> None:
        """Ask Slurm for the states of all jobs, and say what changed."""
        words = ("squeue", "--noheader", "--array", "--states=all", "--format=%i %T")
        for line in slurm(*words, "--jobs", ",".join(self.jobs)).splitlines():
            job_id, state = line.split()
            if job_id in self.jobs and self.states.get(job_id) != state:
                self.states[job_id] = state
                self.say(f"job {job_id}, {self.jobs[job_id]}: {state.lower()}")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Look until the condition holds; fails after the limit."""
        end = time.monotonic() + LIMIT_SECONDS
        while not condition():
            assert time.monotonic() < end, f"waited {LIMIT_SECONDS} s for {what}"
            time.sleep(0.2)
            self.look()

    def ended(self, *names: str) -> bool:
        return all(self.states.get(self.id_of(name)) in ENDED for name in names)

    def submit(self, names: dict[int, str], figures_name: str) -> None:
        """`fedara submit` the array; names: of its lines that are to be submitted."""
        site = self.folder / "site.toml"
        said = fedara(
            *("submit", self.folder / "three.toml", "--site", site, "--results", self.results)
        )
        array, figures = re.findall(r"^job (\d+):", said, re.MULTILINE)
        assert f"{len(names)} of 3 runs" in said
        self.jobs |= {f"{array}_{line}": name for line, name in names.items()}
        self.jobs[figures] = figures_name
        self.say(f"fedara submit: array {array}, then figures {figures}")

    def disturb(self, words_of: dict[int, tuple[str, ...]]) -> None:
        """scancel the jobs of these runs with their options, each after two rounds or more."""
        names = {BY_HAND: "by hand", CANCELLED: "line 1", TERMINATED: "line 2"}

        def all_done() -> bool:
            for seed in words_of.keys() - self.before.keys():
                text, job_id = self.rounds_text(seed), self.id_of(names[seed])
                if text.count("\n") >= 2:
                    slurm("scancel", *words_of[seed], job_id)
                    self.before[seed] = text
                    said = " ".join(["scancel", *words_of[seed], job_id])
                    self.say(f"{said}: after {text.count(chr(10))} rounds")
            return words_of.keys() == self.before.keys()

        self.until(all_done, "two rounds of each run")


def run_reference(story: Story) -> None:
    """The same four runs in this process, without an interruption."""
    for words in (("one.toml", "--set", f"seed={BY_HAND}"), ("three.toml",)):
        config = story.folder / words[0]
        job = fedara_here("run", config, "--results", story.reference, *words[1:])
        assert job.code == 0, job.err


def play(story: Story) -> None:
    """Submit an array of three runs and one run by hand, disturb three of them, submit again."""
    text = TINY.read_text().replace("num_rounds = 6", f"num_rounds = {NUM_ROUNDS}")
    (story.folder / "one.toml").write_text(text)
    seeds = f"[sweep]\nseed = [{WHOLE}, {CANCELLED}, {TERMINATED}]\n"
    (story.folder / "three.toml").write_text(f"{text}\n{seeds}")
    (story.folder / "site.toml").write_text(SITE)
    program = story.folder / ".venv" / "bin" / "fedara"  # where the script looks for it
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m bench "$@"\n')
    program.chmod(0o755)

    by_hand = slurm(
        *("sbatch", "--parsable", f"--chdir={story.folder}", "--export=ALL,FEDARA_MPI=pmi2"),
        *("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--time=10"),
        *(ROOT / "slurm" / "run.sbatch", "one.toml", "results", "--set", f"seed={BY_HAND}"),
    )
    story.jobs[by_hand] = "by hand"
    story.say(f"sbatch run.sbatch: job {by_hand}, 2 nodes, 4 processes")
    story.submit({0: "line 0", 1: "line 1", 2: "line 2"}, "figures")
    story.disturb(
        {BY_HAND: ("--batch", "--signal=USR1"), TERMINATED: ("--signal=TERM",), CANCELLED: ()}
    )
    run_reference(story)
    story.say("the same runs, in one process: done")
    story.until(lambda: story.ended(*story.jobs.values()), "the end of all jobs")
    story.statuses.append(fedara("status", story.results))
    story.submit({1: "line 1 again"}, "figures again")
    slurm("scancel", story.id_of("figures again"))
    story.until(lambda: story.ended(*story.jobs.values()), "the end of the second array")
    story.statuses.append(fedara("status", story.results))
    story.say(story.statuses[-1].splitlines()[-1])


@pytest.fixture(scope="module")
def story(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Story]:
    """Everything played to its end; no job outlives the tests."""
    try:
        config = slurm("scontrol", "show", "config")
    except (OSError, AssertionError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"no Slurm answers, .ci/start_slurm.sh starts one: {error}")
    if not re.search(rf"^ClusterName\s*= {CLUSTER}$", config, re.MULTILINE):
        pytest.skip(f"the Slurm here is not the tests' own, {CLUSTER}")
    capture = request.config.pluginmanager.getplugin("capturemanager")
    start = time.monotonic()

    def say(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\nslurm {time.monotonic() - start:6.1f} s  {text}", end="", flush=True)

    story = Story(folder=tmp_path_factory.mktemp("slurm"), say=say)
    try:
        play(story)
        say("\n")
        yield story
    except BaseException:
        for path in [*story.folder.glob("*.log"), *story.results.glob("logs/*.log")]:
            say(f"---- {path.name}\n{path.read_text()}")
        raise
    finally:
        if story.jobs:
            slurm("scancel", "--quiet", *(job_id for job_id in story.jobs))
            story.until(lambda: story.ended(*story.jobs.values()), "the end of cancelled jobs")


def run_facts(run_dir: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((run_dir / "run.json").read_text())
    return facts


def check_rounds(story: Story, seed: int) -> None:
    """A run has every round once, each equal to the reference's."""
    run_dir = story.run_dir(seed)
    assert (run_dir / "DONE").exists()
    rows, expected = rounds_of(run_dir), rounds_of(story.run_dir(seed, story.reference))
    assert [row["round_index"] for row in rows] == list(range(NUM_ROUNDS))
    for row, wanted in zip(rows, expected, strict=True):
        assert {key: row[key] for key in SAME} == {key: wanted[key] for key in SAME}


def times_reported(story: Story, seed: int) -> list[int]:
    """How often the log of a run reports each of its rounds."""
    said = re.findall(rf"^round (\d+)/{NUM_ROUNDS} ", story.log(seed), re.MULTILINE)
    return [said.count(str(number)) for number in range(1, NUM_ROUNDS + 1)]


def test_an_undisturbed_line_of_the_array(story: Story) -> None:
    check_rounds(story, WHOLE)
    facts = run_facts(story.run_dir(WHOLE))
    assert (facts["comm"], facts["world_size"]) == ("mpi", 2)
    assert facts["slurm"]["SLURM_ARRAY_TASK_ID"] == "0"
    assert facts["slurm"]["SLURM_JOB_NODELIST"] == "n[1-2]"
    assert "parts" not in facts
    assert times_reported(story, WHOLE) == [1] * NUM_ROUNDS


@pytest.mark.parametrize(
    ("seed", "name", "world_size", "signal_name"),
    [(BY_HAND, "by hand", 4, "USR1"), (TERMINATED, "line 2", 2, "TERM")],
)
def test_a_signal_requeues_the_job_which_goes_on_with_the_same_bits(
    seed: int, name: str, world_size: int, signal_name: str, story: Story
) -> None:
    check_rounds(story, seed)
    facts = run_facts(story.run_dir(seed))
    (part,) = facts["parts"]
    assert facts["world_size"] == part["world_size"] == world_size
    assert part["slurm"] == facts["slurm"]  # a requeued job keeps its id
    assert part["slurm"]["SLURM_JOB_NODELIST"] == "n[1-2]"
    job = facts_of(story.id_of(name))
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    # It stopped after a whole round and went on with the next: none was lost or done twice.
    log, rounds_done = story.log(seed), part["first_round_index"]
    text = f"interrupted after round {rounds_done} of {NUM_ROUNDS} by SIG{signal_name}; start again"
    assert log.count(text) == 1
    assert len(re.findall(r"^fedara: job \S+ is requeued$", log, re.MULTILINE)) == 1
    assert 2 <= story.before[seed].count("\n") <= rounds_done < NUM_ROUNDS
    assert (story.run_dir(seed) / "rounds.jsonl").read_text().startswith(story.before[seed])
    assert times_reported(story, seed) == [1] * NUM_ROUNDS


def test_a_cancelled_run_stays_cancelled_until_it_is_submitted_again(story: Story) -> None:
    job = facts_of(story.id_of("line 1"))
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    check_rounds(story, CANCELLED)
    (part,) = run_facts(story.run_dir(CANCELLED))["parts"]
    assert 2 <= part["first_round_index"] < NUM_ROUNDS
    text = (story.run_dir(CANCELLED) / "rounds.jsonl").read_text()
    assert text.startswith(story.before[CANCELLED])


def test_status_says_what_happened(story: Story) -> None:
    first, last = story.statuses
    assert "4 runs: 0 running, 1 failed, 0 interrupted, 0 waiting, 3 done" in first
    cancelled = story.run_dir(CANCELLED).name
    assert re.search(rf"^{cancelled}: .*CANCELLED", first, re.MULTILINE)
    assert "4 runs: 0 running, 0 failed, 0 interrupted, 0 waiting, 4 done" in last


def test_figures_are_drawn_when_all_lines_have_ended(story: Story) -> None:
    figures = facts_of(story.id_of("figures"))
    assert figures["JobState"] == "COMPLETED"
    for line in ("line 0", "line 1", "line 2"):
        assert facts_of(story.id_of(line))["EndTime"] <= figures["StartTime"]
    assert (story.results / "figures" / "accuracy_rounds.png").exists()


def test_no_process_is_left(story: Story) -> None:
    folder = str(story.folder).encode()
    left = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if folder in path.read_bytes():
                left.append(path.parent.name)
    assert left == []
