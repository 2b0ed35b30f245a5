"""Do actions lead to their next states and rewards? Asked of a regressor fitted on real rows, where no simulator is.

A neural network (scikit-learn's `MLPRegressor`) learns (s, a) -> (s' - s, r) from real rows. Two questions are asked
of synthetic rows, and of real ones that it was not fitted on, which give the floor:

How far is s' from what it foretells, and r? Noise of the environment, and what it cannot learn, are in both.

How much of what it foretells is there? By least squares, the slope of the rows' changes on the foretold ones: 1 where
they follow it, whatever noise is on them, and 0 where they have nothing to do with it. Once of the changes s' - s, once
of the rewards, and once of what the action does: the change foretold for it less that for other rows' actions. And of
the ends, which trees foretell of (s, a, s').

A regressor extrapolates where real rows do not reach, and is not asked there: only rows count whose s is as near to
those it was fitted on as that of `REACH` of unseen real rows is, or nearer than `NEAR`.
"""

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from diffrl.augment.fidelity.measures import FEWEST, QUERIES, Doubles, Pair, nearest_distances, with_changes
from diffrl.data.offline import Floats

FITTED = 20_000
"""Rows that the regressor is fitted on, at most."""
REACH = 0.95
"""The share of unseen real rows that are within reach."""
NEAR = 0.1
"""Within reach is also what is so near, in deviations of a column: real rows may lie denser than matters."""
ENOUGH = 30
"""Synthetic rows within reach below which nothing is said of them."""
STILL = 0.1
"""The least unit of a column's change, in its standard deviations: columns that hardly change weigh no more."""
EVENTS = 30
"""The least effective number of rows that a slope stands on: of rewards that are rare, only the rare rows count."""
CHANGES = "standard deviations of their changes"
"""What errors of s' are in beside a regressor: RMS over columns, each in its change's, `STILL` at least."""
_OTHERS = 4  # actions of other rows, for each
_EXACT = 0.05  # the least error of a column, in its unit, by which it is weighed
_WIDTH, _BATCH, _UPDATES = 64, 128, 2_000


class Slope(NamedTuple):
    """How much of what is foretold is there: 1 all, 0 nothing."""

    value: float
    error: float
    """Its standard error."""


_UNKNOWN = Slope(math.nan, math.nan)


@dataclass(frozen=True, eq=False)
class LearnedError:
    """How rows stand to what a regressor foretells of them, which was fitted on real rows. NaN: not to be told."""

    synthetic: Doubles
    """The error of s' of each synthetic row within reach (Q,)."""
    real: Doubles
    """The error of s' of each unseen real row within reach (Q',)."""
    within: Pair
    """Share of the rows that are within reach."""
    following: Pair
    """The median error of s': RMS over its columns, in standard deviations of their changes (`STILL` at least)."""
    standing_still: float
    """The same of "s' = s" on the real rows."""
    further: float
    """The standard errors by which synthetic rows' errors of s' rank above real ones' (Mann and Whitney's test)."""
    reward: Pair
    """The root mean square error of r, in its standard deviations: of rewards that are rare, a median tells nothing."""
    other_rewards: float
    """The same of real rows whose rewards are shuffled."""
    dearer: float
    """The standard errors by which synthetic rows' mean square error of r is above real ones'."""
    moves: tuple[Slope, Slope]
    """How much of the changes s' - s that are foretold is there, in synthetic and in real rows."""
    acts: tuple[Slope, Slope]
    """How much of what actions are foretold to do is there."""
    pays: tuple[Slope, Slope]
    """How much of the rewards that are foretold is there."""
    ends: tuple[Slope, Slope]
    """How much of the ends that are foretold is there."""


def learned_error(fit: Floats, made: Floats, fresh: Floats, o: int, a: int, seed: int) -> LearnedError | None:
    """Fit a regressor on rows `fit` (n, W), and compare rows made (m, W) with unseen real ones, fresh (k, W).

    None where a side has fewer than `FEWEST` rows.
    """
    if min(map(len, (fit, made, fresh))) < FEWEST:
        return None
    rng = np.random.default_rng((seed, 3))
    if len(fit) > FITTED:
        fit = fit[rng.choice(len(fit), FITTED, replace=False)]
    regressor = _Regressor(fit, o, a, seed)
    made, fresh = made[:QUERIES], fresh[:QUERIES]
    far = [regressor.distances(side) for side in (made, fresh)]
    limit = max(float(np.quantile(far[1], REACH)), NEAR * math.sqrt(o))
    within = Pair(*(float((d <= limit).mean()) for d in far))
    made, fresh = (side[d <= limit] for side, d in zip((made, fresh), far, strict=True))
    model, world = (_Asked(regressor, side, rng) for side in (made, fresh))
    if not model.enough:
        none, nothing = Pair(math.nan, math.nan), (_UNKNOWN, _UNKNOWN)
        return LearnedError(
            synthetic=np.zeros(0),
            real=np.zeros(0),
            within=within,
            following=none,
            standing_still=math.nan,
            further=math.nan,
            reward=none,
            other_rewards=math.nan,
            dearer=math.nan,
            moves=nothing,
            acts=nothing,
            pays=nothing,
            ends=nothing,
        )
    width = np.sqrt((world.off**2).mean(0) + _EXACT**2)  # columns weigh as they can be foretold
    states, reward = slice(None, o), slice(o, None)

    def slopes(effect: bool, part: slice) -> tuple[Slope, Slope]:
        first, second = (
            _slope(*(x[:, part] / width[part] for x in (*(side.effects if effect else [side.foretold] * 2), side.off)))
            for side in (model, world)
        )
        return first, second

    following = _rms(model.off[:, states]), _rms(world.off[:, states])
    squares = [side.off[:, o] ** 2 for side in (model, world)]
    return LearnedError(
        synthetic=following[0],
        real=following[1],
        within=within,
        following=_medians(*following),
        standing_still=float(np.median(_rms(world.still))),
        further=_ranked_above(*following),
        reward=Pair(*(float(np.sqrt(side.mean())) for side in squares)),
        other_rewards=float(np.sqrt((world.other_rewards**2).mean())),
        dearer=_above(*squares),
        moves=slopes(False, states),
        acts=slopes(True, states),
        pays=slopes(False, reward),
        ends=_ends(fit, made, fresh, o, a, seed),
    )


class _Regressor:
    """(s, a) -> (s' - s, r), in units of what the rows it is fitted on have."""

    def __init__(self, fit: Floats, o: int, a: int, seed: int) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.neural_network import MLPRegressor

        self.o, self.a = o, a
        x, y = fit[:, : o + a].astype(np.float64), self._changes(fit)
        self.centre, self.unit = x.mean(0), _units(x)
        least = np.append(STILL * fit[:, o + a + 1 : -1].std(0, dtype=np.float64), 0)
        self.y_centre, self.y_unit = y.mean(0), _or_one(np.maximum(y.std(0), least), y)
        epochs = max(math.ceil(_UPDATES * _BATCH / len(x)), 10)
        self.network = MLPRegressor(
            hidden_layer_sizes=(_WIDTH, _WIDTH),
            batch_size=min(_BATCH, len(x) // 4),
            learning_rate_init=3e-3,
            early_stopping=True,
            n_iter_no_change=max(epochs // 8, 5),
            max_iter=epochs,
            random_state=seed,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.network.fit(self.inputs(x), self.targets(fit))
        self.base = self.inputs(x)[:, :o].astype(np.float32)

    def _changes(self, rows: Floats) -> Doubles:
        o, a = self.o, self.a
        changes = rows[:, o + a + 1 : -1].astype(np.float64) - rows[:, :o]
        return np.concatenate([changes, rows[:, o + a, None]], 1)

    def targets(self, rows: Floats) -> Doubles:
        """s' - s and r (n, O + 1)."""
        targets: Doubles = (self._changes(rows) - self.y_centre) / self.y_unit
        return targets

    def inputs(self, x: Floats | Doubles) -> Doubles:
        """s and a (n, O + A)."""
        inputs: Doubles = ((x - self.centre) / self.unit).clip(-10, 10)
        return inputs

    def predict(self, x: Doubles) -> Doubles:
        """What follows from s and a (n, O + A), as `targets` are."""
        foretold: Doubles = self.network.predict(self.inputs(x)).reshape(len(x), self.o + 1)
        return foretold

    def distances(self, rows: Floats) -> Doubles:
        """How far each row's s is from the nearest that it was fitted on."""
        return nearest_distances(self.inputs(rows[:, : self.o + self.a])[:, : self.o].astype(np.float32), self.base)


class _Asked:
    """What a regressor foretells of rows (n, W)."""

    def __init__(self, regressor: _Regressor, rows: Floats, rng: np.random.Generator) -> None:
        o, a = regressor.o, regressor.a
        self.enough = len(rows) >= ENOUGH
        if not self.enough:
            return
        x, y = rows[:, : o + a].astype(np.float64), regressor.targets(rows)
        foretold = regressor.predict(x)
        self.off, self.foretold = y - foretold, foretold  # from the mean of the rows fitted on
        self.effects = [foretold - self._others(regressor, x, rng) for _ in range(2)]
        self.still = (-regressor.y_centre / regressor.y_unit - foretold)[:, :o]
        self.other_rewards = rng.permutation(y[:, o]) - foretold[:, o]

    @staticmethod
    def _others(regressor: _Regressor, x: Doubles, rng: np.random.Generator) -> Doubles:
        """What is foretold of states with other rows' actions, in the mean of a few."""
        others = []
        for _ in range(_OTHERS):
            other = x.copy()
            other[:, regressor.o :] = x[rng.permutation(len(x)), regressor.o :]
            others.append(regressor.predict(other))
        mean: Doubles = np.mean(others, 0)
        return mean


def _ends(fit: Floats, made: Floats, fresh: Floats, o: int, a: int, seed: int) -> tuple[Slope, Slope]:
    """How much of the ends that trees foretell of (s, a, s') is there, in rows made and in fresh ones.

    Unknown where fewer than `EVENTS` of the rows end that they are grown on, or of the fresh ones.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier

    if min(float(side[:, -1].sum()) for side in (fit, fresh)) < EVENTS or fit[:, -1].all():
        return _UNKNOWN, _UNKNOWN
    trees = HistGradientBoostingClassifier(max_leaf_nodes=8, early_stopping=True, random_state=seed)
    trees.fit(with_changes(fit, o, a, ends=False), fit[:, -1] > 0.5)
    usual = float(fit[:, -1].mean())

    def share(rows: Floats) -> Slope:
        foretold = trees.predict_proba(with_changes(rows, o, a, ends=False))[:, 1:]
        return _slope(foretold - usual, foretold - usual, rows[:, -1:] - foretold)

    return share(made), share(fresh)


def _slope(by: Doubles, foretold: Doubles, off: Doubles) -> Slope:
    """The slope of foretold + off on foretold (n, C), over all columns, and its standard error.

    by: the foretold once more (n, C), with chance of its own (an instrumental variable): what chance the foretold has
    is in what it is subtracted from, too, and would be found again. Unknown where fewer than `EVENTS` rows tell it.
    """
    products, lack = (by * foretold).sum(1), (by * off).sum(1)
    whole = float(products.sum())
    if whole <= 1e-12 or whole**2 < EVENTS * float((products**2).sum()):
        return _UNKNOWN
    value = float(lack.sum()) / whole
    return Slope(1 + value, float(np.sqrt(((lack - value * products) ** 2).sum())) / whole)


def _units(values: Floats | Doubles) -> Doubles:
    """Deviations (W,) of columns (n, W), 1 where they are constant."""
    return _or_one(values.std(0, dtype=np.float64), values)


def _or_one(scale: Doubles, values: Floats | Doubles) -> Doubles:
    """The scale (W,) of columns (n, W), 1 where it is no more than rounding."""
    return np.where(scale <= 1e-6 * np.maximum(1, np.abs(values).max(0)), 1.0, scale)


def _rms(off: Doubles) -> Doubles:
    """Each row's root mean square (n,) over its columns."""
    rms: Doubles = np.sqrt((off**2).mean(1))
    return rms


def _medians(synthetic: Doubles, real: Doubles) -> Pair:
    return Pair(float(np.median(synthetic)), float(np.median(real)))


def _above(synthetic: Doubles, real: Doubles) -> float:
    """The standard errors by which the mean of one sample is above that of another.

    As if both were of one distribution: a few large values of one are then no surprise, even if the other has none.
    """
    deviation = float(np.concatenate([synthetic, real]).std()) * math.sqrt(1 / len(synthetic) + 1 / len(real))
    return float(synthetic.mean() - real.mean()) / deviation if deviation else 0.0


def _ranked_above(synthetic: Doubles, real: Doubles) -> float:
    """The same of their ranks (Mann and Whitney's test)."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([synthetic, real]))
    return _above(ranks[: len(synthetic)], ranks[len(synthetic) :])
