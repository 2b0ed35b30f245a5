"""How well an estimate ranks policies: rank correlation with their true scores, and regret@k, with intervals."""

import math

import numpy as np
from numpy.typing import NDArray

from diffrl.runs.study.statistics import LEVEL, Interval, percentile_ends

Array = NDArray[np.float64]

FEWEST = 5
"""Policies from which on there are intervals."""
DRAWS, SEED = 1000, 0
"""Of the bootstrap over policies: draws, and the seed of all of them."""


def rank_correlation(estimates: Array, truth: Array) -> Interval:
    """Spearman's rank correlation of estimates and true scores (P,), with its 95 % interval; nan of fewer than two.

    The interval is Fisher's with Bonett and Wright's variance (2000, Psychometrika 65): tanh(atanh r +- 1.96
    sqrt((1 + r^2 / 2) / (P - 3))). Where all estimates are equal, or all scores, there is no correlation: nan.
    """
    from scipy.stats import norm, spearmanr

    nothing = Interval(*(np.asarray(math.nan) for _ in range(3)))
    if len(estimates) < 2 or np.ptp(estimates) == 0 or np.ptp(truth) == 0:
        return nothing
    r = float(spearmanr(estimates, truth).statistic)
    if len(estimates) < FEWEST or abs(r) > 1 - 1e-12:
        return Interval(np.asarray(r), np.asarray(math.nan), np.asarray(math.nan))
    half = norm.ppf((1 + LEVEL) / 2) * math.sqrt((1 + r**2 / 2) / (len(estimates) - 3))
    low, high = (math.tanh(math.atanh(r) + sign * half) for sign in (-1, 1))
    return Interval(np.asarray(r), np.asarray(low), np.asarray(high))


def regret_at(k: int, estimates: Array, truth: Array, others: float = -math.inf) -> Array:
    """Regret@k: the best true score of all, less the best of the k policies that are estimated highest; (...).

    estimates, truth: (..., P). others: the best true score of policies without an estimate. Among equal estimates the
    first counts as the higher one.
    """
    order = np.argsort(-estimates, axis=-1, kind="stable")[..., :k]
    regret: Array = np.maximum(truth.max(-1), others) - np.take_along_axis(truth, order, -1).max(-1)
    return regret


def regret(k: int, estimates: Array, truth: Array, others: float = -math.inf) -> Interval:
    """Regret@k of estimates and true scores (P,), with the percentile bootstrap's interval over policies.

    others: as for `regret_at`; the bootstrap leaves it as it is.
    """
    value = regret_at(k, estimates, truth, others)
    if len(estimates) < FEWEST:
        return Interval(value, np.asarray(math.nan), np.asarray(math.nan))
    again = np.random.default_rng(SEED).integers(len(estimates), size=(DRAWS, len(estimates)))
    return Interval(value, *percentile_ends(regret_at(k, estimates[again], truth[again], others)))
