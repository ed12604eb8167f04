"""Whether a finished run may be skipped: it is whole, and is what its config would give here."""

from functools import lru_cache
from pathlib import Path

from bench.config.schema import RunConfig
from bench.config.sections import ModelConfig
from bench.data.texts import dataset_facts
from bench.models.encoders import build_model
from bench.models.source import DRAWN
from bench.run.identity import KEYS, Digests, differences, digests, weights_digest
from bench.run.record import read_rounds, read_run
from fedara_core.errors import InputError
from fedara_core.schema import DONE_FILE, rounds_fault


def check_finished(run_dir: Path, config: RunConfig) -> str:
    """Raise InputError unless a finished run is whole, and is what `config` would give here.

    Returns why that can not be told, such as data that are not on this machine; else "". Keys that
    an older record does not have are not compared.
    """
    run = read_run(run_dir)
    rounds = [row["round_index"] for row in read_rounds(run_dir)]
    if fault := rounds_fault(rounds, config.federation.num_rounds):
        raise InputError(
            f"{run_dir}: {DONE_FILE} is there, but {fault}; allowed: a whole record, or "
            "none (delete the folder to run again)"
        )
    try:
        ours = _digests_here(config)
    except InputError as error:
        return f"not compared with data and model: {error}"
    known = [key for key in KEYS if key in run and key in ours]
    differing = differences({k: run[k] for k in known}, {k: ours[k] for k in known})
    if differing:
        raise InputError(
            f"{run_dir} is finished, but by its contents it is another run: "
            f"{'; '.join(differing)}; allowed: another folder for --results, or what the record "
            "was made of"
        )
    return ""


def _digests_here(config: RunConfig) -> Digests:
    """Of data and model on this machine, without a run. Raises InputError."""
    dataset = dataset_facts(config.dataset)
    drawn = config.model.name in DRAWN or config.model.pooling == "model"
    seed = config.seed if drawn else 0  # weights that are read are the same for every seed
    weights = _weights_digest(config.model, len(dataset.labels), seed)
    return digests(config, dataset=dataset.digest, weights=weights)


@lru_cache(maxsize=8)
def _weights_digest(config: ModelConfig, num_classes: int, seed: int) -> str:
    return weights_digest(build_model(config, num_classes=num_classes, seed=seed))
