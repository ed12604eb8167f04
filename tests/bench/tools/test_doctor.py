"""fedara doctor: what it says of Slurm, launchers, host names and energy in a wrong environment."""

import os
import platform
import shutil
import socket
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.cli import app
from bench.metering.codecarbon import RunEnergy, check_sources
from bench.run import provenance
from bench.tools import doctor
from support.stand_in import put_first, stand_in


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is first on PATH; in no Slurm job."""
    for key in [key for key in os.environ if key.startswith(("SLURM_", "HYDRA_", "GLOO_"))]:
        monkeypatch.delenv(key)
    return put_first(tmp_path / "bin", monkeypatch)


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """A PATH without these programs."""
    folders = os.environ["PATH"].split(os.pathsep)
    kept = [f for f in folders if not any((Path(f) / name).exists() for name in names)]
    monkeypatch.setenv("PATH", os.pathsep.join(kept))
    assert not any(map(shutil.which, names))


# ---- launchers in a Slurm job ----


HYDRA = 'case "$1" in --version) echo "HYDRA build details:";; esac'


@pytest.mark.parametrize(("srun", "state"), [("echo slurm 24", "ok"), ("exit 1", "bad")])
def test_mpiexec_in_a_slurm_job(
    programs: Path, monkeypatch: pytest.MonkeyPatch, srun: str, state: str
) -> None:
    monkeypatch.setattr(doctor, "beside", lambda python, name: str(programs / name))
    stand_in(programs, "mpiexec", HYDRA)
    stand_in(programs, "srun", srun)
    assert doctor.CHECKS["launchers"]().advice == ""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    found = doctor.CHECKS["launchers"]()
    assert found.state == state
    assert "HYDRA_LAUNCHER=fork" in found.advice
    monkeypatch.setenv("HYDRA_LAUNCHER", "fork")
    assert doctor.CHECKS["launchers"]().advice == ""


def test_another_mpiexec_needs_no_word(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "beside", lambda python, name: str(programs / name))
    stand_in(programs, "mpiexec", "echo 'mpiexec (OpenRTE) 4.1.4'")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert doctor.CHECKS["launchers"]().advice == ""


def test_an_mpi4py_of_the_working_folder_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mpi4py.py").write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    assert "mpi4py" in doctor.CHECKS["MPI library"]().text


# ---- Slurm ----


def test_no_slurm_is_fine(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "sinfo")
    found = doctor.CHECKS["Slurm"]()
    assert (found.state, found.text) == ("none", "not here")


def test_a_job_without_slurm_s_programs(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "sinfo")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    found = doctor.CHECKS["Slurm"]()
    assert found.state == "bad"
    assert "job 7" in found.text
    assert "unset SLURM_JOB_ID" in found.advice


@pytest.mark.parametrize(
    ("squeue", "said"), [("sleep 60", "no answer in 0.5 s"), ("echo down >&2; exit 1", "down")]
)
def test_a_controller_that_does_not_answer(
    programs: Path, monkeypatch: pytest.MonkeyPatch, squeue: str, said: str
) -> None:
    monkeypatch.setattr("bench.ask.ask.__kwdefaults__", {"seconds": 0.5})
    stand_in(programs, "sinfo", "echo slurm 24.05")
    stand_in(programs, "squeue", squeue)
    found = doctor.CHECKS["Slurm"]()
    assert found.state == "bad"
    assert "slurm 24.05" in found.text
    assert said in found.text
    stand_in(programs, "squeue", "echo 5")
    assert doctor.CHECKS["Slurm"]() == doctor.Finding("ok", "slurm 24.05")


# ---- host names and interfaces ----


def test_a_host_name_without_an_address(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.CHECKS["host name"]() == doctor.Finding("ok", socket.gethostname())
    monkeypatch.setattr(socket, "gethostname", lambda: "c0ffee.invalid")
    found = doctor.CHECKS["host name"]()
    assert found.state == "bad"
    assert "c0ffee.invalid has no address" in found.text
    assert "--local-addr" in found.advice


@pytest.mark.parametrize("name", ["eth77", "ib 0"])
def test_an_interface_that_is_not_there(
    programs: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", name)
    found = doctor.CHECKS["host name"]()
    assert found.state == "bad"
    assert repr(name) in found.text
    assert "allowed: lo" in found.advice


# ---- CPU ----


@pytest.mark.parametrize(
    ("flags", "state", "found", "advice"),
    [
        ({"avx512_bf16", "amx_bf16", "amx_tile"}, "ok", "a CPU, AMX", "several times as fast"),
        ({"avx2", "avx512_bf16"}, "ok", "a CPU, avx512_bf16", "products are about twice as fast"),
        ({"asimd", "bf16"}, "ok", "a CPU, bf16 units", "may be faster"),
        ({"avx2", "avx512f"}, "none", "a CPU, no bf16 units", "'fp32' is the faster"),
        (None, "ok", "a CPU", "unknown; fedara micro step measures both"),
    ],
)
def test_what_a_cpu_is_good_at(
    monkeypatch: pytest.MonkeyPatch, flags: set[str] | None, state: str, found: str, advice: str
) -> None:
    monkeypatch.setattr(doctor, "cpu_name", lambda: "a CPU")
    monkeypatch.setattr(doctor, "cpu_flags", lambda: flags)
    finding = doctor.CHECKS["CPU"]()
    assert (finding.state, finding.text) == (state, found)
    assert advice in finding.advice


@pytest.mark.parametrize(
    ("text", "name", "flags"),
    [
        (
            "model name\t: Some CPU @ 2 GHz\nflags\t\t: fpu amx_bf16\n\nflags\t\t: fpu\n",
            "Some CPU @ 2 GHz",
            {"fpu", "amx_bf16"},
        ),
        ("Features\t: fp asimd bf16\n", platform.machine(), {"fp", "asimd", "bf16"}),
        (None, platform.processor() or None, None),
    ],
    ids=["x86", "arm", "no /proc"],
)
def test_what_linux_says_of_a_cpu(
    monkeypatch: pytest.MonkeyPatch, text: str | None, name: str | None, flags: set[str] | None
) -> None:
    def read_text(path: Path, **_: str) -> str:
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(provenance.Path, "read_text", read_text)
    assert (provenance.cpu_name(), provenance.cpu_flags()) == (name, flags)


# ---- energy ----


def test_codecarbon_in_a_job_without_scontrol(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "scontrol")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    *_, check = check_sources(programs)
    assert not check.works
    assert "in Slurm job 7 codecarbon asks scontrol" in check.text
    assert "unset SLURM_JOB_ID" in check.advice


def test_codecarbon_in_a_job_whose_scontrol_does_not_answer(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.ask.ask.__kwdefaults__", {"seconds": 0.5})
    monkeypatch.setenv("SLURM_JOBID", "8")  # the older name
    stand_in(programs, "scontrol", "sleep 60")
    start, energy = time.monotonic(), RunEnergy("USA")
    with pytest.warns(RuntimeWarning, match="no codecarbon energy"):
        energy.start()
    assert time.monotonic() - start < 20
    assert "no answer in 0.5 s" in energy.missing
    assert energy.stop() == {}


# ---- names that rich would read as markup ----


@pytest.mark.parametrize("text", ["/home/[bold]me[/bold]", "[/red]", "[link=x]", "a:b:c"])
def test_findings_are_shown_as_they_are(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    finding = doctor.Finding(state="bad", text=text, advice=text)
    monkeypatch.setattr(doctor, "CHECKS", {text: lambda: finding})
    shown = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count(text) == 3
