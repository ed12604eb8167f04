"""The job scripts: names that Slurm would read otherwise, long arrays, modules that do not load."""

import os
import subprocess
from pathlib import Path

import pytest

from bench.jobs.plan import Plan
from bench.jobs.slurm_script import Chunk, Site, array_script, chunks, figures_script
from fedara_core.errors import InputError
from support.stand_in import stand_in

PROGRAM = ["python", "-P", "main.py"]


def plan_of(name: str = "demo", results: str = "out") -> Plan:
    return Plan(name=f"plan-{name}-0", results=Path(results), text="", runs=())


def option(script: str, name: str) -> str:
    """What follows #SBATCH --name=."""
    (found,) = [line for line in script.splitlines() if line.startswith(f"#SBATCH --{name}=")]
    return found.partition("=")[2]


def script_of(plan: Plan, **settings: object) -> str:
    site = Site(time="60", mpi="pmi2", **settings)  # type: ignore[arg-type]
    return array_script(plan, site, Chunk(lines=(0,)), PROGRAM, Path("/home"))


# ---- names ----


@pytest.mark.parametrize(
    ("results", "output"),
    [
        ("out", "out/logs/plan-demo-0-%a.log"),
        ("50%job", "50%%job/logs/plan-demo-0-%a.log"),
        ("%j", "%%j/logs/plan-demo-0-%a.log"),
        ("my out", '"my out/logs/plan-demo-0-%a.log"'),
        ("it's", '"it\'s/logs/plan-demo-0-%a.log"'),
        ('say "x"', '"say \\"x\\"/logs/plan-demo-0-%a.log"'),
        ("a#b", '"a#b/logs/plan-demo-0-%a.log"'),
    ],
)
def test_slurm_reads_the_log_s_name_as_it_is(results: str, output: str) -> None:
    """As Slurm 22.05 took them: %% is a percent sign, and # ends what is not quoted."""
    assert option(script_of(plan_of(results=results)), "output") == output


def test_a_config_s_name_goes_into_job_and_log() -> None:
    script = script_of(plan_of(name='a "%j"'))
    assert option(script, "job-name") == '"fedara-a \\"%j\\"-0"'
    assert option(script, "output") == '"out/logs/plan-a \\"%%j\\"-0-%a.log"'
    site = Site(time="60", mpi="pmi2")
    figures = figures_script(plan_of(name="%x"), site, PROGRAM, Path("/home"))
    assert option(figures, "output") == "out/logs/plan-%%x-0-figures.log"


@pytest.mark.parametrize(
    ("results", "reason"), [("a\\b", "backslash"), ("a\nb", "line break in Slurm's --output")]
)
def test_a_name_that_slurm_can_not_take_is_refused(results: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        script_of(plan_of(results=results))


# ---- long arrays ----


def log_of(script: str, index: int) -> str:
    """The log's name as Slurm makes it: %a is the index, %3a the index with three digits."""
    name = option(script, "output")
    for width in range(9):
        name = name.replace(f"%{width}a", f"{index:0{width}}")
    return name.replace("%a", str(index))


@pytest.mark.parametrize(
    ("size", "num_lines", "firsts"),
    [
        (None, 5000, [0]),
        (1001, 1001, [0]),
        (1001, 1002, [0, 1000]),
        (1001, 2500, [0, 1000, 2000]),
        (10, 25, [0, 10, 20]),
        (99, 101, [*range(0, 101, 10)]),
        (2, 3, [0, 1, 2]),
    ],
)
def test_a_long_sweep_is_several_arrays(
    size: int | None, num_lines: int, firsts: list[int]
) -> None:
    plan, site = plan_of(), Site(time="60", mpi="pmi2")
    found = chunks(list(range(num_lines)), size)
    assert [chunk.first for chunk in found] == firsts
    assert [line for chunk in found for line in chunk.lines] == list(range(num_lines))
    for chunk in found:
        script = array_script(plan, site, chunk, PROGRAM, Path("/home"))
        indices = option(script, "array").split("-")
        last = chunk.lines[-1]
        assert [int(i) for i in indices] == sorted({0, last - chunk.first})
        assert size is None or int(indices[-1]) < size
        assert log_of(script, last - chunk.first) == str(plan.log(last))
        assert log_of(script, 0) == str(plan.log(chunk.first))
        given = f"$((SLURM_ARRAY_TASK_ID + {chunk.first}))" if chunk.first else "TASK_ID"
        assert given in script


def test_only_what_is_left_is_in_the_arrays() -> None:
    found = chunks([3, 1500, 1502], 1001)
    assert [(chunk.first, chunk.lines) for chunk in found] == [(0, (3,)), (1000, (1500, 1502))]
    script = array_script(
        plan_of(), Site(time="60", mpi="pmi2", array_limit=4), found[1], PROGRAM, Path("/home")
    )
    assert option(script, "array") == "500,502%4"


# ---- modules and setup ----


def played(folder: Path, **settings: object) -> subprocess.CompletedProcess[str]:
    """The array's script by bash, with an srun that says so."""
    stand_in(folder / "bin", "srun", "echo srun ran")
    script = folder / "job.sbatch"
    script.write_text(script_of(plan_of(results=str(folder)), **settings))
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    more = {"PATH": path, "SLURM_CPUS_PER_TASK": "1", "SLURM_ARRAY_TASK_ID": "0"}
    return subprocess.run(
        ["bash", script], env={**os.environ, **more}, capture_output=True, text=True, check=False
    )


def test_a_module_that_does_not_load_ends_the_job(tmp_path: Path) -> None:
    stand_in(tmp_path / "bin", "module", '[ "$2" = openmpi ] || exit 4')
    done = played(tmp_path, modules=["openmpi", "cuda/13"], setup=["echo setup ran"])
    assert done.returncode == 4
    assert "ran" not in done.stdout
    assert done.stdout.splitlines()[-2:] == [
        "fedara: module load cuda/13 failed",
        "fedara: exit code 4",
    ]


def test_no_module_command_ends_the_job(tmp_path: Path) -> None:
    done = played(tmp_path, modules=["openmpi"])
    assert done.returncode == 127
    assert done.stdout.splitlines()[-1] == "fedara: exit code 127"


@pytest.mark.parametrize(
    "setup",
    [["false"], ["export A=1", "cd /none/such"], [". ./none.sh"], ["f() { return 1; }", "f"]],
)
def test_a_line_of_setup_that_fails_ends_the_job(tmp_path: Path, setup: list[str]) -> None:
    done = played(tmp_path, setup=setup)
    assert done.returncode != 0
    assert "srun ran" not in done.stdout
    assert done.stdout.splitlines()[-1] == f"fedara: exit code {done.returncode}"


@pytest.mark.parametrize(
    "setup",
    [
        [],
        ["[ -n '' ] && echo no", "if false; then", "  echo no", "fi"],
        ["f() { false; true; }", "f"],
    ],
)
def test_setup_that_works_goes_on(tmp_path: Path, setup: list[str]) -> None:
    stand_in(tmp_path / "bin", "module", "exit 0")
    done = played(tmp_path, modules=["openmpi"], setup=setup)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "srun ran" in done.stdout


def test_what_fails_inside_a_sourced_file_is_that_file_s_affair(tmp_path: Path) -> None:
    (tmp_path / "env.sh").write_text("false\ngrep -q x /dev/null\ntrue\n")
    done = played(tmp_path, setup=[f". {tmp_path}/env.sh"])
    assert (done.returncode, "srun ran" in done.stdout) == (0, True)
