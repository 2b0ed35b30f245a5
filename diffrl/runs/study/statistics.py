"""Statistics of few runs on many tasks, after Agarwal et al. 2021 (arXiv 2108.13264), as in the library rliable.

The scores of an agent are a list, an array a task: x_m of shape (..., S_m), a score a seed. Leading axes are repeated
experiments, as the bootstrap draws them; a statistic reduces the tasks and the seeds and leaves those axes.

    mean            the mean over tasks of the mean over seeds
    median          the median over tasks of the mean over seeds
    IQM             the mean of the middle half of all runs of all tasks (a quarter is cut from either end)
    optimality gap  how far runs stay below a target g: the mean over tasks of mean(g - min(x, g)); smaller is better
    profile         the share of runs that score more than tau, a mean over tasks
    P(X > Y)        the probability that a run of X beats a run of Y on a task, a mean over tasks: Mann-Whitney's
                    U / (S_x S_y), in which a tie counts one half

Intervals are percentiles of the stratified bootstrap: each task's seeds are drawn anew with replacement, tasks stay as
they are. It says how other seeds would change a figure, not how other tasks would. Of a task with one seed nothing can
be drawn: then there is no interval, nan. Random numbers have a fixed seed, so that a report is the same each time.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffrl.support.statistics import student_ends

Array = NDArray[np.float64]
Tasks = Sequence[Array]
"""An array (..., S_m) a task: the scores of its S_m seeds."""

BOOTSTRAP_SEED = 0
"""The seed of the bootstrap's random numbers."""
DRAWS = 10_000
"""Repeated experiments that the bootstrap draws."""
LEVEL = 0.95
"""The share of experiments whose interval should hold the truth."""
_CHUNK = 2_000_000
"""Scores that are drawn at a time."""


class Interval(NamedTuple):
    """A figure with its interval, floats or arrays of one shape; low and high are nan where there is none."""

    value: Array
    low: Array
    high: Array


def mean(x: Tasks) -> Array:
    """The mean over tasks of the mean over seeds, shape (...)."""
    return np.asarray(_task_means(x).mean(-1))


def median(x: Tasks) -> Array:
    """The median over tasks of the mean over seeds, shape (...)."""
    return np.asarray(np.median(_task_means(x), axis=-1))


def iqm(x: Tasks) -> Array:
    """The interquartile mean of all runs of all tasks, shape (...): a quarter, rounded down, is cut from either end.

    Each run counts the same: where tasks have different numbers of seeds, those with more count more.
    """
    from scipy.stats import trim_mean

    return np.asarray(trim_mean(np.concatenate(x, axis=-1), 0.25, axis=-1))


def optimality_gap(x: Tasks, target: float = 100.0) -> Array:
    """How far runs stay below the target on average, shape (...); what is above it does not make up for others."""
    return np.asarray(target - _task_means([np.minimum(scores, target) for scores in x]).mean(-1))


def profile(x: Tasks, taus: Array) -> Array:
    """The share of runs that score more than each of taus (T,), shape (..., T)."""
    return np.asarray(np.stack([(scores[..., None] > taus).mean(-2) for scores in x], axis=-1).mean(-1))


def probability_of_improvement(x: Tasks, y: Tasks) -> Array:
    """The probability that a run of x scores more than a run of y on a task, shape (...).

    x, y: the same tasks in the same order, perhaps of different numbers of seeds.
    """
    each = []
    for ours, theirs in zip(x, y, strict=True):
        a, b = ours[..., :, None], theirs[..., None, :]
        each.append(((a > b) + 0.5 * (a == b)).mean((-2, -1)))
    return np.asarray(np.stack(each, axis=-1).mean(-1))


def interval(statistic: Callable[..., Array], *groups: Tasks, draws: int = DRAWS, level: float = LEVEL) -> Interval:
    """A statistic of one or more agents' scores, with its interval by the stratified bootstrap.

    groups: for each argument of `statistic`, an array (S_m,) a task. The agents' seeds are drawn independently.
    """
    value = np.asarray(statistic(*groups))
    if any(len(scores) < 2 for x in groups for scores in x):
        return Interval(value, np.full(value.shape, np.nan), np.full(value.shape, np.nan))
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    seeds = [len(scores) for x in groups for scores in x]
    size = sum(seeds) * max(value.size, *seeds)  # of what a statistic makes on its way, at most
    chunk = max(1, min(draws, _CHUNK // size))
    drawn = []
    for begin in range(0, draws, chunk):
        n = min(chunk, draws - begin)
        again = [[_drawn(scores, n, generator) for scores in x] for x in groups]
        drawn.append(np.asarray(statistic(*again)))
    return Interval(value, *percentile_ends(np.concatenate(drawn), level))


def percentile_ends(drawn: Array, level: float = LEVEL) -> tuple[Array, Array]:
    """The ends of the percentile bootstrap's interval: low and high (...) of values drawn n times, (n, ...)."""
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail], axis=0)
    return np.asarray(low), np.asarray(high)


def student(values: Array, level: float = LEVEL) -> Interval:
    """The mean of values (S,), with Student's interval, which allows for few values; nan for a single one.

    It takes them to be normal: mean +- t_{S-1} s / sqrt(S).
    """
    n, centre = len(values), float(values.mean())
    error = float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else np.nan
    low, high = student_ends(centre, error, n - 1, level)
    return Interval(np.asarray(centre), np.asarray(low), np.asarray(high))


def _drawn(scores: Array, n: int, generator: np.random.Generator) -> Array:
    return scores[generator.integers(len(scores), size=(n, len(scores)))]


def _task_means(x: Tasks) -> Array:
    """The mean over seeds, shape (..., M)."""
    return np.stack([scores.mean(-1) for scores in x], axis=-1)
