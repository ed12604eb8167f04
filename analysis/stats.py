"""Means over seeds, their 95 % bootstrap interval, and paired tests. Nothing here is random."""

from collections.abc import Callable
from functools import lru_cache
from itertools import product

import numpy as np
import numpy.typing as npt
import pandas as pd

_NUM_RESAMPLES = 2000
MIN_PAIRS = 3  # fewer paired seeds give no test worth printing
_MAX_EXACT_PAIRS = 12  # 2^12 sign patterns; more pairs draw as many at random

Values = npt.NDArray[np.float64]

SENTENCE = (
    "Band or bar: 95 % bootstrap interval of the mean over seeds (percentiles of "
    f"{_NUM_RESAMPLES} resamples, fixed generator); it is too narrow for a handful of seeds, "
    "and absent for one."
)


def interval(values: pd.Series) -> tuple[float, float]:
    """95 % interval of the mean by percentile bootstrap; (nan, nan) for fewer than two values."""
    known = values.dropna().to_numpy(dtype=float)
    if len(known) < 2:
        return float("nan"), float("nan")
    means = known[_resamples(len(known))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def mean_and_interval(*columns: str) -> dict[str, tuple[str, str | Callable[..., float]]]:
    """For DataFrame.agg: the columns X_mean, X_low and X_high of each column X."""
    functions: dict[str, str | Callable[..., float]] = {
        "mean": "mean",
        "low": lambda values: interval(values)[0],
        "high": lambda values: interval(values)[1],
    }
    return {f"{x}_{name}": (x, function) for x in columns for name, function in functions.items()}


def paired_p_value(differences: Values) -> float:
    """Two-sided sign-flip test that paired differences have mean zero; exact up to 12 pairs."""
    num_pairs = len(differences)
    if num_pairs <= _MAX_EXACT_PAIRS:
        signs = np.array(list(product([1.0, -1.0], repeat=num_pairs)))
    else:
        generator = np.random.default_rng(num_pairs)
        drawn = generator.choice([1.0, -1.0], size=(2**_MAX_EXACT_PAIRS, num_pairs))
        signs = np.vstack([np.ones(num_pairs), drawn])  # the observed pattern is one of them
    least = abs(differences.sum()) * (1 - 1e-12)
    return float((np.abs(signs @ differences) >= least).mean())


def least_p_value(num_pairs: int) -> float:
    """The smallest p that `paired_p_value` can give: 2^(1 - n), 0.25 for three pairs."""
    return 2.0 ** (1 - min(num_pairs, _MAX_EXACT_PAIRS))


def holm(p_values: pd.Series) -> pd.Series:
    """Holm's step-down correction over the values that are not missing."""
    ordered = p_values.dropna().sort_values(kind="stable")
    scaled = ordered * np.arange(len(ordered), 0, -1)
    return scaled.clip(upper=1.0).cummax().reindex(p_values.index)


@lru_cache(maxsize=64)
def _resamples(num_values: int) -> npt.NDArray[np.int64]:
    # The seed is the number of values: all means over as many runs use the same draws.
    generator = np.random.default_rng(num_values)
    return generator.integers(0, num_values, size=(_NUM_RESAMPLES, num_values))
