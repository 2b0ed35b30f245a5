"""Verdicts as laws: sound rows are never accused, broken ones always, by the name of what is wrong with them."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fidelity import FAULTS, Data, as_rows, ending, faults_of, pendulum, report_on
from scipy.stats import norm

from diffrl.augment.fidelity.learned import FEWEST, NEAR, REACH, Floats, Slope, learned_error
from diffrl.augment.fidelity.measures import Pair
from diffrl.augment.fidelity.verdicts import (
    findings,
    following,
    lacking,
    look_first,
    measured_by,
    uselessness,
    verdict_of,
)
from diffrl.augment.synther.augmenter import synther
from diffrl.augment.synther.config import Sampling, SynthERConfig
from diffrl.data import d4rl
from diffrl.data.fidelity import LOOK_FIRST, NO_FAULT, USELESS, Verdict

SIZES = (1_000, 500, 1_000)
"""Training, held-out and synthetic rows."""
NAMES = {
    "actions of other rows": "ctions do not lead to their next states",
    "rewards of other rows": "ewards are not those of their states and actions",
    "s' of other rows": "ext states",
    "s' = s": "ext states are not those of their states",
}
"""What each fault is called, in the overall line."""
WORLDS = [(0.0, False), (1.0, False), (0.0, True), (1.0, True)]
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))]


@pytest.fixture(scope="module")
def worlds() -> dict[tuple[float, bool, int], Data]:
    return {}


@pytest.mark.long
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", list(FAULTS)[:-1])
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
    assert "(Dynamics: by a regressor fitted on real rows, not by a simulator" in verdict.sentence
    # Rows in which nothing follows from actions hardly show whether something surely lacks.
    assert fault in ("s' of other rows", "s' = s") or "not to be told" not in verdict.sentence
    assert "Not measured by a simulator: none is known" in report.verdicts["dynamics"]


@pytest.mark.parametrize("seed", SEEDS)
def test_another_recording_of_the_same_policy_is_sound(seed: int) -> None:
    """Its dynamics are: of other episodes, which are few, and so another distribution."""
    train, other = (pendulum(start, sum(SIZES), 0.0, False).rows for start in (seed, seed + 100))
    data = Data(np.concatenate([train[: sum(SIZES[:2])], other[: SIZES[2]]]), 3, 1, (-2, 2))
    report = report_on(data, "sound", seed, SIZES)
    found = [finding.text for finding in findings(report) if finding.measure == "dynamics"]
    assert found == []
    assert report.learned is not None
    assert report.learned.acts[0].value == pytest.approx(1, abs=0.05)


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
    assert found.within.synthetic == pytest.approx(found.within.real, abs=0.03)
    assert found.within.real >= REACH


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


@pytest.mark.parametrize(("off", "within"), [(0.5 * NEAR, 1.0), (4 * NEAR, 0.0)])
def test_dense_real_rows_reach_a_little_further_than_they_lie(off: float, within: float) -> None:
    """As on a limit cycle, where no model meets the real states as closely as they meet each other."""
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, 3_000)
    s, a = np.stack([np.cos(angle), np.sin(angle)], 1), rng.uniform(-1, 1, (3_000, 2))
    rows = np.concatenate([s, a, s[:, :1], s + a / 2, np.zeros((3_000, 1))], 1).astype(np.float32)
    made = rows[2_500:].copy()
    made[:, :2] *= 1 + off * np.sqrt(2) / np.linalg.norm(s[2_500:] / s.std(0), axis=1, keepdims=True)
    found = learned_error(rows[:2_000], made, rows[2_000:2_500], 2, 2, 0)
    assert found is not None
    assert found.within == pytest.approx((within, 1.0), abs=0.02)


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
        (Slope(1.04, 0.05), Slope(3.93, 0.1), False),  # real rows have more than all by luck
        (Slope(math.nan, math.nan), Slope(math.nan, math.nan), False),
    ],
)
def test_rows_lack_what_is_foretold_where_that_is_sure(made: Slope, real: Slope, lacks: bool) -> None:
    assert lacking(made, real, 0.5) == lacks


def sparse(n: int, rng: np.random.Generator, share: float) -> Floats:
    """Rows of a linear world whose reward is 1 in a share of states, and 0 elsewhere."""
    s, a = rng.standard_normal((n, 4)), rng.uniform(-1, 1, (n, 2))
    paid = (s[:, 0] + 0.3 * s[:, 1]) / np.sqrt(1.09) > norm.isf(share)
    return np.concatenate([s, a, paid[:, None], s + 0.3 * np.tile(a, 2), np.zeros((n, 1))], 1).astype(np.float32)


@pytest.mark.long
@pytest.mark.parametrize(("share", "seed"), [(0.01, 0), (0.01, 12), (0.01, 14), (0.03, 1), (0.03, 2)])
def test_rare_rewards_are_not_accused(share: float, seed: int) -> None:
    """Of two held-out rows with a reward no slope is to be had, however small its standard error."""
    rng = np.random.default_rng(seed)
    fit, fresh, made = (sparse(n, rng, share) for n in (4_000, 200, 2_000))
    learned = learned_error(fit, made, fresh, 4, 2, seed)
    assert learned is not None
    assert following(learned, False) == []


@pytest.mark.long
@pytest.mark.parametrize(("share", "noise"), [(0.15, 0.02), (0.3, 0.05)])
def test_small_errors_of_rare_rewards_are_small(share: float, noise: float) -> None:
    """Beside the median error of 0, they are large."""
    rng = np.random.default_rng(0)
    fit, fresh, made = (sparse(n, rng, share) for n in (4_000, 400, 2_000))
    broken = made.copy()
    broken[:, 6] = rng.permutation(broken[:, 6])
    made[:, 6] += noise * rng.standard_normal(len(made))
    sound, wrong = (learned_error(fit, rows, fresh, 4, 2, 0) for rows in (made, broken))
    assert sound is not None
    assert wrong is not None
    assert following(sound, False) == []
    assert any(finding.useless for finding in following(wrong, False))


def test_errors_are_no_larger_where_chance_makes_them_so() -> None:
    """Of a noisy world few real rows are no floor, unless synthetic rows' errors are surely larger."""
    data = pendulum(0, sum(SIZES), 1.0, False)
    learned = report_on(data, "sound", 0, SIZES).learned
    assert learned is not None
    apart = replace(learned, following=Pair(0.9, 0.4), standing_still=1.0, reward=Pair(0.9, 0.4), other_rewards=1.0)
    assert following(replace(apart, further=3.0, dearer=3.0), False) == []
    assert len(following(replace(apart, further=4.0, dearer=4.0), False)) == 2


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_no_unit_of_measurement_matters(scale: float) -> None:
    """Of a goal, which stays within an episode and is another in the next: a model's error of it is what it is."""
    rng = np.random.default_rng(0)
    goal = scale * rng.standard_normal((3_000, 1))
    rows = linear(3_000, 0, 0.1).astype(np.float64)
    rows = np.concatenate([rows[:, :2], goal, rows[:, 2:7], goal, rows[:, 7:]], 1)
    rows[2_000:, 8] += 0.2 * scale * rng.standard_normal(1_000)
    fit, fresh, made = np.split(rows.astype(np.float32), [1_500, 2_000])
    learned = learned_error(fit, made, fresh, 3, 2, 0)
    assert learned is not None
    assert learned.following.synthetic == pytest.approx(0.85, abs=0.05)


def test_repeated_rows_of_the_data_are_no_copies() -> None:
    """A world of few states: each row was there before, of real rows too."""

    def grid(n: int, seed: int) -> Floats:
        rng = np.random.default_rng(seed)
        s, a = rng.integers(0, 6, (n, 2)), rng.integers(-1, 2, (n, 1))
        rows = [s, a, s[:, :1] == 5, (s + a).clip(0, 5), np.zeros((n, 1))]
        return np.concatenate(rows, 1).astype(np.float32)

    def resting(n: int, seed: int, share: float) -> Floats:
        rows = linear(n, seed, 0.1)
        rows[np.random.default_rng(seed).random(n) < share] = 0
        return rows

    sizes = (4_000, 400, 2_000)
    alike = np.concatenate([grid(n, seed) for seed, n in enumerate(sizes)])
    report = report_on(Data(alike, 2, 1, (-1, 1)), "sound", 0, sizes)
    assert report.neighbours.usual == 1
    assert not any(finding.measure == "nearest_neighbour" for finding in findings(report))
    for share in (0.1, 0.6):
        rows = np.concatenate([resting(n, seed, share) for seed, n in enumerate(sizes)])
        report = report_on(Data(rows, 2, 2, (-1, 1)), "sound", 0, sizes)
        assert verdict_of(report).word == NO_FAULT, verdict_of(report).sentence
        assert report.neighbours.usual == pytest.approx(share, abs=0.1)
        rows[4_400:] = rows[:2_000]  # copies, of the others too
        copies = report_on(Data(rows, 2, 2, (-1, 1)), "sound", 0, sizes)
        assert "Copies: 100%" in verdict_of(copies).sentence


def test_ends_of_other_rows_are_found_without_a_simulator() -> None:
    """Where enough rows end to tell; where too few do, it is said."""
    data = ending(0, sum(SIZES))
    assert faults_of(data) == list(FAULTS)
    assert verdict_of(report_on(data, "sound", 0, SIZES)).word == NO_FAULT
    verdict = verdict_of(report_on(data, "ends of other rows", 0, SIZES))
    assert verdict.word == USELESS
    assert "Ends are not those of their states (" in verdict.sentence
    data.rows[np.random.default_rng(0).random(len(data.rows)) < 0.95, -1] = 0
    assert measured_by(report_on(data, "sound", 0, SIZES)).endswith("; not to be told: ends")
    data.rows[:, -1] = 0
    assert faults_of(data) == list(FAULTS)[:-1]


@pytest.mark.parametrize(("gain", "word"), [(1.0, None), (1.5, LOOK_FIRST), (3.0, USELESS)])
def test_actions_that_do_too_much_are_found(gain: float, word: str | None) -> None:
    fit, fresh, made = (linear(n, seed, 0.1) for n, seed in ((2_000, 0), (1_500, 1), (1_500, 2)))
    made[:, 5:7] += (gain - 1) * made[:, 2:4] / 2
    learned = learned_error(fit, made, fresh, 2, 2, 0)
    assert learned is not None
    found = [finding for finding in following(learned, False) if "ctions do not" in finding.text]
    assert [finding.useless for finding in found] == ([] if word is None else [word == USELESS])


def test_few_held_out_rows_are_a_floor_of_few_rows_no_more() -> None:
    """The regressor's floor is of training rows, too, that it is not fitted on."""
    data = pendulum(0, 2_000, 0.0, False)
    report = report_on(data, "actions of other rows", 0, (950, 50, 1_000))
    assert report.learned is not None
    assert len(report.learned.real) > 200
    assert "Actions do not lead to their next states" in verdict_of(report).sentence


@pytest.mark.parametrize("seed", range(3))
def test_weak_actions_of_other_rows_are_found(seed: int) -> None:
    """An effect of .2 beside noise of 1, with 200 rows held out."""

    def weak(n: int, seed: int) -> Floats:
        rng = np.random.default_rng(seed)
        s, a = rng.standard_normal((n, 3)), rng.uniform(-1, 1, (n, 2))
        following = 0.9 * s + 0.2 * a[:, [0, 1, 0]] + rng.standard_normal((n, 3))
        return np.concatenate([s, a, s[:, :1], following, np.zeros((n, 1))], 1).astype(np.float32)

    sizes = (4_000, 200, 2_000)
    rows = np.concatenate([weak(n, 3 * seed + i) for i, n in enumerate(sizes)])
    report = report_on(Data(rows, 3, 2, (-1, 1)), "actions of other rows", seed, sizes)
    told = "what actions do" not in measured_by(report)
    assert told == ("Actions do not" in verdict_of(report).sentence)


def test_what_real_rows_do_not_show_is_said_not_to_be_told() -> None:
    """Of actions without effect, and of rewards that are all one."""
    rows = linear(3_000, 0, 0.3)
    rows[:, 2:4] = np.random.default_rng(1).uniform(-1, 1, (3_000, 2))
    rows[:, 4] = 0
    report = report_on(Data(rows, 2, 2, (-1, 1)), "sound", 0, SIZES)
    assert measured_by(report).endswith("; not to be told: what actions do, rewards")
    assert "Too little is to be seen to tell of what actions do and rewards." in report.verdicts["dynamics"]
    assert "% of the rewards" not in report.verdicts["dynamics"]
    assert verdict_of(report).word == NO_FAULT


def test_rows_whose_dynamics_nobody_asked_about_are_not_called_faultless() -> None:
    data = pendulum(0, 2_000, 0.0, False)
    report = report_on(data, "sound", 0, (150, 1_000, 80))
    verdict = verdict_of(replace(report, learned=None))
    assert verdict.word != NO_FAULT
    assert "not measured: fewer than 100 rows a side" in verdict.sentence
    assert "fewer than 100 rows a side" in replace(report, learned=None).verdicts["dynamics"]


def test_rows_elsewhere_are_to_be_looked_at() -> None:
    """Real steps from states that the data hardly have: none of them is wrong."""
    data = pendulum(0, 6_000, 0.0, False)
    slow = np.abs(data.rows[:, 2]) < np.quantile(np.abs(data.rows[:, 2]), 0.4)
    rows = np.concatenate([data.rows[slow][:1_500], data.rows[~slow][:1_000]])
    report = report_on(data._replace(rows=rows), "sound", 0, SIZES)
    assert verdict_of(report).word != NO_FAULT
    assert any("of states are near those of the data" in text for text in look_first(report))
    assert not any("do not lead" in text for text in uselessness(report))


def test_steered_rows_may_lie_elsewhere() -> None:
    report = report_on(pendulum(0, sum(SIZES), 0.0, False), "sound", 0, SIZES)
    assert report.learned is not None
    few = replace(report, learned=replace(report.learned, within=Pair(0.2, 0.95)))
    assert look_first(few) == ["20% of states are near those of the data, of unseen real ones 95%"]
    assert look_first(replace(few, steered=True)) == []
    assert "It was asked about the 20% of rows" in few.verdicts["dynamics"]


@pytest.mark.slow
def test_a_model_comes_out_as_it_deserves(tmp_path: Path) -> None:
    """Of ten steps it is useless, at whatever width; of some thousand nothing is wrong but what clipping makes."""
    real = pendulum(0, 4_000, 0.0, False)
    source = d4rl.write(tmp_path / "real.hdf5", as_rows(real.rows, real))

    def verdict(width: int, steps: int) -> Verdict:
        out = tmp_path / f"{width}-{steps}.hdf5"
        model = SynthERConfig(width=width, steps=steps, batch_size=256)
        sampling = Sampling("dpmpp2m", sampling_steps=32)
        synther(str(source), out, env="Pendulum-v1", samples=4_000, model=model, sampling=sampling, quiet=True)
        found = Verdict.of(d4rl.read(out, action_limit=None).metadata)
        assert found is not None
        return found

    for width in (32, 128):
        assert verdict(width, 10).word == USELESS
    trained = verdict(128, 4_000)
    assert trained.word in (NO_FAULT, LOOK_FIRST), trained.sentence
    assert trained.word == NO_FAULT or trained.sentence.startswith("Look first: actions on a bound"), trained.sentence
