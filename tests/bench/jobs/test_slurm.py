"""fedara submit: site files, job scripts against goldens, and what sbatch is asked.

FEDARA_WRITE_GOLDEN=1 writes tests/golden anew.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.ask import own_command
from bench.jobs.plan import Plan, make_plan
from bench.jobs.slurm import read_site, submit_plan
from bench.jobs.slurm_script import Chunk, Site, _ranges, array_script, figures_script
from bench.jobs.status import read_status
from fedara_core.errors import InputError
from support.launch import ROOT, TINY, pretend_finished, wait_for
from support.stand_in import put_first, stand_in

SITES = sorted((ROOT / "slurm" / "sites").glob("*.toml"))
GOLDEN = Path(__file__).parents[2] / "golden"
HOME = Path("/home/me/fedara")
PROGRAM = [f"{HOME}/.venv/bin/python", "-P", f"{HOME}/bench/__main__.py"]


def demo_scripts(site: Path) -> dict[str, str]:
    """Name and text of both job scripts for a plan whose lines 3 and 4 are done."""
    plan = Plan(name="plan-demo-01234567", results=Path("results/demo"), text="", runs=())
    settings = read_site(site)
    return {
        f"{site.stem}.sbatch": array_script(
            plan, settings, Chunk(lines=(0, 1, 2, 5)), PROGRAM, HOME
        ),
        f"{site.stem}-figures.sbatch": figures_script(plan, settings, PROGRAM, HOME),
    }


@pytest.mark.parametrize("site", SITES, ids=lambda path: path.stem)
def test_job_scripts_equal_the_goldens(site: Path) -> None:
    for name, text in demo_scripts(site).items():
        if os.environ.get("FEDARA_WRITE_GOLDEN"):
            (GOLDEN / name).write_text(text)
        assert text == (GOLDEN / name).read_text(), name


def test_every_golden_has_its_site() -> None:
    assert {path.name for path in GOLDEN.glob("*.sbatch")} == {
        name for site in SITES for name in demo_scripts(site)
    }


def test_shellcheck_has_nothing_to_say() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = str(shellcheck) if shellcheck.exists() else shutil.which("shellcheck")
    if not found:
        pytest.skip("no shellcheck here")
    scripts = [*(ROOT / "slurm").glob("*.sbatch"), *GOLDEN.glob("*.sbatch")]
    assert len(scripts) >= 8
    done = subprocess.run([found, *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sbatch")), ids=lambda p: p.stem)
def test_a_script_without_a_config_says_how_to_use_it(script: Path) -> None:
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"usage: sbatch slurm/{script.name} CONFIG.toml" in done.stderr


# ---- site files ----


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            'time = "1:00"\nmpi = "pmix"\ngpus = 2',
            "unknown key gpus; allowed here: time, mpi, account",
        ),
        ('mpi = "pmix"', "time is missing"),
        ('time = "soon"\nmpi = "pmix"', "time = 'soon' is not allowed"),
        ('time = "60"\nmpi = "pmix"\nnodes = 0', "nodes = 0 is not allowed"),
        ('time = "60"\nmpi = "pmix"\naccount = "a\\nb"', "is not allowed"),
        ("time = 60 60", "is not valid TOML"),
    ],
)
def test_a_wrong_site_file_costs_one_line(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    done = fedara_submit(tmp_path, path)
    assert done.code == 2
    (line,) = done.refusals
    assert f"site {path}" in line
    assert reason in line


def test_a_missing_site_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_site(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([0], "0"), ([0, 1, 2, 3, 7], "0-3,7"), ([1, 3, 4], "1,3-4"), (list(range(200)), "0-199")],
)
def test_ranges(numbers: list[int], text: str) -> None:
    assert _ranges(numbers) == text


# ---- submission ----


def fedara_submit(folder: Path, site: Path, *words: object):  # type: ignore[no-untyped-def]
    from typer.testing import CliRunner

    from bench.cli import app
    from support.launch import Finished

    arguments = ["submit", TINY, "--site", site, "--results", folder / "out", *words]
    result = CliRunner().invoke(app, [str(word) for word in arguments])
    return Finished(code=result.exit_code, out=result.stdout, err=result.stderr, end_time=0)


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An sbatch on PATH: gives ids 41, 42, ...; its arguments go to the file returned."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    calls.touch()
    says_id = f'echo "$@" >> {calls}\necho "$((40 + $(wc -l < {calls})));cluster"'
    stand_in(folder, "sbatch", says_id)
    stand_in(folder, "scontrol", "exit 1")
    stand_in(folder, "squeue", "echo 41_0")
    put_first(folder, monkeypatch)
    return calls


def sweep_of(folder: Path, num_runs: int) -> Plan:
    config = folder / "many.toml"
    config.write_text(f"{TINY.read_text()}\n[sweep]\nseed = {list(range(num_runs))}\n")
    return make_plan(config, folder / "out", [])


def test_submit_asks_for_an_array_and_then_for_figures(tmp_path: Path, sbatch: Path) -> None:
    done = fedara_submit(tmp_path, SITES[0])
    assert done.code == 0, done.err
    plan = make_plan(TINY, tmp_path / "out", [])
    array = tmp_path / "out" / f"{plan.name}.sbatch"
    figures = tmp_path / "out" / f"{plan.name}-figures.sbatch"
    assert sbatch.read_text().splitlines() == [
        f"--parsable {array}",
        f"--parsable --dependency=afterany:41 {figures}",
    ]
    assert "job 41: 1 of 1 runs" in done.out
    assert "job 42: figures" in done.out
    assert plan.path.read_text() == plan.text
    assert "#SBATCH --array=0%10\n" in array.read_text()
    assert (tmp_path / "out" / "logs").is_dir()  # Slurm makes no folders
    assert [run.state for run in read_status(tmp_path / "out")] == ["waiting"]


def test_a_dry_run_prints_both_scripts_and_writes_nothing(tmp_path: Path, sbatch: Path) -> None:
    done = fedara_submit(tmp_path, SITES[0], "--dry-run")
    assert done.code == 0, done.err
    assert done.out.count("#!/bin/bash") == 2
    assert "1 of 1 runs would be submitted" in done.out
    assert not (tmp_path / "out").exists()
    assert sbatch.read_text() == ""


def test_what_is_done_is_not_submitted_again(tmp_path: Path, sbatch: Path) -> None:
    config = tmp_path / "three.toml"
    config.write_text(f"{TINY.read_text()}\n[sweep]\nseed = [0, 1, 2]\n")
    plan = make_plan(config, tmp_path / "out", [])
    site = Site(time="60", mpi="pmi2")
    for index in (1, 0, 2):
        pretend_finished(plan.results / plan.runs[index].run_id, num_rounds=6)
        if index == 1:
            submit_plan(plan, site, dry_run=False)
            assert "#SBATCH --array=0,2\n" in plan.path.with_suffix(".sbatch").read_text()
    (line,) = submit_plan(plan, site, dry_run=False)
    assert "nothing to submit" in line
    assert len(sbatch.read_text().splitlines()) == 2


def test_no_sbatch_costs_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = fedara_submit(tmp_path, SITES[0])
    assert done.code == 2
    (line,) = done.refusals
    assert "no sbatch here" in line
    assert not (tmp_path / "out").exists()


def test_a_refusal_of_sbatch_costs_one_line(tmp_path: Path, sbatch: Path) -> None:
    program = tmp_path / "bin" / "sbatch"
    program.write_text("#!/bin/sh\necho 'sbatch: error:' >&2\necho 'Invalid account' >&2\nexit 1\n")
    done = fedara_submit(tmp_path, SITES[0])
    assert done.code == 2
    (line,) = done.refusals
    assert "sbatch: error: Invalid account" in line


@pytest.mark.parametrize(
    ("printed", "job_id"),
    [
        ("Welcome to 3 clusters\n41", "41"),
        ("*** 2026 ***\n\n1234567;alps  \n", "1234567"),
        ("12\n13", "13"),
        ("13\nThank you for using 99 nodes", "13"),
    ],
)
def test_a_banner_is_no_job_id(tmp_path: Path, sbatch: Path, printed: str, job_id: str) -> None:
    says = f'echo "$@" >> {sbatch}\ncat <<"END"\n{printed}\nEND'
    stand_in(tmp_path / "bin", "sbatch", says)
    done = fedara_submit(tmp_path, SITES[0])
    assert done.code == 0, done.err
    assert f"job {job_id}: 1 of 1 runs" in done.out
    assert f"--dependency=afterany:{job_id} " in sbatch.read_text()


@pytest.mark.parametrize("printed", ["", "Submitted, goodbye", "12 jobs"])
def test_an_sbatch_that_names_no_job_costs_one_line(
    tmp_path: Path, sbatch: Path, printed: str
) -> None:
    stand_in(tmp_path / "bin", "sbatch", f"echo '{printed}'")
    done = fedara_submit(tmp_path, SITES[0])
    assert done.code == 2
    (line,) = done.refusals
    assert "sbatch named no job for" in line
    assert printed in line


def test_an_sbatch_that_does_not_answer_costs_one_line(
    tmp_path: Path, sbatch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.jobs.slurm._SBATCH_SECONDS", 0.3)
    stand_in(tmp_path / "bin", "sbatch", "sleep 60")
    done = fedara_submit(tmp_path, SITES[0])
    assert done.code == 2
    assert "sbatch: no answer in 0.3 s" in done.refusals[0]


@pytest.mark.parametrize("array_limit", [None, 7])
def test_a_sweep_beyond_max_array_size_is_several_arrays(
    tmp_path: Path, sbatch: Path, array_limit: int | None
) -> None:
    """With a limit one after the other, so that not more than that run at a time."""
    stand_in(tmp_path / "bin", "scontrol", "echo 'MaxArraySize            = 11'")
    plan = sweep_of(tmp_path, 23)
    said = submit_plan(plan, Site(time="60", mpi="pmi2", array_limit=array_limit), dry_run=False)
    assert said[0].startswith("job 41, 42, 43: 23 of 23 runs")
    out = tmp_path / "out" / plan.name
    after = [f"--dependency=afterany:{n} " if array_limit else "" for n in (41, 42)]
    assert sbatch.read_text().splitlines() == [
        f"--parsable {out}.sbatch",
        f"--parsable {after[0]}{out}-from-10.sbatch",
        f"--parsable {after[1]}{out}-from-20.sbatch",
        f"--parsable --dependency=afterany:41:42:43 {out}-figures.sbatch",
    ]
    last = Path(f"{out}-from-20.sbatch").read_text()
    assert "#SBATCH --array=0-2" in last
    assert "SLURM_ARRAY_TASK_ID + 20" in last


def test_a_slurm_without_arrays_is_refused(tmp_path: Path, sbatch: Path) -> None:
    stand_in(tmp_path / "bin", "scontrol", "echo 'MaxArraySize = 0'")
    done = fedara_submit(tmp_path, SITES[0])
    assert done.code == 2
    assert "MaxArraySize = 0" in done.refusals[0]
    assert sbatch.read_text() == ""


# ---- the array script, run by bash with a stand-in for srun ----


class Task:
    """One task of the array, started by hand."""

    def __init__(self, folder: Path, srun: str) -> None:
        self.plan = make_plan(TINY, folder / "out", [])
        self.plan.write()
        program = folder / "bin" / "srun"
        program.parent.mkdir()
        program.write_text(f'#!/bin/bash\necho srun "$@" > {folder}/srun\n{srun}\n')
        program.chmod(0o755)
        site = Site(time="60", mpi="pmi2", setup=[f'export PATH="{program.parent}:$PATH"'])
        script = folder / "job.sbatch"
        script.write_text(array_script(self.plan, site, Chunk(lines=(0,)), own_command(), folder))
        slurm = {"CPUS_PER_TASK": "3", "ARRAY_TASK_ID": "0", "ARRAY_JOB_ID": "41"}
        environment = {**os.environ, **{f"SLURM_{key}": value for key, value in slurm.items()}}
        with self.plan.log(0).open("a") as log:
            self.process = subprocess.Popen(
                ["bash", str(script)], env=environment, stdout=log, stderr=log
            )


def test_the_script_starts_its_line_and_writes_down_a_failure(tmp_path: Path) -> None:
    task = Task(tmp_path, "echo 'fedara: no data'; exit 2")
    assert task.process.wait(20) == 2
    words = (tmp_path / "srun").read_text().split()
    assert words[:5] == ["srun", "-c", "3", "--wait=10", "--mpi=pmi2"]
    assert words[5:10] == [*own_command(), "run", str(task.plan.path)]
    assert words[-2:] == ["--index", "0"]
    (status,) = read_status(task.plan.results)
    assert (status.state, status.reason) == ("failed", "no data (exit code 2)")


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_the_script_hands_signals_on_and_waits(
    tmp_path: Path, sent: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(put_first(tmp_path / "slurm", monkeypatch), "squeue", "echo 41_0")
    ready = tmp_path / "ready"
    task = Task(
        tmp_path,  # at TERM it would end like srun, which then kills its tasks
        "trap 'sleep 0.3; echo checkpoint after USR1; exit 0' USR1\n"
        f"touch {ready}\nwhile true; do sleep 0.05; done",
    )
    wait_for(ready.exists, "the stand-in to run", 20)
    task.process.send_signal(sent)
    assert task.process.wait(20) == 0
    assert "checkpoint after USR1" in task.plan.log(0).read_text()
    (status,) = read_status(task.plan.results)
    assert status.state == "running"  # no DONE, no failure: it will go on
