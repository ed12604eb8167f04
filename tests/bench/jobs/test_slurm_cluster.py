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
from typer.testing import CliRunner

from bench.ask import own_command
from bench.cli import app
from bench.config.load import load_runs
from bench.jobs.plan import Plan, make_plan
from bench.jobs.slurm import read_site
from bench.jobs.slurm_script import Chunk, array_script
from support.launch import ROOT, TINY, environment, fedara_here, rounds_of

pytestmark = [pytest.mark.xdist_group("jobs"), pytest.mark.slow]

CLUSTER = "fedara-test"  # the name in start_slurm.sh: no test submits to anybody's real cluster
LIMIT_SECONDS = 300  # for what two free cores do in 30
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
NUM_ROUNDS = 20  # seconds of training, so that signals arrive in the middle
SITE = 'time = "00:10:00"\nmpi = "pmi2"\n'  # one process each: the run by hand has four
# Two runs of the same bits, so that one uninterrupted run is what all are compared with.
SWEEP = '[sweep]\n"federation.merge_path" = ["allgather", "split"]\n'
BY_HAND, KILLED, *LINES = "by_hand", "killed", "line 0", "line 1"
BY_HAND_NODES = {BY_HAND: 2, KILLED: 1}
SAME = ("round_index", "cohort", "train_loss", "accuracy", "uplink_bytes", "state_digest")
DISTURBED = {  # run -> what scancel is told; the array has the job id of its last line
    BY_HAND: ("--batch", "--signal=USR1"),
    "line 0": (),
    "line 1": ("--signal=TERM",),
}


def call(*words: object) -> str:
    """What a command prints; fails the test with what it says if it fails."""
    command = [str(word) for word in words]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def fedara(*words: object) -> str:
    """What a subcommand prints, in this process: importing torch takes longer than all it does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # where jobs run, with this environment
        patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
        result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


@dataclass
class Story:
    """The runs and jobs of this file, by name, and what was seen of them."""

    folder: Path
    say: Callable[[str], None]
    run_dirs: dict[str, Path] = field(default_factory=dict)
    logs: dict[str, Path] = field(default_factory=dict)
    jobs: dict[str, str] = field(default_factory=dict)  # name -> Slurm's id
    states: dict[str, str] = field(default_factory=dict)  # name -> the last state seen
    before: dict[str, str] = field(default_factory=dict)  # run -> its rounds.jsonl at the signal
    statuses: list[str] = field(default_factory=list)  # what `fedara status` said, each time

    @property
    def plan(self) -> Plan:
        return make_plan(self.folder / "two.toml", self.folder / "array", [])

    def facts(self, name: str) -> dict[str, str]:
        """JobState, Restarts, StartTime, EndTime, ... of a job."""
        said = call("scontrol", "show", "job", "--oneliner", self.jobs[name])
        return dict(re.findall(r"(\w+)=(\S*)", said))

    def rounds_text(self, name: str) -> str:
        """The whole lines of a run's rounds so far."""
        path = self.run_dirs[name] / "rounds.jsonl"
        text = path.read_text() if path.exists() else ""
        return text[: text.rfind("\n") + 1]

    def look(self) -> None:
        """Ask Slurm for the states of all jobs, and say what changed."""
        names = {job_id: name for name, job_id in self.jobs.items()}
        words = ("squeue", "--noheader", "--array", "--states=all", "--format=%i %T")
        for line in call(*words, "--jobs", ",".join(names)).splitlines():
            job_id, state = line.split()
            name = names.get(job_id)
            if name and self.states.get(name) != state:
                self.states[name] = state
                self.say(f"job {job_id}, {name}: {state.lower()}")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Look until the condition holds; fails after the limit."""
        end = time.monotonic() + LIMIT_SECONDS
        while not condition():
            assert time.monotonic() < end, f"waited {LIMIT_SECONDS} s for {what}"
            time.sleep(0.3)
            self.look()

    def all_ended(self) -> bool:
        return self.ended(*self.jobs)

    def ended(self, *names: str) -> bool:
        return all(self.states.get(name) in ENDED for name in names)

    def submit_by_hand(self, name: str) -> None:
        """slurm/run.sbatch as a person would: from a folder with a .venv, with options."""
        job_id = call(
            *("sbatch", "--parsable", f"--chdir={self.folder}", "--export=ALL,FEDARA_MPI=pmi2"),
            *(f"--nodes={BY_HAND_NODES[name]}", "--ntasks-per-node=2", "--cpus-per-task=1"),
            *("--time=10", ROOT / "slurm" / "run.sbatch", "one.toml", name),
        )
        self.jobs[name] = job_id
        self.logs[name] = self.folder / f"fedara-{job_id}.log"
        self.say(f"sbatch slurm/run.sbatch: job {job_id}, {name}, 2 processes a node")

    def submit_array(self, lines: dict[int, str], figures: str) -> None:
        """`fedara submit`; lines: the jobs' names of those that it is to submit."""
        words = ("--site", self.folder / "site.toml", "--results", self.plan.results)
        said = fedara("submit", self.folder / "two.toml", *words)
        assert f"{len(lines)} of 2 runs" in said
        array, self.jobs[figures] = re.findall(r"^job (\d+):", said, re.MULTILINE)
        self.jobs |= {name: f"{array}_{line}" for line, name in lines.items()}
        self.say(f"fedara submit: array {array}, then figures {self.jobs[figures]}")

    def disturb(self) -> bool:
        """Kill or scancel those runs that now have two rounds; whether all have had it."""
        for name in {KILLED, *DISTURBED} - self.before.keys():
            text = self.rounds_text(name)
            if self.ended(name):
                # Slurm 22.05 at times reads a request of MPI_Init in two halves and ends the step.
                log = self.logs[name].read_text()
                assert name in BY_HAND_NODES, f"{name} ended early: {log}"
                assert "mpi/pmi2" in log
                self.say(f"{name}: MPI did not start, Slurm's pmi2 failed; submitted again")
                self.states.pop(name)
                self.submit_by_hand(name)
            elif text.count("\n") >= 2:
                if name == KILLED:
                    words = ("kill", "-KILL", self.process(KILLED, 1))
                else:
                    words = ("scancel", *DISTURBED[name], self.jobs[name])
                call(*words)
                self.before[name] = text
                self.say(f"{shlex.join(words)}, after {text.count(chr(10))} rounds of {name}")
        return {KILLED, *DISTURBED} == self.before.keys()

    def process(self, name: str, world_rank: int) -> str:
        """The process id of one process of a job."""
        wanted = {f"SLURM_JOB_ID={self.jobs[name]}", f"SLURM_PROCID={world_rank}"}
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if wanted <= set(path.read_bytes().decode(errors="replace").split("\0")):
                    return path.parent.name
        raise AssertionError(f"no process {world_rank} of {name} here")


def play(story: Story) -> None:
    """Submit an array and a run by hand, disturb all of them, submit what is left again."""
    one = TINY.read_text().replace("num_rounds = 6", f"num_rounds = {NUM_ROUNDS}")
    for name, text in (("one.toml", one), ("two.toml", one + SWEEP), ("site.toml", SITE)):
        (story.folder / name).write_text(text)
    (alone,) = load_runs(story.folder / "one.toml", [])
    plan, reference = story.plan, story.folder / "reference"
    story.run_dirs = {name: story.folder / name / alone.run_id for name in (BY_HAND, KILLED)}
    story.run_dirs["reference"] = reference / alone.run_id
    for index, name in enumerate(LINES):
        story.run_dirs[name] = plan.results / plan.runs[index].run_id
        story.logs[name] = plan.log(index)

    program = story.folder / ".venv" / "bin" / "fedara"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {shlex.join(own_command())} "$@"\n')
    program.chmod(0o755)
    for name in BY_HAND_NODES:
        story.submit_by_hand(name)
    story.submit_array(dict(enumerate(LINES)), "figures")
    story.until(story.disturb, "two rounds of each run")
    story.until(lambda: story.ended(KILLED), "the end of the killed job")
    call("scontrol", "requeue", story.jobs[KILLED])
    job = fedara_here("run", story.folder / "one.toml", "--results", reference)
    assert job.code == 0, job.err
    story.say("the reference ran in this process, without an interruption")
    story.until(lambda: story.ended(*LINES, "figures"), "the end of the array")
    story.statuses.append(fedara("status", plan.results))
    story.submit_array({0: "line 0 again"}, "figures again")
    call("scancel", story.jobs["figures again"])  # they take seconds, and were drawn once
    story.until(story.all_ended, "the end of all jobs")
    story.statuses.append(fedara("status", plan.results))
    for name, log in story.logs.items():
        for line in re.findall("^fedara: .*", log.read_text(), re.MULTILINE):
            story.say(f"{name} said: {line}")
    for name, run_dir in story.run_dirs.items():
        story.say(f"last digest of {name}: {rounds_of(run_dir)[-1]['state_digest']}")


@pytest.fixture(scope="module")
def story(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Story]:
    """Everything played to its end; no job outlives the tests."""
    try:
        config = call("scontrol", "show", "config")
    except (OSError, AssertionError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"no Slurm answers (.ci/start_slurm.sh): {str(error).splitlines()[0]}")
    if not re.search(rf"^ClusterName\s*= {CLUSTER}$", config, re.MULTILINE):
        pytest.skip(f"the Slurm here is not the tests' own, {CLUSTER}")
    capture = request.config.pluginmanager.getplugin("capturemanager")
    start = time.monotonic()

    def say(text: str) -> None:
        with capture.global_and_fixture_disabled():
            line = f"\nslurm {time.monotonic() - start:5.1f} s  {text}"
            print(line, end="", file=sys.stderr, flush=True)  # what xdist lets through

    story = Story(folder=tmp_path_factory.mktemp("slurm"), say=say)
    try:
        play(story)
        say("\n")
        yield story
    except BaseException:
        for log in filter(Path.exists, story.logs.values()):
            say(f"---- {log}\n{log.read_text()}")
        raise
    finally:
        if story.jobs:
            call("scancel", "--quiet", *story.jobs.values())
            story.until(story.all_ended, "the end of cancelled jobs")


def run_facts(run_dir: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((run_dir / "run.json").read_text())
    return facts


@pytest.mark.parametrize("name", [BY_HAND, KILLED, *LINES])
def test_every_run_ends_in_the_reference_s_bits(name: str, story: Story) -> None:
    assert (story.run_dirs[name] / "DONE").exists()
    rows = rounds_of(story.run_dirs[name])
    assert [row["round_index"] for row in rows] == list(range(NUM_ROUNDS))
    for row, wanted in zip(rows, rounds_of(story.run_dirs["reference"]), strict=True):
        assert {key: row[key] for key in SAME} == {key: wanted[key] for key in SAME}
    assert story.rounds_text(name).startswith(story.before.get(name, ""))


@pytest.mark.parametrize("name", [BY_HAND, "line 1"])
def test_no_round_is_lost_or_done_twice(name: str, story: Story) -> None:
    said = re.findall(rf"^round (\d+)/{NUM_ROUNDS} ", story.logs[name].read_text(), re.MULTILINE)
    assert [int(number) for number in said] == list(range(1, NUM_ROUNDS + 1))


@pytest.mark.parametrize(
    ("name", "num_nodes", "world_size", "signal_name"),
    [(BY_HAND, "2", 4, "SIGUSR1"), ("line 1", "1", 1, "SIGTERM")],
)
def test_a_signal_requeues_the_job(
    name: str, num_nodes: str, world_size: int, signal_name: str, story: Story
) -> None:
    job, run = story.facts(name), run_facts(story.run_dirs[name])
    assert (job["JobState"], job["Restarts"], job["NumNodes"]) == ("COMPLETED", "1", num_nodes)
    (part,) = run["parts"]
    assert run["world_size"] == part["world_size"] == world_size
    assert run["slurm"]["SLURM_JOB_ID"] == part["slurm"]["SLURM_JOB_ID"] == job["JobId"]
    rounds_done = part["first_round_index"]
    assert 2 <= story.before[name].count("\n") <= rounds_done < NUM_ROUNDS
    interrupted = f"interrupted after round {rounds_done} of {NUM_ROUNDS} by {signal_name}"
    lines = story.logs[name].read_text().splitlines()
    assert lines.count(f"fedara: {interrupted}; start again to resume") == 1
    # Slurm may end the process before it can say so, and then says it alone.
    requeued = rf"fedara: job {story.jobs[name]} is requeued$|slurmstepd.* DUE TO JOB REQUEUE"
    assert any(re.match(requeued, line) for line in lines)


def test_a_killed_job_goes_on_when_requeued(story: Story) -> None:
    """One process was killed: Slurm ends the other, and MPI starts again under the same job id."""
    job = story.facts(KILLED)
    assert (job["JobState"], job["Restarts"], job["NumNodes"]) == ("COMPLETED", "1", "1")
    assert run_facts(story.run_dirs[KILLED])["parts"][-1]["slurm"]["SLURM_JOB_ID"] == job["JobId"]


def test_a_cancelled_job_stays_cancelled_and_its_run_goes_on_when_submitted_again(
    story: Story,
) -> None:
    job, again = story.facts("line 0"), story.facts("line 0 again")
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    assert (again["JobState"], again["Restarts"]) == ("COMPLETED", "0")
    (part,) = run_facts(story.run_dirs["line 0"])["parts"]
    assert 2 <= part["first_round_index"] < NUM_ROUNDS


def test_status_says_what_happened(story: Story) -> None:
    first, last = story.statuses
    assert "2 runs: 0 running, 0 failed, 0 died, 1 interrupted, 0 waiting, 1 done" in first
    assert re.search(rf"^{story.run_dirs['line 0'].name} +interrupted ", first, re.MULTILINE)
    assert "2 runs: 0 running, 0 failed, 0 died, 0 interrupted, 0 waiting, 2 done" in last


def test_figures_are_drawn_when_all_lines_have_ended(story: Story) -> None:
    figures = story.facts("figures")
    assert figures["JobState"] == "COMPLETED"
    assert all(story.facts(name)["EndTime"] <= figures["StartTime"] for name in LINES)
    assert (story.plan.results / "figures" / "accuracy_rounds.png").exists()


def test_slurm_takes_the_script_of_the_shipped_site(story: Story) -> None:
    site = read_site(ROOT / "slurm" / "sites" / "test_cluster.toml")
    script = story.folder / "shipped.sbatch"
    script.write_text(array_script(story.plan, site, Chunk(lines=(0, 1)), own_command(), ROOT))
    call("sbatch", "--test-only", script)


def test_no_process_is_left(story: Story) -> None:
    left = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if bytes(story.folder) in path.read_bytes():
                left.append(path.parent.name)
    assert left == []
