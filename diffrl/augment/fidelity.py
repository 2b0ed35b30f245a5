"""Are synthetic transitions what the real ones are? Measured column by column, jointly, and against the simulator.

Each measure has its floor: the same between two sets of real rows, which sampling alone keeps from zero. Distances over
whole rows [s, a, r, s', terminal] are in standardised units: mean 0 and deviation 1 of the rows the model was trained
on, terminal as it is (0 or 1).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from diffrl.data.offline import ACTION_LIMIT, Bools, Floats, Ints, OfflineDataset
from diffrl.diffusion.diagnostics import sliced_w2
from diffrl.errors import DataError, UserError
from envs.dynamics import Dynamics

Doubles = npt.NDArray[np.float64]

PROJECTIONS = 128
"""Random directions of the sliced W2."""
QUERIES = 2_000
"""Rows whose nearest neighbour is looked for, among all training rows."""
STEPS = 5_000
"""Rows the simulator is set to, a side."""
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
    """(Q,)"""
    real: Doubles
    """(Q',) from rows the model has not seen; without such, from training rows to the nearest other one."""
    median: Pair
    low: Pair
    """1 % quantiles."""
    closer: float
    """Share of synthetic rows nearer to a training row than the real side's 1 % quantile; .01 is expected."""


@dataclass(frozen=True, eq=False)
class DynamicsError:
    """What the simulator says of s, a -> s', r, terminal. Errors of s' are RMS over its columns, standardised."""

    synthetic: Doubles
    """(Q,) error of s', row by row."""
    real: Doubles
    """(Q',) the same of real rows; what the simulator itself is off by."""
    median: Pair
    high: Pair
    """90 % quantiles."""
    standing_still: float
    """Median error of "s' = s" on the real rows: the scale."""
    reward: Pair
    """Median |r - simulator's|, in units of reward."""
    terminal: Pair
    """Share of rows whose terminal differs from the simulator's."""
    left_out: Pair
    """Share of rows whose observation does not give the whole state (clipped velocities)."""
    blown_up: Pair
    """Share of the others on which the simulator breaks down: in no figure above but left_out."""


@dataclass(frozen=True, eq=False)
class FidelityReport:
    """The measures of `fidelity`. W columns."""

    names: tuple[str, ...]
    """(W,) s1, ..., a1, ..., r, s'1, ..., terminal."""
    rows: int
    """How many were compared as whole rows, a side."""
    floor: str
    """What "real" is in every pair: in words."""
    notes: tuple[str, ...]
    """What was left out, one sentence each."""
    ks: Doubles
    """(W,) Kolmogorov-Smirnov statistic of every column, synthetic against real: 0 the same, 1 apart."""
    ks_floor: Doubles
    """(W,) real against real."""
    correlations: Doubles
    """(W, W) of the real rows; 0 where a column is constant."""
    synthetic_correlations: Doubles
    """(W, W)"""
    correlation_largest: Pair
    """The largest |difference| of two correlations, to those of the real rows."""
    correlation_mean: Pair
    """The mean |difference| over pairs of columns."""
    sliced_w2: Pair
    """Of standardised rows, equal numbers."""
    neighbours: Neighbours
    terminal_rate: Pair
    """Here and in the next two, `real` is that of the training rows."""
    actions_outside: Pair
    """Share of rows with an action beyond its bounds."""
    actions_at_bound: Pair
    """Share of rows with an action on a bound (and none beyond)."""
    dynamics: DynamicsError | None
    """None where no simulator was given."""

    @property
    def ks_largest(self) -> Pair:
        """Over columns."""
        return Pair(float(self.ks.max()), float(self.ks_floor.max()))

    @property
    def ks_mean(self) -> Pair:
        """Over columns."""
        return Pair(float(self.ks.mean()), float(self.ks_floor.mean()))

    @property
    def verdicts(self) -> dict[str, str]:
        """A sentence a measure; there is no overall grade."""
        return _verdicts(self)

    def to_json(self) -> dict[str, Any]:
        """All figures, as JSON holds them: without the row-by-row distances and errors, whose quantiles they are."""
        near, steps = self.neighbours, self.dynamics
        return {
            "rows": self.rows,
            "floor": self.floor,
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
            "nearest_neighbour": {
                "rows": len(near.synthetic),
                "median": _as_json(near.median),
                "quantile_1_percent": _as_json(near.low),
                "share_closer_than_1_percent_of_real": near.closer,
            },
            "terminal_rate": _as_json(self.terminal_rate),
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
                "terminal_differs": _as_json(steps.terminal),
                "share_left_out": _as_json(steps.left_out),
                "share_blown_up": _as_json(steps.blown_up),
            },
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
) -> FidelityReport:
    """Compare synthetic transitions with real ones.

    real: the rows the model was trained on. held_out: real rows it has not seen, which give the floor; without them
    two halves of `real` do. rows: the most that are looked at a side, drawn by `seed`; nearest neighbours are looked
    for among all of `real`. action_bounds: (low, high), numbers or (A,); [-1, 1] if None.

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
    notes = []
    fit = {}
    for name, side in sides.items():
        fit[name], unfit = _fit_rows(side)
        if unfit:
            notes.append(f"{unfit:,} {name} rows hold values that are not finite, and are left out.")
        if len(fit[name]) < 4:
            raise DataError(
                f"Only {len(fit[name])} {name} rows can be compared: finite, their successor known. Give more."
            )
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

    steps = None
    if dynamics is not None:
        steps = _dynamics_error(dynamics, made, fresh, scale[o + a + 1 : -1], o, a, stand_ins)
    ks = np.array([ks_statistic(x, y) for x, y in zip(made.T, fresh.T, strict=True)])
    ks_floor = np.array([ks_statistic(x, y) for x, y in zip(base.T, fresh.T, strict=True)])
    if stand_ins:  # of s' on its own too, terminal rows are no part
        alive = [side[side[:, -1] == 0] for side in (made, fresh, base)]
        for column in range(o + a + 1, 2 * o + a + 1):
            ks[column] = ks_statistic(alive[0][:, column], alive[1][:, column])
            ks_floor[column] = ks_statistic(alive[2][:, column], alive[1][:, column])
        n = min(map(len, alive))
        if n < 2:
            counts = ", ".join(str(len(side)) for side in alive)
            raise DataError(
                f"Of the synthetic, held-out and training rows drawn, {counts} are not terminal: too few to compare s'."
            )
        made, fresh, base = (side[:n] for side in alive)
        train = train[train[:, -1] == 0]

    of_made, of_fresh, of_base = (_correlations(side) for side in (made, fresh, base))
    pairs = ~np.eye(len(of_fresh), dtype=bool)
    by_model, by_chance = np.abs(of_made - of_fresh)[pairs], np.abs(of_base - of_fresh)[pairs]
    w2 = Pair(
        *(
            float(
                sliced_w2(
                    torch.from_numpy((side - mean) / scale),
                    torch.from_numpy((fresh - mean) / scale),
                    PROJECTIONS,
                    torch.Generator().manual_seed(seed),
                )
            )
            for side in (made, base)
        )
    )
    low, high = (-ACTION_LIMIT, ACTION_LIMIT) if action_bounds is None else action_bounds
    ends, outside, at_bound = zip(
        *(
            (float(side.terminals[numbers].mean()), *_at_bounds(side.actions[numbers], low, high))
            for side, numbers in ((synthetic, fit["synthetic"]), (real, fit["real"]))
        ),
        strict=True,
    )
    return FidelityReport(
        names=_names(o, a),
        rows=n,
        floor=floor,
        notes=tuple(notes),
        ks=ks,
        ks_floor=ks_floor,
        correlations=of_fresh,
        synthetic_correlations=of_made,
        correlation_largest=Pair(float(by_model.max()), float(by_chance.max())),
        correlation_mean=Pair(float(by_model.mean()), float(by_chance.mean())),
        sliced_w2=w2,
        neighbours=_neighbours(train, made, None if held_out is None else fresh, mean, scale, rng),
        terminal_rate=Pair(*ends),
        actions_outside=Pair(*outside),
        actions_at_bound=Pair(*at_bound),
        dynamics=steps,
    )


# --- rows ----------------------------------------------------------------------------------------------------------


def _names(o: int, a: int) -> tuple[str, ...]:
    states, actions = [f"s{i + 1}" for i in range(o)], [f"a{i + 1}" for i in range(a)]
    following = [f"s'{i + 1}" for i in range(o)]
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
    """Rows [s, a, r, s', terminal] (n, W)."""
    following, _ = dataset.successors()
    flat = (dataset.rewards, dataset.terminals)
    reward, terminal = (column[numbers, None].astype(np.float32) for column in flat)
    parts = (dataset.observations[numbers], dataset.actions[numbers], reward, following[numbers], terminal)
    return np.concatenate(parts, axis=1)


def _scales(train: Floats) -> tuple[Doubles, Doubles]:
    """Mean and deviation (W,) of training rows; a constant column, and terminal, keep their unit."""
    mean, scale = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
    scale[scale <= 1e-6 * np.maximum(1, np.abs(mean))] = 1.0
    mean[-1], scale[-1] = 0.0, 1.0
    return mean, scale


# --- distributions -------------------------------------------------------------------------------------------------


def ks_statistic(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> float:
    """The largest difference of two empirical distribution functions, of samples (n,) and (m,), ties and all.

    Of n rows each from one distribution it is about .87 sqrt(2/n); in 1 % of cases above 1.63 sqrt(2/n).
    """
    x, y = np.sort(x), np.sort(y)
    both = np.concatenate([x, y])
    at_most_x, at_most_y = (np.searchsorted(side, both, side="right") / len(side) for side in (x, y))
    return float(np.abs(at_most_x - at_most_y).max())


def _correlations(rows: Floats) -> Doubles:
    """(W, W) Pearson's; 0 between a constant column and others."""
    centred = rows - rows.mean(0, dtype=np.float64)
    norms = np.sqrt((centred**2).sum(0))
    constant = norms <= 1e-6 * np.sqrt(len(rows)) * np.maximum(1, np.abs(rows).max(0))
    norms[constant] = 1.0
    centred[:, constant] = 0.0
    matrix: Doubles = (centred / norms).T @ (centred / norms)
    np.fill_diagonal(matrix, 1.0)
    return matrix


def _at_bounds(actions: Floats, low: npt.ArrayLike, high: npt.ArrayLike) -> tuple[float, float]:
    """Shares of rows with an action beyond a bound, and of those with one on a bound and none beyond."""
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    slack = _SLACK * (high - low)
    outside = ((actions < low - slack) | (actions > high + slack)).any(1)
    at = ((actions <= low + slack) | (actions >= high - slack)).any(1) & ~outside
    return float(outside.mean()), float(at.mean())


# --- nearest neighbours --------------------------------------------------------------------------------------------


def _neighbours(
    train: Floats, made: Floats, fresh: Floats | None, mean: Doubles, scale: Doubles, rng: np.random.Generator
) -> Neighbours:
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
    )


def nearest_distances(rows: Floats, base: Floats, exclude: Ints | None = None) -> Doubles:
    """(n,) Euclidean distance of each of rows (n, W) to the nearest of base (m, W).

    exclude: (n,) the row of base that does not count, for each row. The nearest is found by float32 products, and its
    distance then taken exactly: copies are at 0.
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


def _dynamics_error(
    dynamics: Dynamics, made: Floats, fresh: Floats, scale: Doubles, o: int, a: int, stand_ins: bool
) -> DynamicsError:
    model, world = (_steps(dynamics, side[:STEPS], scale, o, a, stand_ins) for side in (made, fresh))
    return DynamicsError(
        synthetic=model.errors,
        real=world.errors,
        median=Pair(_quantile(model.errors, 0.5), _quantile(world.errors, 0.5)),
        high=Pair(_quantile(model.errors, 0.9), _quantile(world.errors, 0.9)),
        standing_still=_quantile(world.still, 0.5),
        reward=Pair(_quantile(model.rewards, 0.5), _quantile(world.rewards, 0.5)),
        terminal=Pair(model.terminal, world.terminal),
        left_out=Pair(model.left_out, world.left_out),
        blown_up=Pair(model.blown_up, world.blown_up),
    )


class _Steps(NamedTuple):
    """Rows (n, W) against the simulator; see `DynamicsError`."""

    errors: Doubles
    still: Doubles
    rewards: Doubles
    terminal: float
    left_out: float
    blown_up: float


def _steps(dynamics: Dynamics, rows: Floats, scale: Doubles, o: int, a: int, stand_ins: bool) -> _Steps:
    """stand_ins: s' of terminal rows is none and not compared; their r and terminal are."""
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
        terminal=_share(terminals != ends),
        left_out=left_out,
        blown_up=blown_up,
    )


def _share(flags: Bools) -> float:
    return float(flags.mean()) if len(flags) else math.nan


def _rms(differences: npt.NDArray[Any], scale: Doubles) -> Doubles:
    """(n,) root mean square over columns, (n, O), in units of `scale` (O,)."""
    rms: Doubles = np.sqrt(((differences / scale) ** 2).mean(1))
    return rms


def _quantile(values: Doubles, q: float) -> float:
    return float(np.quantile(values, q)) if len(values) else math.nan


# --- words ---------------------------------------------------------------------------------------------------------


def _against_floor(pair: Pair) -> str:
    """How far a measure is above its floor."""
    if pair.synthetic <= 1.5 * pair.real:
        return "at the real-against-real floor"
    for factor in (2, 5):
        if pair.synthetic <= factor * pair.real:
            return f"within {factor}x of the real-against-real floor"
    return f"{pair.synthetic / pair.real:,.0f}x the real-against-real floor" if pair.real else "above a floor of 0"


def _verdicts(report: FidelityReport) -> dict[str, str]:
    worst = report.names[int(np.argmax(report.ks))]
    near, rate, outside = report.neighbours, report.terminal_rate, report.actions_outside
    lines = {
        "marginals": f"The mean KS over columns is {_against_floor(report.ks_mean)}, the largest (of {worst}) "
        f"{_against_floor(report.ks_largest)}.",
        "correlations": f"The mean difference is {_against_floor(report.correlation_mean)}, the largest "
        f"{_against_floor(report.correlation_largest)}.",
        "sliced_w2": f"The distance is {_against_floor(report.sliced_w2)}.",
        "nearest_neighbour": f"{_nearness(near.closer)} The median distance is "
        f"{near.median.synthetic:.3g}, of real rows {near.median.real:.3g}.",
        "terminal_rate": f"{rate.synthetic:.3%} of synthetic rows are terminal, {rate.real:.3%} of the training rows.",
        "actions": "No action is outside its bounds."
        if outside.synthetic == 0
        else f"{outside.synthetic:.3%} of synthetic rows have an action outside its bounds; of the training rows "
        f"{outside.real:.3%}.",
    }
    lines["dynamics"] = (
        "Not measured: no simulator for these data." if report.dynamics is None else _obeys(report.dynamics)
    )
    return lines


def _nearness(closer: float) -> str:
    share = f"{closer:.1%} of synthetic rows are nearer to a training row than 1 % of real rows are"
    if closer <= 0.02:
        return f"No sign of memorisation: {share}."
    return f"Near-copies of training rows: {share}." if closer < 0.5 else f"Training rows are memorised: {share}."


def _obeys(steps: DynamicsError) -> str:
    model, world = steps.median
    if not math.isfinite(model) or not math.isfinite(world):
        return "Not measured: no row's observation gives the simulator's whole state."
    step = steps.standing_still or 1.0
    line = (
        f"In the middle, a row misses the simulator's s' by {model / step:.2g} of a step's change (s' - s) and its "
        f"reward by {steps.reward.synthetic:.2g}; terminal is another in {steps.terminal.synthetic:.2%}."
    )
    if world > 0.1 * step:
        return f"{line} But real rows miss it by {world / step:.2g}: it is not the simulator they come from."
    return f"{line} Real rows miss it by {world / step:.1g}."


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _as_json(pair: Sequence[float]) -> dict[str, float | None]:
    return dict(zip(Pair._fields, map(_finite, pair), strict=True))
