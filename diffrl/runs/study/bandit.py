"""Which of many policies is best, by trying them out: unifloral's bandit (Jackson et al. 2025, arXiv 2504.11453).

Someone with K trained policies and T online episodes plays a K-armed bandit. Each pull is one episode of one policy,
chosen by the upper confidence bound

    UCB_i = m_i + sqrt(alpha log t / n_i)

with m_i and n_i the mean and number of the pulls of arm i so far, and t the number of this pull. After each pull the
arm with the highest m_i is the estimated best; what is shown is its true mean, the mean over all its episodes. In every
trial the arms are drawn anew from all policies, and a pull draws one of the policy's episodes with replacement.

As the authors' code: alpha = 2 on scores x100, 8 of the policies a trial, 1,000 trials, 200 pulls; the interval is the
percentile bootstrap's over trials. What is different here: an arm that has not been pulled comes first and is never the
estimated best (theirs counts it as 0, which is the best of all where scores are negative).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffrl.runs.study.config import BanditConfig
from diffrl.runs.study.statistics import percentile_ends

Array = NDArray[np.float64]

DRAWS = 1000
"""Bootstrap draws."""


@dataclass(frozen=True)
class Curve:
    """The true score of the policy that is taken for the best, against online episodes spent."""

    pulls: NDArray[np.int64]
    """(T,) 1, 2, ... T"""
    mean: Array
    """(T,) over trials"""
    low: Array
    """(T,) the lower end of the 95 % interval"""
    high: Array
    """(T,) its upper end"""


def ucb(means: Array, pulls: NDArray[Any], t: int, alpha: float) -> Array:
    """The upper confidence bounds (..., K) of arms with these means and numbers of pulls, before pull t = 1, 2, ...

    An arm without a pull has an infinite one.
    """
    bonus = np.sqrt(alpha * np.log(t) / np.maximum(pulls, 1))
    return np.where(pulls > 0, means + bonus, np.inf)


def play(returns: Sequence[Array], config: BanditConfig) -> tuple[NDArray[np.int64], Array]:
    """Play all trials: the policy pulled, and the true mean of the estimated best one after each pull, both (R, T).

    returns: for each policy the scores of its episodes, (E_i,), which may be of different numbers.
    """
    generator = np.random.default_rng(config.seed)
    sizes = np.array([len(episodes) for episodes in returns])
    table = np.zeros((len(returns), sizes.max()))
    for i, episodes in enumerate(returns):
        table[i, : len(episodes)] = episodes
    truth = np.array([episodes.mean() for episodes in returns])
    R, K = config.trials, min(config.arms, len(returns))
    arms = np.argsort(generator.random((R, len(returns))), axis=1)[:, :K]
    sums, pulls = np.zeros((R, K)), np.zeros((R, K), np.int64)
    every = np.arange(R)
    pulled, best = np.zeros((R, config.pulls), np.int64), np.zeros((R, config.pulls))
    for t in range(1, config.pulls + 1):
        means = sums / np.maximum(pulls, 1)
        bounds = ucb(means, pulls, t, config.alpha)
        # Among equals one is drawn: a random number decides that is added to nothing.
        at_most = bounds == bounds.max(1, keepdims=True)
        arm = np.where(at_most, generator.random((R, K)), -1.0).argmax(1)
        policy = arms[every, arm]
        episode = (generator.random(R) * sizes[policy]).astype(np.int64)
        sums[every, arm] += table[policy, episode]
        pulls[every, arm] += 1
        estimated = np.where(pulls > 0, sums / np.maximum(pulls, 1), -np.inf).argmax(1)
        pulled[:, t - 1] = policy
        best[:, t - 1] = truth[arms[every, estimated]]
    return pulled, best


def bandit(returns: Sequence[Array], config: BanditConfig) -> Curve:
    """The score of the estimated best policy against episodes spent, with its interval. returns: as in `play`."""
    _, best = play(returns, config)
    generator = np.random.default_rng((config.seed, 1))
    R = len(best)
    weights = generator.multinomial(R, np.full(R, 1 / R), size=DRAWS) / R
    return Curve(np.arange(1, config.pulls + 1), best.mean(0), *percentile_ends(weights @ best))
