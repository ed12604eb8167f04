"""Which settings tell runs of one method apart, and how a setting is written."""

from typing import Any

import pandas as pd

from analysis.records.names import shown

# The values at which records count that are older than these keys. Most runs have them.
USUAL_SETTINGS: dict[str, float | str | bool] = {
    "adapter.dropout": 0.0,
    "adapter.fused": True,
    "clients.dropout": 0.0,
    "clients.over_selection": 1.0,
    "clients.speed_spread": 0.0,
    "federation.server_beta2": 0.99,
    "federation.server_lr": 1.0,
    "federation.server_momentum": 0.9,
    "federation.server_optimizer": "fedavg",
    "federation.server_tau": 0.001,
    "method.e_lr_factor": 1.0,
    "method.freeze_head": False,
    "method.rounding": "floor",
    "method.importance_per_cost": 0.0,
    "model.attention": "sdpa",
    "model.dropout_masks": "words",
    "model.packing": True,
    "train.frozen_prefix": "recompute",
    "train.proximal_mu": 0.0,
    "train.round_schedule": "constant",
    "train.schedule": "constant",
}

# Sections of the config that change results. Others, such as [system], do not; dotted columns of
# other parts of run.json, such as package versions, are no settings.
_SECTIONS = (
    *("method", "adapter", "model", "dataset", "partition", "federation", "train"),
    *("codec", "clients"),
)
_FURTHER_KEYS = ["evaluate.every", "evaluate.split", "evaluate.eval_examples"]


def differing_keys(runs: pd.DataFrame) -> list[str]:
    """Keys of the config that change results and in which these runs differ, seeds aside."""
    for key, usual in USUAL_SETTINGS.items():
        runs = runs.assign(**{key: runs[key].fillna(usual) if key in runs else usual})
    names = list(map(str, runs))
    keys = [name for name in names if name.split(".")[0] in _SECTIONS and "." in name]
    keys += _FURTHER_KEYS
    if "clients.deadline_seconds" in runs or (runs["clients.over_selection"] > 1).any():
        # Devices decide who is late.
        keys += [name for name in names if name.startswith("devices.shares.")]
    return [key for key in keys if key in runs and runs[key].nunique(dropna=False) > 1]


def setting_texts(runs: pd.DataFrame, keys: list[str]) -> pd.Series:
    """What tells each of these runs apart, such as "lr=0.01"; else they would count as seeds."""
    texts = [
        shown(", ".join(f"{key.split('.')[-1]}={setting_text(row.get(key), key)}" for key in keys))
        for _, row in runs.iterrows()
    ]
    return pd.Series(texts, index=runs.index, dtype=object)


def setting_text(value: Any, key: str) -> str:
    """A value of the config as a reader writes it; a missing one is the usual value, or unset."""
    value = USUAL_SETTINGS.get(key) if pd.isna(value) else value
    if value is None:
        return "unset"
    return f"{value:g}" if isinstance(value, float) else str(value)
