"""The report's measures against closed forms and brute force."""

import numpy as np
import pytest

from diffrl.augment.fidelity.measures import (
    FEWEST,
    Floats,
    ks_statistic,
    nearest_distances,
    shuffled,
    told_apart,
    variety,
)


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.5, 1.5])
def test_ks_of_shifted_uniforms_is_the_shift(shift: float) -> None:
    """Up to 1.63 sqrt(2/n), passed in 1 % of cases."""
    rng, n = np.random.default_rng(0), 20_000
    x, y = rng.uniform(size=n), rng.uniform(size=n) + shift
    assert ks_statistic(x, y) == pytest.approx(min(shift, 1), abs=1.63 * np.sqrt(2 / n))
    assert ks_statistic(x, y) == ks_statistic(y, x)


def test_ks_counts_ties_once_and_takes_unequal_sizes() -> None:
    """Of coins it is the difference of the shares."""
    x, y = np.array([0, 0, 0, 1]), np.array([0, 1, 1, 1, 1])
    assert ks_statistic(x, y) == pytest.approx(0.75 - 0.2)
    assert ks_statistic(x, np.zeros(3)) == pytest.approx(0.25)
    assert ks_statistic(x, x) == 0


def test_nearest_distances_are_brute_forces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many parts; a copy is at exactly 0, and not if its own row is excluded."""
    monkeypatch.setattr("diffrl.augment.fidelity.measures._ELEMENTS", 200)
    rng = np.random.default_rng(0)
    base = rng.standard_normal((70, 5)).astype(np.float32)
    own = np.array([3, 69, 14])
    rows = np.concatenate([rng.standard_normal((20, 5)).astype(np.float32), base[own]])
    distances = np.linalg.norm(rows[:, None].astype(np.float64) - base, axis=2)
    found = nearest_distances(rows, base)
    assert found == pytest.approx(distances.min(1), rel=1e-6)
    assert (found[20:] == 0).all()
    distances[[20, 21, 22], own] = np.inf
    assert nearest_distances(base[own], base, exclude=own) == pytest.approx(distances[20:].min(1), rel=1e-6)


def test_variety_of_a_lattice_is_its_spacing() -> None:
    """In standardised units; a row is not its own neighbour, and a second copy of it is."""
    rows = np.arange(12, dtype=np.float32)[:, None] * np.array([3, 0], np.float32)
    mean, scale = np.array([4.0, 7.0]), np.array([2.0, 1.0])
    assert variety(rows, mean, scale) == pytest.approx(1.5)
    assert variety(np.repeat(rows, 2, 0), mean, scale) == 0


def test_shuffled_columns_keep_marginals_and_lose_all_else() -> None:
    """Of columns that are all nearly the same; correlations up to 5 / sqrt(n) are chance."""
    rng, n = np.random.default_rng(0), 2000
    rows = (rng.standard_normal((n, 1)) + 0.1 * rng.standard_normal((n, 6))).astype(np.float32)
    assert np.corrcoef(rows.T).min() > 0.9
    found = shuffled(rows, rng)
    assert np.array_equal(np.sort(found, axis=0), np.sort(rows, axis=0))
    assert np.abs(np.corrcoef(found.T) - np.eye(6)).max() < 5 / n**0.5


def rows_of(n: int, seed: int, shift: float = 0.0, step: float = 0.1) -> Floats:
    """Rows [s, a, r, s', terminal] of 2 + 1 + 1 + 2 + 1 columns: the reward is N(shift, 1), s' - s is N(0, step^2)."""
    rng = np.random.default_rng(seed)
    s, a, r = rng.standard_normal((n, 2)), rng.uniform(-1, 1, (n, 1)), rng.normal(shift, 1, (n, 1))
    following = s + step * rng.standard_normal((n, 2)) * (1, 0)
    return np.concatenate([s, a, r, following, np.zeros((n, 1))], 1).astype(np.float32)


def test_rows_are_told_apart_as_well_as_can_be() -> None:
    """By the area that the likelihood ratio has, up to 4 standard errors and what trees lose, of alike rows half.

    Two normal distributions a shift apart: Phi(shift / sqrt 2). Changes s' - s of deviations 1 : 2, whose columns alone
    are nearly the same: 2/pi atan 2, as the smaller |s' - s| is the likelier side's.
    """
    from scipy.stats import norm

    n = 20_000
    error = 4 * np.sqrt((n + 1) / (12 * (n / 2) ** 2))  # half of the rows are judged
    fresh = rows_of(n, 0)
    alike, tells = told_apart(rows_of(n, 1), fresh, 2, 1, 0)
    assert alike == pytest.approx(0.5, abs=error)
    assert not tells.any()
    shifted, tells = told_apart(rows_of(n, 1, shift=1.0), fresh, 2, 1, 0)
    assert shifted == pytest.approx(norm.cdf(1 / np.sqrt(2)), abs=error + 0.01)
    assert int(np.argmax(tells)) == 3
    assert tells[3] == pytest.approx(shifted - 0.5, abs=0.1)  # without it nothing is left
    changed, tells = told_apart(rows_of(n, 1, step=0.2), fresh, 2, 1, 0)
    assert changed == pytest.approx(2 / np.pi * np.arctan(2), abs=error + 0.02)
    assert set(np.argsort(-tells)[:2].tolist()) == {0, 4}  # s and s' of the first column
    assert not told_apart(rows_of(n, 1, shift=1.0), fresh, 2, 1, 0, columns=False)[1].any()


@pytest.mark.parametrize(("rows", "measured"), [(FEWEST - 1, False), (FEWEST, True)])
def test_few_rows_are_not_said_to_be_alike(rows: int, measured: bool) -> None:
    """Rows that have nothing in common are found, or not measured."""
    fresh = rows_of(rows, 0)
    told, tells = told_apart(fresh + 100, fresh, 2, 1, 0)
    assert told == (1.0 if measured else pytest.approx(np.nan, nan_ok=True))
    assert not tells.any() or measured
