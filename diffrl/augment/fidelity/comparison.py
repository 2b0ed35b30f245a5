"""Are synthetic transitions what the real ones are? Measured column by column, jointly, and against the simulator.

Each measure has its floor: the same between two sets of real rows, which sampling alone keeps from zero. Distances over
whole rows [s, a, r, s', terminal] are in standardised units: mean 0 and deviation 1 of the rows the model was trained
on, terminal as it is (0 or 1).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from diffrl.augment.fidelity import measures
from diffrl.augment.fidelity.learned import FITTED, LearnedError, learned_error
from diffrl.augment.fidelity.measures import PARTS, QUERIES, Doubles, DynamicsError, Neighbours, Pair
from diffrl.augment.fidelity.sentences import verdicts_of
from diffrl.augment.fidelity.verdicts import of_rows
from diffrl.data.fidelity import Verdict
from diffrl.data.offline import ACTION_LIMIT, Floats, Ints, OfflineDataset
from diffrl.diffusion.diagnostics import sliced_w2
from diffrl.support.errors import DataError, UserError, counted
from envs.dynamics import Dynamics

PROJECTIONS = 128
"""Random directions of the sliced W2."""
LEGEND = "s[0] is observations[0] of `diffrl data info`, a[0] actions[0], r rewards, s'[0] next_observations[0]."
"""What the columns are called elsewhere."""
MIXED = "The source holds generated rows itself: what the rows are compared with is not, or not all, recorded."
"""What is said where rows are compared with such."""
UNKNOWN = "none is known for these data"
"""Why there is no simulator, where nothing else is known."""


@dataclass(frozen=True, eq=False)
class FidelityReport:
    """What `fidelity` has measured, of rows of W columns."""

    names: tuple[str, ...]
    """The names (W,) of the columns: s[0], ..., a[0], ..., r, s'[0], ..., terminal; `LEGEND` says what they are."""
    rows: int
    """How many rows of each side were compared as a whole."""
    floor: str
    """What `real` is in the pairs, in words."""
    steered: bool
    """Whether the synthetic rows are meant to be like a part of the real ones alone."""
    notes: tuple[str, ...]
    """What was left out and how to read the rest, one sentence each."""
    ks: Doubles
    """Kolmogorov-Smirnov statistic (W,) of every column, synthetic against real: 0 the same, 1 apart."""
    ks_floor: Doubles
    """Kolmogorov-Smirnov statistic (W,) of every column, real against real."""
    correlations: Doubles
    """Correlations (W, W) of the real rows; 0 where a column is constant."""
    synthetic_correlations: Doubles
    """Correlations (W, W) of the synthetic rows."""
    correlation_largest: Pair
    """The largest |difference| between a correlation and that of the real rows."""
    correlation_mean: Pair
    """The mean |difference| between correlations and those of the real rows."""
    sliced_w2: Pair
    """Sliced W2 of standardised rows to real ones, equal numbers."""
    shuffled_w2: float
    """Sliced W2 to real ones of real rows whose columns are shuffled (`measures.shuffled`)."""
    variety: Pair
    """How far rows are from one another (`measures.variety`), equal numbers."""
    told_apart: Pair
    """How well a classifier tells rows from held-out ones (`measures.told_apart`): .5 is chance, 1 always."""
    tells: Doubles
    """By which columns (W,) it does so with synthetic rows: how much the area falls without each."""
    neighbours: Neighbours
    """Distances to the nearest training row."""
    terminal_rate: Pair
    """Share of terminal rows; `real`: of the training rows."""
    terminal_rows: tuple[int, int]
    """How many synthetic rows, and how many training rows, `terminal_rate` is measured over: all that are fit."""
    actions_outside: Pair
    """Share of rows with an action beyond its bounds; `real`: of the training rows."""
    actions_at_bound: Pair
    """Share of rows with an action on a bound and none beyond; `real`: of the training rows."""
    dynamics: DynamicsError | None
    """Errors against the simulator; None where none was given."""
    learned: LearnedError | None
    """Errors against a regressor fitted on real rows; None where the simulator is theirs, or rows are too few."""
    no_simulator: str
    """Why there is no simulator, a part of a sentence."""
    source: Verdict | None = None
    """What the data that the rows are compared with say of generated rows in them; None: all of them are real."""

    @property
    def ks_largest(self) -> Pair:
        """The largest Kolmogorov-Smirnov statistic of a column."""
        return Pair(float(self.ks.max()), float(self.ks_floor.max()))

    @property
    def ks_mean(self) -> Pair:
        """The mean Kolmogorov-Smirnov statistic of the columns."""
        return Pair(float(self.ks.mean()), float(self.ks_floor.mean()))

    @property
    def verdicts(self) -> dict[str, str]:
        """A sentence a measure, and before them, as `overall`, whether the rows are of any use."""
        return verdicts_of(self)

    def to_json(self) -> dict[str, Any]:
        """All figures, as JSON holds them: without the row-by-row distances and errors, whose quantiles they are."""
        near, steps = self.neighbours, self.dynamics
        return {
            "rows": self.rows,
            "floor": self.floor,
            "source": None if self.source is None else self.source._asdict(),
            "notes": list(self.notes),
            "verdicts": self.verdicts,
            "marginals": {
                "ks_largest": _as_json(self.ks_largest),
                "ks_mean": _as_json(self.ks_mean),
                "columns": {
                    name: _as_json(Pair(*values))
                    for name, *values in zip(self.names, self.ks.tolist(), self.ks_floor.tolist(), strict=True)
                },
            },
            "correlations": {
                "largest_difference": _as_json(self.correlation_largest),
                "mean_difference": _as_json(self.correlation_mean),
                "real": self.correlations.round(5).tolist(),
                "synthetic": self.synthetic_correlations.round(5).tolist(),
            },
            "sliced_w2": _as_json(self.sliced_w2),
            "sliced_w2_of_shuffled_columns": self.shuffled_w2,
            "variety": _as_json(self.variety),
            "classifier": {
                "area_under_curve": _as_json(self.told_apart),
                "columns": dict(zip(self.names, self.tells.round(5).tolist(), strict=True)),
            },
            "nearest_neighbour": {
                "rows": len(near.synthetic),
                "median": _as_json(near.median),
                "quantile_1_percent": _as_json(near.low),
                "share_closer_than_1_percent_of_real": near.closer,
                "the_same_share_of_real": near.usual,
                "median_of_shuffled_columns": near.shuffled,
            },
            "terminal_rate": _as_json(self.terminal_rate),
            "terminal_rows": dict(zip(Pair._fields, self.terminal_rows, strict=True)),
            "actions": {
                "share_outside": _as_json(self.actions_outside),
                "share_at_bound": _as_json(self.actions_at_bound),
            },
            "dynamics": None
            if steps is None
            else {
                "rows": len(steps.synthetic),
                "median": _as_json(steps.median),
                "quantile_90_percent": _as_json(steps.high),
                "standing_still": _finite(steps.standing_still),
                "reward_median": _as_json(steps.reward),
                "reward_median_of_shuffled_rewards": _finite(steps.other_rewards),
                "terminal_differs": _as_json(steps.terminal),
                "share_left_out": _as_json(steps.left_out),
                "share_blown_up": _as_json(steps.blown_up),
            },
            "regressor": None if self.learned is None else _of_regressor(self.learned),
        }


def fidelity(
    real: OfflineDataset,
    synthetic: OfflineDataset,
    held_out: OfflineDataset | None,
    *,
    dynamics: Dynamics | None,
    seed: int = 0,
    rows: int = 20_000,
    action_bounds: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
    steered: bool = False,
    no_simulator: str = UNKNOWN,
    source: Verdict | None = None,
) -> FidelityReport:
    """Compare synthetic transitions with real ones.

    real: the rows the model was trained on. held_out: real rows it has not seen, which give the floor; without them
    two halves of `real` do. rows: the most that are looked at a side, drawn by `seed`; nearest neighbours are looked
    for among all of `real`. action_bounds: (low, high), numbers or (A,); [-1, 1] if None. steered: the synthetic rows
    are meant to be like a part of the real ones, such as those of high reward: another distribution is no fault.
    dynamics: the simulator; without one (no_simulator says why), and in what the real rows are not as it has them, a
    regressor fitted on real rows stands in for it (`learned.py`). source: what `real` says of generated rows in it
    (`diffrl.augment.source`); the verdict says it again, and what it calls real rows are then source rows.

    Terminal rows whose s' is a stand-in (`OfflineDataset.has_terminal_next`) are left out, on all sides, wherever s' is
    compared.

    Rows of unknown successor, or with values that are not finite, are left out too. Raises DataError where sizes
    differ or a side is left with too few rows.
    """
    if rows < 2:
        raise UserError(f"{rows} rows were asked for; comparing needs at least 2.")
    sides = {"real": real, "synthetic": synthetic} | ({} if held_out is None else {"held out": held_out})
    _check_sizes(sides)
    stand_ins = any(
        not side.has_terminal_next and side.terminals.any() for side in (real, held_out) if side is not None
    )
    notes = [] if source is None else [MIXED]
    fit = {}
    for name, side in sides.items():
        fit[name], unfit = _fit_rows(side)
        if unfit:
            held = (
                "holds values that are not finite, and is" if unfit == 1 else "hold values that are not finite, and are"
            )
            notes.append(f"{counted(unfit, f'{name} rows')} {held} left out.")
        if len(fit[name]) < 4:
            few = counted(len(fit[name]), f"{name} rows")
            raise DataError(f"Only {few} can be compared: finite, their successor known. Give more.")
    if stand_ins:
        notes.append("The real data do not hold what follows a terminal row: those are left out where s' is compared.")

    rng = np.random.default_rng(seed)
    if held_out is None:
        floor = (
            "one half of the training rows against the other, as no rows were held out (nearest neighbours: a training "
            "row's nearest other one)"
        )
        order = rng.permutation(fit["real"])
        base_rows, fresh_rows = order[::2], order[1::2]
    else:
        floor = "held-out rows against training rows"
        base_rows, fresh_rows = fit["real"], fit["held out"]
    n = min(rows, len(base_rows), len(fresh_rows), len(fit["synthetic"]))
    made, fresh, base = (
        _gather(side, rng.choice(numbers, n, replace=False))
        for side, numbers in (
            (synthetic, fit["synthetic"]),
            (real if held_out is None else held_out, fresh_rows),
            (real, base_rows),
        )
    )
    train = _gather(real, fit["real"])
    o, a = real.observation_size, real.action_size
    mean, scale = _scales(train)

    steps = learned = None
    if dynamics is not None:
        steps = measures.dynamics_error(dynamics, made, fresh, scale[o + a + 1 : -1], o, a, stand_ins)
    if steps is None or steps.own != set(PARTS):
        # More rows than are compared as a whole, where there are. Where few are held out, its floor is of training rows
        # as well: it must not have seen them, but the model may.
        order = np.random.default_rng((seed, 4)).permutation(base_rows)
        aside = min(max(QUERIES - len(fresh_rows), 0), len(order) // 4)
        made_more, unseen_more = (
            _gather(side, _some(numbers, QUERIES, seed))
            for side, numbers in (
                (synthetic, fit["synthetic"]),
                (real if held_out is None else held_out, fresh_rows),
            )
        )
        known = _gather(real, order[aside:][:FITTED])
        unseen_more = np.concatenate([unseen_more, _gather(real, order[:aside])])
        if stand_ins:
            known, made_more, unseen_more = (side[side[:, -1] == 0] for side in (known, made_more, unseen_more))
        learned = learned_error(known, made_more, unseen_more, o, a, seed)
    ks = np.array([measures.ks_statistic(x, y) for x, y in zip(made.T, fresh.T, strict=True)])
    ks_floor = np.array([measures.ks_statistic(x, y) for x, y in zip(base.T, fresh.T, strict=True)])
    if stand_ins:  # of s' on its own too, terminal rows are no part
        alive = [side[side[:, -1] == 0] for side in (made, fresh, base)]
        for column in range(o + a + 1, 2 * o + a + 1):
            ks[column] = measures.ks_statistic(alive[0][:, column], alive[1][:, column])
            ks_floor[column] = measures.ks_statistic(alive[2][:, column], alive[1][:, column])
        n = min(map(len, alive))
        if n < 2:
            counts = ", ".join(str(len(side)) for side in alive)
            raise DataError(
                f"Of the synthetic, held-out and training rows drawn, {counts} are not terminal: too few to compare s'."
            )
        made, fresh, base = (side[:n] for side in alive)
        train = train[train[:, -1] == 0]

    of_made, of_fresh, of_base = (measures.correlations(side) for side in (made, fresh, base))
    pairs = ~np.eye(len(of_fresh), dtype=bool)
    of_model, of_chance = np.abs(of_made - of_fresh)[pairs], np.abs(of_base - of_fresh)[pairs]
    shuffle = np.random.default_rng((seed, 1))
    made_w2, base_w2, shuffled_w2 = (
        float(
            sliced_w2(
                torch.from_numpy((side - mean) / scale),
                torch.from_numpy((fresh - mean) / scale),
                PROJECTIONS,
                torch.Generator().manual_seed(seed),
            )
        )
        for side in (made, base, measures.shuffled(base, shuffle))
    )
    unseen, noise = None if held_out is None else fresh, measures.shuffled(fresh, shuffle)
    told, tells = measures.told_apart(made, fresh, o, a, seed)
    by_chance, _ = measures.told_apart(base, fresh, o, a, seed, columns=False)
    low, high = (-ACTION_LIMIT, ACTION_LIMIT) if action_bounds is None else action_bounds
    ends, outside, at_bound = zip(
        *(
            (float(side.terminals[numbers].mean()), *measures.at_bounds(side.actions[numbers], low, high))
            for side, numbers in ((synthetic, fit["synthetic"]), (real, fit["real"]))
        ),
        strict=True,
    )
    return FidelityReport(
        names=_names(o, a),
        rows=n,
        floor=floor,
        steered=steered,
        notes=tuple(of_rows(source, note) for note in notes),
        ks=ks,
        ks_floor=ks_floor,
        correlations=of_fresh,
        synthetic_correlations=of_made,
        correlation_largest=Pair(float(of_model.max()), float(of_chance.max())),
        correlation_mean=Pair(float(of_model.mean()), float(of_chance.mean())),
        sliced_w2=Pair(made_w2, base_w2),
        shuffled_w2=shuffled_w2,
        variety=Pair(*(measures.variety(side, mean, scale) for side in (made, fresh))),
        told_apart=Pair(told, by_chance),
        tells=tells,
        neighbours=measures.neighbours(train, made, unseen, noise, mean, scale, rng),
        terminal_rate=Pair(*ends),
        terminal_rows=(len(fit["synthetic"]), len(fit["real"])),
        actions_outside=Pair(*outside),
        actions_at_bound=Pair(*at_bound),
        dynamics=steps,
        learned=learned,
        no_simulator=no_simulator,
        source=source,
    )


# --- rows ----------------------------------------------------------------------------------------------------------


def _names(o: int, a: int) -> tuple[str, ...]:
    states, actions = [f"s[{i}]" for i in range(o)], [f"a[{i}]" for i in range(a)]
    following = [f"s'[{i}]" for i in range(o)]
    return (*states, *actions, "r", *following, "terminal")


def _check_sizes(sides: dict[str, OfflineDataset]) -> None:
    """Raise DataError where a data set is broken, or its observations or actions are of another size than real's."""
    sizes = {name: (side.observation_size, side.action_size) for name, side in sides.items()}
    for name, side in sides.items():
        problems = side.structural_problems()
        if problems:
            raise DataError("\n".join(f"{name} rows: {problem}" for problem in problems))
        if sizes[name] != sizes["real"]:
            raise DataError(
                f"The {name} rows have observations and actions of sizes {sizes[name]}, the real ones "
                f"{sizes['real']}: not of one task."
            )


def table_of(dataset: OfflineDataset, most: int) -> Floats:
    """Rows [s, a, r, s', terminal] (n, W) of known successor and finite: `most` at most, evenly spread."""
    numbers, _ = _fit_rows(dataset)
    return _gather(dataset, numbers[:: -(-len(numbers) // most)])


def _fit_rows(dataset: OfflineDataset) -> tuple[Ints, int]:
    """The numbers of rows whose successor is known and whose values are finite; how many others are not finite."""
    following, known = dataset.successors()
    finite = np.isfinite(dataset.rewards)
    for values in (dataset.observations, dataset.actions, following):
        finite &= np.isfinite(values).all(1)
    return np.flatnonzero(known & finite), int((known & ~finite).sum())


def _gather(dataset: OfflineDataset, numbers: Ints) -> Floats:
    """Gather the rows [s, a, r, s', terminal] (n, W) at `numbers` (n,)."""
    following, _ = dataset.successors()
    flat = (dataset.rewards, dataset.terminals)
    reward, terminal = (column[numbers, None].astype(np.float32) for column in flat)
    parts = (dataset.observations[numbers], dataset.actions[numbers], reward, following[numbers], terminal)
    return np.concatenate(parts, axis=1)


def _some(numbers: Ints, most: int, seed: int) -> Ints:
    """`most` of the row numbers (n,), drawn by `seed`, or all where there are no more."""
    return numbers if len(numbers) <= most else np.random.default_rng((seed, 4)).choice(numbers, most, replace=False)


def _scales(train: Floats) -> tuple[Doubles, Doubles]:
    """The mean and the deviation (W,) of training rows; constant columns, and terminal, are not rescaled."""
    mean, scale = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
    scale[scale <= 1e-6 * np.maximum(1, np.abs(mean))] = 1.0
    mean[-1], scale[-1] = 0.0, 1.0
    return mean, scale


def _of_regressor(learned: LearnedError) -> dict[str, Any]:
    """What a regressor says, as JSON holds it."""
    shares = {"changes": learned.moves, "actions": learned.acts, "rewards": learned.pays, "ends": learned.ends}
    return {
        "rows": len(learned.synthetic),
        "share_within_reach": _as_json(learned.within),
        "median": _as_json(learned.following),
        "standing_still": _finite(learned.standing_still),
        "rank_above_real": _finite(learned.further),
        "reward_rms": _as_json(learned.reward),
        "reward_rms_of_shuffled_rewards": _finite(learned.other_rewards),
        "reward_above_real": _finite(learned.dearer),
        "share_of_what_is_foretold": {
            name: {
                "synthetic": _finite(made.value),
                "synthetic_error": _finite(made.error),
                "real": _finite(real.value),
                "real_error": _finite(real.error),
            }
            for name, (made, real) in shares.items()
        },
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _as_json(pair: Sequence[float]) -> dict[str, float | None]:
    return dict(zip(Pair._fields, map(_finite, pair), strict=True))
