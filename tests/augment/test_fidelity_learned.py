"""Verdicts as laws: sound rows are never accused, broken ones always, by the name of what is wrong with them."""

import math

import numpy as np
import pytest
from fidelity import FAULTS, Data, pendulum, report_on

from diffrl.augment.fidelity.learned import FEWEST, Floats, Slope, learned_error
from diffrl.augment.fidelity.verdicts import findings, lacking, look_first, uselessness, verdict_of
from diffrl.data.fidelity import LOOK_FIRST, NO_FAULT, USELESS

SIZES = (1_000, 300, 700)
"""Training, held-out and synthetic rows."""
NAMES = {
    "actions of other rows": "ctions do not lead to their next states",
    "rewards of other rows": "ewards are not those of their states and actions",
    "s' of other rows": "next states",
    "s' = s": "next states are not those of their states",
}
"""What each fault is called, in the overall line."""
WORLDS = [(0.0, False), (1.0, False), (0.0, True), (1.0, True)]
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))]


@pytest.fixture(scope="module")
def worlds() -> dict[tuple[float, bool, int], Data]:
    return {}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("noise", "controlled"), WORLDS, ids=["random", "noisy", "controlled", "controlled, noisy"])
def test_sound_rows_are_never_accused_and_broken_ones_always(
    worlds: dict[tuple[float, bool, int], Data], noise: float, controlled: bool, fault: str, seed: int
) -> None:
    """Of a deterministic world and a noisy one, under random actions and such as follow from the state."""
    key = (noise, controlled, seed)
    if key not in worlds:
        worlds[key] = pendulum(seed, sum(SIZES), noise, controlled)
    report = report_on(worlds[key], fault, seed, SIZES)
    verdict = verdict_of(report)
    if fault == "sound":
        assert verdict.word == NO_FAULT, verdict.sentence
        assert findings(report) == []
    else:
        assert verdict.word == USELESS, verdict.sentence
        assert NAMES[fault] in verdict.sentence
    assert verdict.sentence.endswith("(Dynamics: by a regressor fitted on real rows, not by a simulator.)")
    assert "Not measured by a simulator: none is known" in report.verdicts["dynamics"]


@pytest.mark.parametrize("seed", SEEDS)
def test_another_recording_of_the_same_policy_is_sound(seed: int) -> None:
    """Of other episodes, which training and held-out rows have nothing of."""
    train, other = (pendulum(start, sum(SIZES), 0.0, False).rows for start in (seed, seed + 100))
    data = Data(np.concatenate([train[: sum(SIZES[:2])], other[: SIZES[2]]]), 3, 1, (-2, 2))
    report = report_on(data, "sound", seed, SIZES)
    assert uselessness(report) == []
    assert all("states" not in text and "rewards" not in text for text in look_first(report))


def linear(n: int, seed: int, noise: float) -> Floats:
    """Rows [s, a, r, s', terminal] with s' = s + a / 2 + noise and r = s: two columns of state, two of action."""
    rng = np.random.default_rng(seed)
    s, a = rng.standard_normal((n, 2)), rng.uniform(-1, 1, (n, 2))
    following = s + a / 2 + noise * rng.standard_normal((n, 2))
    return np.concatenate([s, a, s[:, :1], following, np.zeros((n, 1))], 1).astype(np.float32)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_slope_is_the_share_of_rows_whose_actions_count(share: float) -> None:
    """Whatever noise is on s'. Of the other rows actions are shuffled; within four standard errors."""
    fit, fresh, made = (linear(n, seed, 0.3) for n, seed in ((2_000, 0), (1_500, 1), (1_500, 2)))
    kept = round(share * len(made))
    made[kept:, 2:4] = np.random.default_rng(3).permutation(made[kept:, 2:4])
    found = learned_error(fit, made, fresh, 2, 2, 0)
    assert found is not None
    (acts, real), (pays, _) = found.acts, found.pays
    assert real.value == pytest.approx(1, abs=4 * real.error + 0.05)
    assert acts.value == pytest.approx(share, abs=4 * acts.error + 0.05)
    assert pays.value == pytest.approx(1, abs=0.05)
    assert found.within == pytest.approx((0.95, 0.95), abs=0.03)


def test_what_lies_beyond_its_reach_is_not_judged() -> None:
    """Rows far from all that it was fitted on: it would extrapolate."""
    fit, fresh, made = (linear(n, seed, 0.0) for n, seed in ((1_000, 0), (500, 1), (500, 2)))
    made[:, 0] += 100
    made[:, 5] += 100
    found = learned_error(fit, made, fresh, 2, 2, 0)
    assert found is not None
    assert found.within.synthetic == 0
    assert math.isnan(found.following.synthetic)
    assert math.isnan(found.acts[0].value)


def test_few_rows_are_not_asked_about() -> None:
    fit, fresh = linear(500, 0, 0.0), linear(FEWEST - 1, 1, 0.0)
    assert learned_error(fit, fit, fresh, 2, 2, 0) is None
    assert learned_error(fit, fresh, fit, 2, 2, 0) is None


@pytest.mark.parametrize(
    ("made", "real", "lacks"),
    [
        (Slope(0.1, 0.05), Slope(1.0, 0.05), True),
        (Slope(0.9, 0.01), Slope(1.0, 0.01), False),  # surely less, but enough
        (Slope(0.1, 0.3), Slope(1.0, 0.05), False),  # perhaps
        (Slope(0.0, 0.01), Slope(0.1, 0.1), False),  # real rows have nothing of it
        (Slope(math.nan, math.nan), Slope(math.nan, math.nan), False),
    ],
)
def test_rows_lack_what_is_foretold_where_that_is_sure(made: Slope, real: Slope, lacks: bool) -> None:
    assert lacking(made, real, 0.5) == lacks


def test_rows_elsewhere_are_to_be_looked_at(worlds: dict[tuple[float, bool, int], Data]) -> None:
    """Real steps from states that the data hardly have: none of them is wrong."""
    data = pendulum(0, 6_000, 0.0, False)
    slow = np.abs(data.rows[:, 2]) < np.quantile(np.abs(data.rows[:, 2]), 0.4)
    rows = np.concatenate([data.rows[slow][:1_300], data.rows[~slow][:700]])
    report = report_on(data._replace(rows=rows), "sound", 0, SIZES)
    assert verdict_of(report).word != NO_FAULT
    assert any("of states are where real ones are" in text for text in look_first(report))
    assert not any("do not lead" in text for text in uselessness(report))
    assert LOOK_FIRST != USELESS
