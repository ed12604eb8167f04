"""A plan as Slurm jobs: arrays with one task per run, and a job that draws the figures."""

import re
import shutil
from pathlib import Path

from pydantic import ValidationError

from bench.ask import ask, own_command
from bench.config.load import explain, read_toml
from bench.jobs.plan import Plan
from bench.jobs.slurm_script import Chunk, Site, array_script, chunks, figures_script
from bench.run.checkpoint import write_atomically
from fedara_core.errors import InputError

_SBATCH_SECONDS = 60.0  # a busy controller lets sbatch wait


def read_site(path: Path) -> Site:
    """A site file. Raises InputError with one line that names key, value and rule."""
    try:
        return Site.model_validate(read_toml(path, "site", "a file like slurm/sites/*.toml"))
    except ValidationError as error:
        raise InputError(f"site {path}: {explain(error, Site)}") from None


def submit_plan(plan: Plan, site: Site, *, dry_run: bool) -> list[str]:
    """Write the plan and its job scripts (with dry_run nothing) and submit them; returns what to
    print. Raises InputError, also if sbatch is missing or refuses."""
    left = plan.left()
    if not left:
        return [f"{plan.path}: all {len(plan.runs)} runs are done, nothing to submit"]
    program, folder = own_command(), Path.cwd()
    arrays = {
        _script(plan, chunk): array_script(plan, site, chunk, program, folder)
        for chunk in chunks(left, _max_array_size())
    }
    figures = plan.path.with_name(f"{plan.name}-figures.sbatch")
    texts = {**arrays, figures: figures_script(plan, site, program, folder)}
    if dry_run:
        shown = [f"# {path}\n{text}" for path, text in texts.items()]
        return [*shown, f"{len(left)} of {len(plan.runs)} runs would be submitted"]
    if shutil.which("sbatch") is None:
        raise InputError("no sbatch here; allowed: on a machine with Slurm, or with --dry-run")
    plan.write()
    for path, text in texts.items():
        write_atomically(path, text.encode(errors="surrogateescape"))
    array_ids: list[str] = []
    for path in arrays:
        # So that not more than array_limit runs are there at a time.
        after = array_ids[-1:] if site.array_limit else []
        array_ids.append(_sbatch(path, after))
    figures_id = _sbatch(figures, array_ids)
    return [
        f"job {', '.join(array_ids)}: {len(left)} of {len(plan.runs)} runs of {plan.path}",
        f"job {figures_id}: figures, when all of them have ended",
        f"fedara status {plan.results} shows how far they are",
    ]


def _script(plan: Plan, chunk: Chunk) -> Path:
    part = f"-from-{chunk.first}" if chunk.first else ""
    return plan.path.with_name(f"{plan.name}{part}.sbatch")


def _max_array_size() -> int | None:
    """Indices of a job array lie below it; None if Slurm does not tell. Raises InputError."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config").stdout, re.M)
    if found is None:
        return None
    size = int(found[1])
    if size == 0:
        raise InputError(
            "MaxArraySize = 0: this Slurm has no job arrays (scontrol show config); allowed: "
            "sbatch slurm/run.sbatch for each run"
        )
    return size


def _sbatch(script: Path, after: list[str]) -> str:
    """Submit a script, to start when these jobs have ended; returns the job id. Raises InputError
    with what sbatch said."""
    options = [f"--dependency=afterany:{':'.join(after)}"] if after else []
    done = ask("sbatch", "--parsable", *options, str(script), seconds=_SBATCH_SECONDS)
    said = " ".join(f"{done.stderr} {done.stdout}".split())
    if done.returncode:
        raise InputError(f"sbatch refused {script}: {said}; allowed: what your site file says")
    # jobid or jobid;cluster, below what a site's own sbatch may say
    ids = re.findall(r"^(\d+)(?:;\S*)?\s*$", done.stdout, re.MULTILINE)
    if not ids:
        raise InputError(
            f"sbatch named no job for {script}: {said!r}; allowed: a line with the job's number "
            "(squeue --me shows whether it was submitted)"
        )
    return str(ids[-1])
