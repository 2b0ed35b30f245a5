"""How well an estimate ranks policies: rank correlation with their true scores, with an interval, and regret@k.

Regret@k has no interval. It is made of the best of a few policies, which a sample of these drawn with replacement often
lacks, and of the k that are tried, which fewer are in such a sample: the bootstrap's interval of 95 % held the expected
regret in 55 % (k = 5 of 10 policies), and gave [0, 0] to estimates without an error in these policies.
"""

import math

import numpy as np
from numpy.typing import NDArray

from diffrl.runs.study.statistics import LEVEL, Interval

Array = NDArray[np.float64]

FEWEST = 5
"""Policies from which on there are intervals."""


def rank_correlation(estimates: Array, truth: Array, independent: bool = True) -> Interval:
    """Spearman's rank correlation of estimates and true scores (P,), with its 95 % interval; nan of fewer than two.

    The interval is Fisher's with Bonett and Wright's variance (2000, Psychometrika 65): tanh(atanh r +- 1.96
    sqrt((1 + r^2 / 2) / (P - 3))). Where all estimates are equal, or all scores, there is no correlation: nan.
    independent: whether no two policies are checkpoints of one training; else there is no interval.
    """
    from scipy.stats import norm, spearmanr

    nothing = Interval(*(np.asarray(math.nan) for _ in range(3)))
    if len(estimates) < 2 or np.ptp(estimates) == 0 or np.ptp(truth) == 0:
        return nothing
    r = float(spearmanr(estimates, truth).statistic)
    if not independent or len(estimates) < FEWEST or abs(r) > 1 - 1e-12:
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
