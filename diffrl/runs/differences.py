"""Whether policies differ by more than noise: intervals of a difference over start states, training seeds, and both.

The returns of a method are y(s, e) = mu + a(s) + b(e) + noise(s, e), of training seeds s and start states e, which all
seeds share: two random effects that cross. The variance of a difference of means has a part of either, and what is
left of single episodes in both:

    V = V_seeds + V_starts - V_rest

V_seeds is of the means over start states, V_starts of the means over seeds, and V_rest of the residuals of rows and
columns. Either of the first two leaves the other's effect out, so that the verdict goes by an interval over both. Each
part has its own degrees of freedom, f, and t_f is Student's quantile; the squares of half of the interval's width add:

    half^2 = max(t_seeds^2 V_seeds + t_starts^2 max(V_starts - V_rest, 0), t_starts^2 V_starts, t_rest^2 V_rest)

It holds the intervals over seeds alone and over start states alone. Of few seeds it is rather too wide than too short:
for normal effects, of 2 to 10 seeds and 10 to 100 start states, the tests find at most 5 % of equal methods told to
differ, but for the error of counting; about 5 % where seeds alone make noise, fewer where start states do, too.

Two runs have each its own seeds, as two groups (Welch), unless they are of one origin: then a seed of the one began as
the same seed of the other, and it is the differences of each seed that vary (Student's t on pairs). Seeds that have
nothing in common but their number are two groups, too. The number sets initial weights, batches and the noise that
policies draw here; what policies of two methods have in common by that is little, and never of opposite sign. Two
groups ignore it, where pairs would give half of the degrees of freedom away.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffrl.support.errors import counted, joined
from diffrl.support.statistics import student_ends

CONFIDENCE = 0.95
"""Of the intervals."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean with its interval of `CONFIDENCE`; its ends are nan where there is too little to tell."""

    mean: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return not np.isnan(self.low)

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval leaves 0 out."""
        return bool(self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        """For example `+3.1 [1.0, 5.2]`."""
        ends = f" [{self.low:+.2f}, {self.high:+.2f}]" if self.known else ""
        return f"{self.mean:+.2f}{ends}"


@dataclass(frozen=True)
class Difference:
    """How much more the policies of one run reach than those of another, from the same start states."""

    over_both: Interval
    """Of the methods, over training seeds and start states together: what the verdict goes by; unknown where either of
    the others is."""
    over_starts: Interval
    """Of these very policies, over start states: Student's t on the paired differences, each a mean over the seeds."""
    over_seeds: Interval
    """Of the methods from these start states, over training seeds: Welch's t on the seeds' means, or Student's on the
    differences of each seed where the runs are of one origin; unknown with a single seed."""
    single: tuple[str, ...] = ()
    """The names of those of the two runs that have a single seed."""
    same: int = 0
    """The start states, where both reach the same returns from every one of them; 0: they do not."""
    common: tuple[int, ...] = ()
    """The seeds that both have, where these alone are compared, each with itself: the runs are of one origin."""
    undefined: int = 0
    """The episodes whose return is no finite number; with one there is no interval."""

    @property
    def among(self) -> str:
        """Behind the difference: of which seeds it is; "": of all, as two groups."""
        if not self.common:
            return ""
        which, itself = (
            ("seed", "") if len(self.common) == 1 else ("seeds", ", so that each seed is compared with itself")
        )
        return f" over {which} {joined([*map(str, self.common)])}, which both have: the runs are of one origin{itself}"

    @property
    def starts(self) -> str:
        """The interval over start states, or why there is none."""
        return str(self.over_starts) if self.over_starts.known else f"unknown: {self._not_finite or 'one start state'}"

    @property
    def seeds(self) -> str:
        """The interval over training seeds, or why there is none."""
        return str(self.over_seeds) if self.over_seeds.known else f"unknown: {self._not_finite or self._lone}"

    @property
    def both(self) -> str:
        """The interval over training seeds and start states together; why there is none, the others say."""
        return str(self.over_both) if self.over_both.known else "unknown"

    @property
    def _not_finite(self) -> str:
        return f"{counted(self.undefined, 'returns')} not finite" if self.undefined else ""

    @property
    def _lone(self) -> str:
        return "one seed in common" if self.common else f"one seed of {joined(self.single)}"

    @property
    def verdict(self) -> str:
        """Whether the difference is more than noise, which `over_both` says where it is known: a sentence or two."""
        if self.undefined:
            return f"No verdict: {self._not_finite} (NaN or infinite)."
        if self.same:
            which = "every start state" if self.same > 1 else "the one start state"
            return f"No difference at all: the same return from {which}."
        if not self.over_starts.known:
            return "No verdict: one start state does not tell how far others would differ (--episodes N)."
        of_methods = f" With {self._lone} it" if self.single else ""
        if of_methods and self.over_starts.beyond_noise:
            return f"These very policies differ by more than other start states might explain.{of_methods} is no " + (
                "verdict on the methods."
            )
        if self.over_both.beyond_noise:
            sign = "better" if self.over_both.mean > 0 else "worse"
            return f"More than noise: {sign} by more than another training seed and other start states might explain."
        by = ((self.over_seeds, "another training seed"), (self.over_starts, "other start states"))
        alone = [what for interval, what in by if interval.known and not interval.beyond_noise]
        cause = " or ".join(alone) or f"{by[0][1]} and {by[1][1]} together"
        differ = " (These very policies do differ, over start states.)" * self.over_starts.beyond_noise
        silent = of_methods and f"{of_methods} says nothing of the methods."
        return f"Not more than noise: {cause} might explain it.{differ}{silent}"


def difference(
    ours: Array, theirs: Array, names: tuple[str, str] = ("the one", "the other"), common: tuple[int, ...] = ()
) -> Difference:
    """How much more ours (S, E) are than theirs (S', E), of E start states in the same order.

    names: of the two. common: the seeds of the rows, the same of both, where the runs are of one origin.
    """
    single = tuple(name for name, values in zip(names, (ours, theirs), strict=True) if len(values) == 1)
    if undefined := sum(int((~np.isfinite(y)).sum()) for y in (ours, theirs)):
        unknown = Interval(np.nan, np.nan, np.nan)
        return Difference(unknown, unknown, unknown, single, 0, common, undefined)
    by_start = ours.mean(0) - theirs.mean(0)
    same = len(by_start) if _same(ours, theirs, bool(common)) else 0
    mean = float(by_start.mean())
    groups = [ours - theirs] if common else [ours, theirs]
    starts, seeds, rest = _variance(by_start), _sum(_of_seeds(y) for y in groups), _sum(_of_rest(y) for y in groups)
    beyond = _Variance(float(np.maximum(starts.value - rest.value, 0)), starts.freedom)
    squares = seeds.half**2 + beyond.half**2, starts.half**2, rest.half**2
    half = float(np.sqrt(np.max(squares)))  # nan where one is
    both = Interval(mean, mean - half, mean + half)
    return Difference(both, starts.around(mean), seeds.around(mean), single, same, common)


def _same(ours: Array, theirs: Array, paired: bool) -> bool:
    """Whether (S, E) and (S', E) are the same returns: seed by seed where paired, else in any order of seeds."""
    if paired:
        return np.array_equal(ours, theirs)
    return np.array_equal(np.sort(ours, 0), np.sort(theirs, 0)) or not np.ptp(np.vstack([ours, theirs]), 0).any()


# --- Variances of a mean --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Variance:
    """An estimate of a mean's variance, with its degrees of freedom; both are nan where there is too little to tell."""

    value: float
    freedom: float

    def around(self, mean: float) -> Interval:
        """Student's interval of the mean."""
        return Interval(mean, *student_ends(mean, float(np.sqrt(self.value)), self.freedom, CONFIDENCE))

    @property
    def half(self) -> float:
        """Half of the width of that interval."""
        return student_ends(0.0, float(np.sqrt(self.value)), self.freedom, CONFIDENCE)[1]


def _variance(values: Array) -> _Variance:
    """Of the mean of values (n,) that are independent."""
    n = len(values)
    return _Variance(float(values.var(ddof=1)) / n, n - 1) if n > 1 else _Variance(np.nan, np.nan)


def _of_seeds(y: Array) -> _Variance:
    """Of the mean of y (S, E), over seeds."""
    return _variance(y.mean(1))


def _of_rest(y: Array) -> _Variance:
    """Of the mean of y (S, E), as far as it is what neither seed nor start state explains."""
    S, E = y.shape
    freedom = (S - 1) * (E - 1)
    if not freedom:
        return _Variance(np.nan, np.nan)
    residuals = y - y.mean(1, keepdims=True) - y.mean(0) + y.mean()
    return _Variance(float(np.square(residuals).sum()) / freedom / (S * E), freedom)


def _sum(parts: Iterable[_Variance]) -> _Variance:
    """Of a sum or difference of means that are independent, with Satterthwaite's degrees of freedom."""
    parts = list(parts)
    value = float(sum(part.value for part in parts))
    spread = sum(part.value**2 / part.freedom for part in parts)
    return _Variance(value, value**2 / spread if spread > 0 else float(sum(part.freedom for part in parts)))
