"""Statistics of reports: closed forms, invariances, outside implementations, what intervals cover."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu, trim_mean

from diffrl.runs.study.protocols import curve, reached, result, results, shared
from diffrl.runs.study.scores import Row, Scores
from diffrl.runs.study.statistics import (
    interval,
    iqm,
    mean,
    median,
    optimality_gap,
    probability_of_improvement,
    profile,
    student,
)

Array = NDArray[np.float64]
ROUNDING = 64 * np.finfo(float).eps


def drawn(seed: int, runs: int = 7, tasks: int = 5) -> list[Array]:
    return list(np.random.default_rng(seed).normal(50, 20, (tasks, runs)))


def test_closed_forms() -> None:
    """Eight runs: a quarter cut from either end leaves 2, 3, 4, 5."""
    x = [np.array([0.0, 1, 2, 3]), np.array([4.0, 5, 60, 700])]
    assert iqm(x) == 3.5
    assert mean(x) == (1.5 + 769 / 4) / 2
    assert median([*x, np.array([8.0])]) == 8
    assert optimality_gap(x, target=10) == 10 - (1.5 + 29 / 4) / 2
    assert profile(x, np.array([-1.0, 2.0, 700.0])).tolist() == [1, (1 / 4 + 1) / 2, 0]
    assert probability_of_improvement([np.array([1.0, 2])], [np.array([2.0, 3, 0])]) == (1 + 1.5) / 6


def test_the_iqm_is_scipys_trimmed_mean() -> None:
    for runs in range(1, 9):
        x = drawn(runs, runs)
        assert iqm(x) == trim_mean(np.concatenate(x), 0.25)


def test_the_probability_of_improvement_is_mann_whitneys_u() -> None:
    """U / (m n), exactly, with ties and unequal numbers of seeds; the two directions add to one."""
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 5, (4, 6)).astype(float), generator.integers(0, 5, (4, 9)).astype(float)
    each = [mannwhitneyu(a, b, alternative="greater").statistic / 54 for a, b in zip(x, y, strict=True)]
    assert abs(probability_of_improvement(list(x), list(y)) - np.mean(each)) <= ROUNDING
    forth, back = probability_of_improvement(list(x), list(y)), probability_of_improvement(list(y), list(x))
    assert abs(forth + back - 1) <= ROUNDING
    assert probability_of_improvement(list(x), list(x)) == 0.5


@pytest.mark.parametrize("statistic", [mean, median, iqm])
def test_location_and_scale(statistic: object) -> None:
    """f(a x + b) = a f(x) + b, for the interval's ends too; the order of seeds and tasks is nothing to the value."""
    assert callable(statistic)
    x = drawn(1)
    one, other = (interval(statistic, scores, draws=200) for scores in (x, [3 * scores - 40 for scores in x]))
    for a, b in zip(one, other, strict=True):
        assert abs(3 * a - 40 - b) <= 1000 * ROUNDING
    shuffled = [np.random.default_rng(2).permutation(scores) for scores in x[::-1]]
    assert abs(statistic(shuffled) - statistic(x)) <= 100 * ROUNDING
    assert one.low < one.value < one.high


def test_the_optimality_gap_ignores_what_is_above_the_target() -> None:
    x = drawn(3)
    lifted = [np.where(scores >= 50, scores + 1000, scores) for scores in x]
    assert optimality_gap(x, 50) == optimality_gap(lifted, 50) > 0
    assert abs(optimality_gap(x, 1000) - (1000 - mean(x))) <= 1000 * ROUNDING


def test_the_profile_falls_from_one_to_nothing_and_its_area_is_the_mean() -> None:
    """The integral of P(score > tau) over tau >= 0 is the mean of scores that are not negative."""
    x = [np.abs(scores) for scores in drawn(4)]
    taus = np.linspace(0, 200, 200_001)
    shares = profile(x, taus)
    assert (np.diff(shares) <= 0).all()
    assert shares[0] == 1
    assert shares[-1] == 0
    assert abs(shares.sum() * 1e-3 - mean(x)) <= 1e-3  # one step of the grid


def test_intervals_of_batches_are_those_of_one_experiment_at_a_time() -> None:
    """A statistic reduces tasks and seeds and leaves repeated experiments alone."""
    x = [np.random.default_rng(5).normal(size=(11, n)) for n in (3, 4, 6)]
    for statistic in (mean, median, iqm, optimality_gap):
        each = [statistic([scores[i] for scores in x]) for i in range(11)]
        assert np.abs(statistic(x) - each).max() <= 200 * ROUNDING


def test_the_interval_of_two_seeds_runs_from_one_to_the_other() -> None:
    """Both draws are the lower one in a quarter of the bootstrap's experiments."""
    low_high = interval(mean, [np.array([10.0, 30.0])])
    assert tuple(map(float, low_high)) == (20, 10, 30)


def test_a_single_seed_has_no_interval() -> None:
    x = [np.array([1.0, 2.0]), np.array([3.0])]
    assert [math.isnan(v) for v in interval(iqm, x)] == [False, True, True]
    assert np.isnan(interval(probability_of_improvement, x[:1], x[1:]).low)
    assert math.isnan(student(np.array([4.0])).high)


def test_a_report_is_the_same_each_time_whatever_is_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = drawn(6)
    one = interval(iqm, x, draws=300)
    assert interval(iqm, x, draws=300) == one
    monkeypatch.setattr("diffrl.runs.study.statistics._CHUNK", 35 * 7)
    assert abs(interval(iqm, x, draws=300).low - one.low) < 3  # other random numbers, the same law


def test_what_intervals_cover() -> None:
    """Of 300 experiments of 10 seeds on 4 tasks: near 95 %, a little less, as percentiles of few seeds are too narrow.

    Of 300 experiments with Student's interval of 3 seeds, 95 % within three standard errors of the count (1.26 % each).
    """
    generator = np.random.default_rng(7)
    truth = np.array([0.0, 10.0, 50.0, 90.0])
    held = []
    for _ in range(300):
        x = list(generator.normal(truth[:, None], 5, (4, 10)))
        found = interval(mean, x, draws=400)
        held.append(found.low <= truth.mean() <= found.high)
    assert 0.88 <= np.mean(held) <= 0.98
    covered = [abs(student(v).value) <= student(v).high - student(v).value for v in generator.normal(0, 9, (300, 3))]
    assert abs(np.mean(covered) - 0.95) <= 3 * 0.0126


def test_agrees_with_rliable() -> None:
    """The authors' library: the same values exactly, and intervals within the bootstrap's own noise."""
    library = pytest.importorskip("rliable.library", reason="rliable is not installed: pip install rliable 'pandas<3'")
    metrics = pytest.importorskip("rliable.metrics")
    x, y = drawn(8, runs=6, tasks=8), drawn(9, runs=5, tasks=8)
    theirs_x, theirs_y = np.stack(x, axis=1), np.stack(y, axis=1)
    pairs = {
        mean: metrics.aggregate_mean,
        median: metrics.aggregate_median,
        iqm: metrics.aggregate_iqm,
        optimality_gap: lambda scores: metrics.aggregate_optimality_gap(scores, 100),
    }
    for ours, theirs in pairs.items():
        assert abs(ours(x) - theirs(theirs_x)) <= 200 * ROUNDING
    assert (
        abs(probability_of_improvement(x, y) - metrics.probability_of_improvement(theirs_x, theirs_y)) <= 4 * ROUNDING
    )
    taus = np.linspace(0, 100, 11)
    assert np.abs(profile(x, taus) - library.score_distributions(theirs_x, taus)).max() <= ROUNDING
    np.random.seed(0)  # noqa: NPY002 - rliable draws from NumPy's global stream
    _, bounds = library.get_interval_estimates(
        {"x": theirs_x}, lambda s: np.array([metrics.aggregate_iqm(s)]), reps=2000
    )
    found = interval(iqm, x)
    width = found.high - found.low
    assert np.abs(np.array([found.low, found.high]) - bounds["x"][:, 0]).max() < 0.08 * width


# --- Protocols ------------------------------------------------------------------------------------------------------


def rows(values: list[float], agent: str = "a", seed: int = 0, task: str = "t") -> list[Row]:
    return [Row(task, agent, seed, 10 * (i + 1), i + 0.5, value) for i, value in enumerate(values)]


def test_what_each_protocol_takes() -> None:
    seed = rows([1.0, 9.0, 2.0, 4.0, 3.0])
    assert [result(seed, protocol) for protocol in ("last", "best", "last3")] == [3, 9, 3]
    assert result(rows([1.0, 3.0]), "last3") == 2
    assert reached(seed, 9) == (20, 1.5)
    assert math.isnan(reached(seed, 10).step)
    both = Scores((*seed, *rows([5.0, 6.0], seed=3)))
    assert results(both, "best")["t", "a"].tolist() == [9, 6]


def test_a_curve_has_the_steps_that_all_seeds_have() -> None:
    found = curve({0: rows([1.0, 2.0, 3.0]), 1: rows([5.0, 7.0])})
    assert found.steps.tolist() == [10, 20]
    assert found.scores.tolist() == [[1, 2], [5, 7]]
    assert found.minutes.tolist() == [0.5, 1.5]
    assert curve({0: rows([1.0]), 1: [Row("t", "a", 1, 11, 0.0, 0.0)]}).scores.shape == (2, 0)


def test_aggregates_are_over_tasks_that_all_agents_have() -> None:
    has = {"a": "xyz", "b": "xy", "c": "yr", "d": "q"}
    scores = Scores(tuple(row for agent, tasks in has.items() for t in tasks for row in rows([1.0], agent, task=t)))
    assert shared(scores) == (["a", "b", "c"], ["y"], ["d"])
    returns = Scores(scores.rows, units={"y": "return"})
    assert shared(returns) == (["a", "b"], ["x"], ["c", "d"])


@pytest.mark.parametrize(
    ("has", "expected"),
    [
        ({"a": "z", "b": "x", "c": "x", "d": "x"}, (["b", "c", "d"], ["x"], ["a"])),  # the first agent is alone
        ({"a": "xyz", "b": "q", "c": "q", "d": "xyz", "e": "q"}, (["b", "c", "e"], ["q"], ["a", "d"])),
        ({"a": "xy", "b": "xy", "c": "q", "d": "q"}, (["a", "b"], ["x", "y"], ["c", "d"])),  # most tasks
        ({"a": "x", "b": "x", "c": "q", "d": "q"}, (["c", "d"], ["q"], ["a", "b"])),  # then the first tasks
        ({"a": "x", "b": "y"}, ([], [], ["a", "b"])),
        ({"a": "xy"}, (["a"], ["x", "y"], [])),
        ({"a": ""}, ([], [], [])),
    ],
)
def test_aggregates_are_of_the_most_agents_that_have_a_task_in_common(
    has: dict[str, str], expected: tuple[list[str], list[str], list[str]]
) -> None:
    scores = Scores(tuple(row for agent, tasks in has.items() for t in tasks for row in rows([1.0], agent, task=t)))
    assert shared(scores) == expected
    most = max((len(expected[0]), *(sum(t in tasks for tasks in has.values()) for t in "xyzq")))
    assert len(expected[0]) == most or most < 2
