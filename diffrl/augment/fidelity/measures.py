"""Distances between two sets of rows, and of rows to the simulator: what a fidelity report measures."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from diffrl.data.offline import Bools, Floats, Ints
from envs.dynamics import Dynamics

Doubles = npt.NDArray[np.float64]

QUERIES = 2_000
"""Rows whose nearest neighbour is looked for, among all training rows."""
FEWEST = 100
"""Rows a side below which a classifier is not asked."""
TOLD = 0.6
"""The share of pairs in which rows are told apart from which on it is asked by which columns."""
STEPS = 5_000
"""Rows the simulator is set to, a side."""
PARTS = ("next states", "rewards", "ends")
"""What follows from s and a."""
ODD_ENDS = 0.05
"""Share of rows whose terminal is not the simulator's that is looked at."""
RARE = 1e-3
"""A probability from which on a difference is none of chance."""
CLIPPED_MARGIN = 0.05
"""Velocities this near to where an observation clips them count as clipped: a model does not hit the bound exactly."""
_ELEMENTS = 4_000_000  # distances held at once
_SLACK = 1e-5  # of an action's bound, relative: a tanh in float32, stored and read again


class Pair(NamedTuple):
    """A measure of the synthetic rows, and its floor: the same of real rows."""

    synthetic: float
    real: float


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Distances to the nearest training row, in standardised units: too near is memorised."""

    synthetic: Doubles
    """From synthetic rows (Q,)."""
    real: Doubles
    """From rows the model has not seen (Q',); without such, from training rows to the nearest other one."""
    median: Pair
    """The medians of the distances."""
    low: Pair
    """The 1 % quantiles of the distances."""
    closer: float
    """Share of synthetic rows no farther from a training row than the real side's 1 % quantile."""
    usual: float
    """The same share of the real side: about .01, and more where the data repeat rows."""
    shuffled: float
    """The median distance of `shuffled` rows: what a model gets that knows each column, and nothing else."""

    @property
    def copied(self) -> float:
        """The share of synthetic rows nearer than is usual, of those that need not be; 0 where chance explains it."""
        shares = Pair(self.closer, self.usual)
        if self.closer <= self.usual or by_chance(shares, (len(self.synthetic), len(self.real))) >= RARE:
            return 0.0
        return (self.closer - self.usual) / (1 - self.usual)


@dataclass(frozen=True, eq=False)
class DynamicsError:
    """What the simulator says of s, a -> s', r, terminal. Errors of s' are RMS over its columns, standardised."""

    synthetic: Doubles
    """The error of s' of each synthetic row (Q,)."""
    real: Doubles
    """The error of s' of each real row (Q',): what the simulator itself is off by."""
    median: Pair
    """The medians of the errors of s'."""
    high: Pair
    """The 90 % quantiles of the errors of s'."""
    standing_still: float
    """Median error of "s' = s" on the real rows: the scale."""
    reward: Pair
    """Median |r - simulator's|, in units of reward."""
    other_rewards: float
    """The same of real rows whose rewards are shuffled: the scale."""
    terminal: Pair
    """Share of rows whose terminal differs from the simulator's."""
    left_out: Pair
    """Share of rows whose observation does not give the whole state (clipped velocities)."""
    blown_up: Pair
    """Share of the rows not left out on which the simulator breaks down; such rows are in no other figure."""

    @property
    def own(self) -> frozenset[str]:
        """Of `PARTS` those in which real rows are as the simulator has them: in others it is not theirs."""
        met = (
            self.median.real <= 0.1 * self.standing_still,
            self.reward.real <= 0.1 * self.other_rewards,
            self.terminal.real < ODD_ENDS,
        )
        return frozenset(part for part, is_met in zip(PARTS, met, strict=True) if is_met)


# --- distributions -------------------------------------------------------------------------------------------------


def ks_statistic(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> float:
    """The Kolmogorov-Smirnov statistic: the largest difference of two samples' empirical distribution functions.

    x, y: (n,) and (m,); ties count once. For two samples of n from one distribution it is about 0.87 sqrt(2/n), and in
    1 % of cases above 1.63 sqrt(2/n).
    """
    x, y = np.sort(x), np.sort(y)
    both = np.concatenate([x, y])
    at_most_x, at_most_y = (np.searchsorted(side, both, side="right") / len(side) for side in (x, y))
    return float(np.abs(at_most_x - at_most_y).max())


def correlations(rows: Floats) -> Doubles:
    """Pearson's correlations (W, W) of the columns of rows (n, W); 0 between a constant column and others."""
    centred = rows - rows.mean(0, dtype=np.float64)
    norms = np.sqrt((centred**2).sum(0))
    constant = norms <= 1e-6 * np.sqrt(len(rows)) * np.maximum(1, np.abs(rows).max(0))
    norms[constant] = 1.0
    centred[:, constant] = 0.0
    matrix: Doubles = (centred / norms).T @ (centred / norms)
    np.fill_diagonal(matrix, 1.0)
    return matrix


def at_bounds(actions: Floats, low: npt.ArrayLike, high: npt.ArrayLike) -> tuple[float, float]:
    """Shares of rows with an action beyond a bound, and of those with one on a bound and none beyond."""
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    slack = _SLACK * (high - low)
    outside = ((actions < low - slack) | (actions > high + slack)).any(1)
    at = ((actions <= low + slack) | (actions >= high - slack)).any(1) & ~outside
    return float(outside.mean()), float(at.mean())


def by_chance(rate: Pair, rows: tuple[int, int]) -> float:
    """The probability of shares of so many rows that differ so much, where chance alone sets them apart.

    By Fisher's exact test, of both sides.
    """
    from scipy.stats import fisher_exact

    ends = [round(share * n) for share, n in zip(rate, rows, strict=True)]
    return float(fisher_exact([ends, [n - k for n, k in zip(rows, ends, strict=True)]])[1])


def shuffled(rows: Floats, rng: np.random.Generator) -> Floats:
    """The rows (n, W) with each column in a random order of its own: what is joint is lost, the marginals stay."""
    return rng.permuted(rows, axis=0)


def told_apart(made: Floats, fresh: Floats, o: int, a: int, seed: int, columns: bool = True) -> tuple[float, Doubles]:
    """How well a classifier tells rows made (n, W) from fresh ones (m, W), and the columns (W,) by which it does so.

    First the area under its ROC curve: the share of pairs, one row of each side, in which it finds the one that is
    made. .5 is chance, 1 is always. Then by how much the area falls where one column is shuffled, s' - s with it, over
    `QUERIES` rows: about 0 where others say the same. Zeros where the rows are hardly told apart (an area below
    `TOLD`), or `columns` is False.

    This is the classifier two-sample test (Lopez-Paz and Oquab, ICLR 2017, arXiv 1610.06545), by gradient-boosted
    trees on the rows [s, a, r, s', terminal] and s' - s: grown on one half of the rows, they judge the other. NaN where
    a side has fewer than `FEWEST` rows, of which trees learn nothing.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import roc_auc_score

    rows, labels = np.concatenate([made, fresh]), np.repeat([1, 0], [len(made), len(fresh)])
    falls = np.zeros(rows.shape[1])
    if min(len(made), len(fresh)) < FEWEST:
        return math.nan, falls
    rng = np.random.default_rng((seed, 2))
    grown, judged = np.array_split(rng.permutation(len(rows)), 2)
    # Small trees, and no more than help: many large ones learn few rows by heart.
    trees = HistGradientBoostingClassifier(max_leaf_nodes=8, max_iter=500, early_stopping=True, random_state=seed)
    trees.fit(with_changes(rows[grown], o, a), labels[grown])

    def area(table: Floats, truth: Ints) -> float:
        return float(roc_auc_score(truth, trees.predict_proba(with_changes(table, o, a))[:, 1]))

    told = area(rows[judged], labels[judged])
    if columns and told >= TOLD:
        some = judged[:QUERIES]
        whole = area(rows[some], labels[some])
        for column in range(rows.shape[1]):
            table = rows[some].copy()
            table[:, column] = rng.permutation(table[:, column])
            falls[column] = whole - area(table, labels[some])
    return told, falls


def with_changes(rows: Floats, o: int, a: int, ends: bool = True) -> Floats:
    """Rows (n, W) and their s' - s: (n, W + O), or (n, W + O - 1) without terminal."""
    return np.concatenate([rows if ends else rows[:, :-1], rows[:, o + a + 1 : -1] - rows[:, :o]], axis=1)


# --- nearest neighbours --------------------------------------------------------------------------------------------


def neighbours(
    train: Floats,
    made: Floats,
    fresh: Floats | None,
    noise: Floats,
    mean: Doubles,
    scale: Doubles,
    rng: np.random.Generator,
) -> Neighbours:
    """Distances of rows made, fresh (real, unseen; None: training rows themselves) and noise (`shuffled`) to train.

    All are (n, W); mean, scale: (W,), those of the training rows.
    """
    shift, width = mean.astype(np.float32), scale.astype(np.float32)
    base = (train - shift) / width
    of_made = nearest_distances((made[:QUERIES] - shift) / width, base)
    if fresh is None:
        own = rng.choice(len(base), min(QUERIES, len(base)), replace=False)
        of_real = nearest_distances(base[own], base, exclude=own)
    else:
        of_real = nearest_distances((fresh[:QUERIES] - shift) / width, base)
    low = float(np.quantile(of_real, 0.01))
    return Neighbours(
        synthetic=of_made,
        real=of_real,
        median=Pair(float(np.median(of_made)), float(np.median(of_real))),
        low=Pair(float(np.quantile(of_made, 0.01)), low),
        closer=float((of_made <= low).mean()),
        usual=float((of_real <= low).mean()),
        shuffled=float(np.median(nearest_distances((noise[:QUERIES] - shift) / width, base))),
    )


def variety(rows: Floats, mean: Doubles, scale: Doubles) -> float:
    """The median distance of rows (n, W) to the nearest other one of them, in standardised units: 0 if all are alike.

    It falls with n: compare sets of one size.
    """
    base: Floats = np.asarray((rows - mean) / scale, np.float32)
    own = np.arange(min(QUERIES, len(base)))
    return float(np.median(nearest_distances(base[own], base, exclude=own)))


def nearest_distances(rows: Floats, base: Floats, exclude: Ints | None = None) -> Doubles:
    """The Euclidean distance (n,) of each of rows (n, W) to the nearest of base (m, W).

    exclude: for each row the number (n,) of the row of base that does not count. The nearest is found by float32
    products; its distance is then computed in double precision, so that copies are at 0.
    """
    queries, others = torch.from_numpy(rows), torch.from_numpy(base)
    best = torch.full((len(queries),), math.inf)
    where = torch.zeros(len(queries), dtype=torch.int64)
    chunk = max(1, _ELEMENTS // len(queries))
    for start in range(0, len(others), chunk):
        part = others[start : start + chunk]
        # |x - y|^2 less |x|^2, which is the same for all y
        distance = torch.addmm(part.square().sum(1), queries, part.T, alpha=-2)
        if exclude is not None:
            own = torch.from_numpy(exclude) - start
            inside = (own >= 0) & (own < len(part))
            distance[inside.nonzero()[:, 0], own[inside]] = math.inf
        value = distance.amin(1)
        nearer = (value < best).nonzero()[:, 0]  # few, after the first parts: an argmin costs more than a minimum
        best[nearer], where[nearer] = value[nearer], distance[nearer].argmin(1) + start
    exact: Doubles = (queries.double() - others[where].double()).norm(dim=1).numpy()
    return exact


# --- dynamics ------------------------------------------------------------------------------------------------------


UNIT = "standard deviations of the data"
"""What errors of s' against the simulator are in, wherever they are said: RMS over columns, each in its deviation."""


def dynamics_error(
    dynamics: Dynamics, made: Floats, fresh: Floats, scale: Doubles, o: int, a: int, stand_ins: bool
) -> DynamicsError:
    """Compare rows made and fresh (n, W) with the simulator.

    scale: the deviation of s' (O,), which its errors are in units of. stand_ins: s' of terminal rows is not compared.
    """
    model, world = (_steps(dynamics, side[:STEPS], scale, o, a, stand_ins) for side in (made, fresh))
    return DynamicsError(
        synthetic=model.errors,
        real=world.errors,
        median=Pair(_quantile(model.errors, 0.5), _quantile(world.errors, 0.5)),
        high=Pair(_quantile(model.errors, 0.9), _quantile(world.errors, 0.9)),
        standing_still=_quantile(world.still, 0.5),
        reward=Pair(_quantile(model.rewards, 0.5), _quantile(world.rewards, 0.5)),
        other_rewards=_quantile(world.others, 0.5),
        terminal=Pair(model.terminal, world.terminal),
        left_out=Pair(model.left_out, world.left_out),
        blown_up=Pair(model.blown_up, world.blown_up),
    )


class _Steps(NamedTuple):
    """What the simulator says of one set of rows: the fields of `DynamicsError`, of which this is a half."""

    errors: Doubles
    still: Doubles
    rewards: Doubles
    others: Doubles
    terminal: float
    left_out: float
    blown_up: float


def _steps(dynamics: Dynamics, rows: Floats, scale: Doubles, o: int, a: int, stand_ins: bool) -> _Steps:
    """Compare rows (n, W) with the simulator. stand_ins: of terminal rows r and terminal are compared, but not s'."""
    told = dynamics.reproducible(rows[:, :o], CLIPPED_MARGIN)
    left_out, rows = _share(~told), rows[told]
    following, rewards, terminals = dynamics.step(rows[:, :o], rows[:, o : o + a])
    fit: Bools = np.isfinite(following).all(1) & np.isfinite(rewards)
    blown_up = _share(~fit)
    rows, following, rewards, terminals = rows[fit], following[fit], rewards[fit], terminals[fit]
    ends = rows[:, -1] > 0.5
    compared = ~ends if stand_ins else np.ones(len(rows), np.bool_)
    claimed = rows[compared, o + a + 1 : -1]
    return _Steps(
        errors=_rms(following[compared] - claimed, scale),
        still=_rms(rows[compared, :o] - claimed, scale),
        rewards=np.abs(rewards - rows[:, o + a]).astype(np.float64),
        others=np.abs(rewards - np.random.default_rng(0).permutation(rows[:, o + a])).astype(np.float64),
        terminal=_share(terminals != ends),
        left_out=left_out,
        blown_up=blown_up,
    )


def _share(flags: Bools) -> float:
    return float(flags.mean()) if len(flags) else math.nan


def _rms(differences: npt.NDArray[Any], scale: Doubles) -> Doubles:
    """The root mean square (n,) over the columns of differences (n, O), in units of `scale` (O,)."""
    rms: Doubles = np.sqrt(((differences / scale) ** 2).mean(1))
    return rms


def _quantile(values: Doubles, q: float) -> float:
    return float(np.quantile(values, q)) if len(values) else math.nan
