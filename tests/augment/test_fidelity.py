"""The report says of each broken data set what is wrong with it, and of real rows that nothing is."""

import base64
import html
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pytest
from PIL import Image

from diffrl.augment.fidelity.comparison import LEGEND, FidelityReport, fidelity, table_of
from diffrl.augment.fidelity.measures import Neighbours, Pair
from diffrl.augment.fidelity.report import page, write_report
from diffrl.augment.fidelity.verdicts import advice, look_first, uselessness
from diffrl.commands.data_tables import ranges
from diffrl.data.offline import STAND_IN, OfflineDataset
from diffrl.support.errors import DataError, UserError
from envs.dynamics import Dynamics, dynamics_for


def take(dataset: OfflineDataset, rows: Any) -> OfflineDataset:
    """Rows as transitions, each an episode of its own, as synthetic data are."""
    following = dataset.next_observations
    terminals = dataset.terminals[rows]
    columns = (dataset.observations[rows], dataset.actions[rows], dataset.rewards[rows], terminals, ~terminals)
    return OfflineDataset(*columns, next_observations=None if following is None else following[rows])


class Parts(NamedTuple):
    """Real rows, in random order."""

    train: OfflineDataset
    held_out: OfflineDataset
    fresh: OfflineDataset
    """Real rows in neither: a perfect model's."""
    episodes: OfflineDataset
    """All rows as collected, next observations not stored."""


@pytest.fixture(scope="module")
def parts() -> Parts:
    """6,000 steps of a Hopper that acts at random, about 280 episodes."""
    env, rng = gymnasium.make("Hopper-v5"), np.random.default_rng(0)
    observation, _ = env.reset(seed=0)
    rows = []
    for _ in range(6000):
        action = rng.uniform(-1, 1, 3).astype(np.float32)
        following, received, terminal, cut, _ = env.step(action)
        rows.append((observation, action, received, terminal, cut, following))
        observation = env.reset()[0] if terminal or cut else following
    s, a, r, ends, cuts, successors = (np.array(column) for column in zip(*rows, strict=True))
    stored = OfflineDataset(s.astype(np.float32), a, r.astype(np.float32), ends, cuts, successors.astype(np.float32))
    order = rng.permutation(6000)
    split = [take(stored, order[start : start + 2000]) for start in (0, 2000, 4000)]
    return Parts(*split, episodes=replace(stored, next_observations=None))


@pytest.fixture(scope="module")
def dynamics() -> Dynamics:
    found = dynamics_for("Hopper-v5")
    assert found is not None
    return found


@pytest.fixture(scope="module")
def at_floor(parts: Parts, dynamics: Dynamics) -> FidelityReport:
    return fidelity(parts.train, parts.fresh, parts.held_out, dynamics=dynamics)


def noise_like(dataset: OfflineDataset, rng: np.random.Generator) -> OfflineDataset:
    """What an untrained model makes: independent Gaussians, here of twice the data's deviation; no row ends."""

    def gaussian(x: np.ndarray) -> np.ndarray:
        drawn: np.ndarray = x.mean(0) + 2 * x.std(0) * rng.standard_normal(x.shape)
        return drawn.astype(np.float32)

    assert dataset.next_observations is not None
    none = np.zeros(len(dataset), bool)
    columns = (gaussian(x) for x in (dataset.observations, dataset.actions, dataset.rewards))
    return OfflineDataset(*columns, none, ~none, gaussian(dataset.next_observations))


def excess(pair: Pair) -> float:
    """How many times its floor a measure is."""
    return pair.synthetic / pair.real


# --- what the report says ------------------------------------------------------------------------------------------


def test_real_rows_are_at_the_floor(at_floor: FidelityReport) -> None:
    """Over 30 splits: KS .7 to 1.5 times the floor, correlations .7 to 1.4, W2 .8 to 1.3, nearer rows .6 to 1.5 %."""
    report = at_floor
    for pair in (report.ks_mean, report.ks_largest, report.correlation_mean, report.sliced_w2):
        assert 1 / 2 < excess(pair) < 2
    assert report.told_apart == pytest.approx((0.5, 0.5), abs=4 * np.sqrt(1 / 12 / 500))  # of 1,000 rows a side
    assert report.neighbours.closer < 0.03
    assert excess(report.neighbours.median) == pytest.approx(1, abs=0.1)
    assert report.actions_outside == (0, 0)
    steps = report.dynamics
    assert steps is not None
    assert steps.high.synthetic < 1e-5
    assert steps.reward.synthetic < 1e-5
    assert steps.terminal == (0, 0)
    assert steps.standing_still > 0.05
    assert "No sign of memorisation" in report.verdicts["nearest_neighbour"]
    assert "within 1.5x of the real-against-real floor" in report.verdicts["sliced_w2"]


@pytest.mark.parametrize(("times", "said"), [(1.9, "within 2x"), (2.1, "2.1x"), (4.0, "4.0x"), (31.0, "31x")])
def test_a_measure_is_within_its_floor_where_there_is_no_need_to_look(
    at_floor: FidelityReport, times: float, said: str
) -> None:
    report = replace(at_floor, sliced_w2=Pair(times, 1.0))
    assert f"The distance is {said} " in report.verdicts["sliced_w2"]
    assert (f"sliced W2 {said} the floor" in look_first(report)) == (times > 2)


def test_shuffled_successors_fail_jointly_and_in_the_simulator_alone(
    parts: Parts, dynamics: Dynamics, at_floor: FidelityReport
) -> None:
    order = np.random.default_rng(1).permutation(len(parts.fresh))
    assert parts.fresh.next_observations is not None
    shuffled = replace(parts.fresh, next_observations=parts.fresh.next_observations[order])
    report = fidelity(parts.train, shuffled, parts.held_out, dynamics=dynamics)
    assert report.ks == pytest.approx(at_floor.ks)
    assert excess(report.correlation_mean) > 4
    assert report.correlation_largest.synthetic > 0.8  # s and s' of a position hardly differ
    told = "told from real rows in 100% of pairs"
    assert (told in look_first(report), told in look_first(replace(report, steered=True))) == (True, False)
    assert told not in look_first(replace(report, told_apart=Pair(1.0, 0.9)))  # real rows are told apart as well
    assert excess(report.sliced_w2) > 2
    steps = report.dynamics
    assert steps is not None
    assert steps.median.synthetic > 3 * steps.standing_still
    assert steps.median.real < 1e-5
    assert steps.reward.synthetic < 1e-5  # r still goes with s and a


def test_an_untrained_model_fails_everywhere(parts: Parts, dynamics: Dynamics) -> None:
    report = fidelity(parts.train, noise_like(parts.train, np.random.default_rng(1)), parts.held_out, dynamics=dynamics)
    for pair in (report.ks_mean, report.ks_largest, report.correlation_mean, report.sliced_w2):
        assert excess(pair) > 4
    assert excess(report.neighbours.median) > 3
    assert report.neighbours.closer == 0
    assert report.actions_outside.synthetic > 0.5
    assert report.terminal_rate.synthetic == 0
    assert report.terminal_rate.real > 0.02
    steps = report.dynamics
    assert steps is not None
    assert steps.median.synthetic > 3 * steps.standing_still
    assert steps.reward.synthetic > 0.1
    assert steps.terminal.synthetic > 0.1  # it falls outright, and no row says so
    said = report.verdicts["overall"]
    faults = (  # all of them, the worst first
        "Do not train on these rows. Far from the training rows",
        "does not obey the simulator: s' off by",
        "standard deviations of the data, where a step changes it by",
        "Another distribution: the rows are not spread as the data are (sliced W2",
        "told from real rows in 100% of pairs",
        "0.00% terminal rows instead of",
        "actions outside their bounds in",
        "(Dynamics: by the simulator.)",
    )
    assert sorted(map(said.find, faults)) == [said.find(fault) for fault in faults]
    assert said.startswith(faults[0])


def table(dataset: OfflineDataset) -> np.ndarray:
    """[s, a, r, s', terminal] (n, W)."""
    following, terminals = dataset.next_observations, dataset.terminals[:, None]
    assert following is not None
    return np.concatenate(
        [dataset.observations, dataset.actions, dataset.rewards[:, None], following, terminals], 1, dtype=np.float32
    )


def from_table(rows: np.ndarray) -> OfflineDataset:
    """The inverse, of Hopper's columns."""
    rows = rows.astype(np.float32)
    ends = rows[:, -1] > 0.5
    return OfflineDataset(rows[:, :11], rows[:, 11:14], rows[:, 14], ends, ~ends, rows[:, 15:-1])


def of_one_covariance(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian rows with the mean and the covariance of others."""
    values, vectors = np.linalg.eigh(np.cov(rows.T))
    noise: np.ndarray = rng.standard_normal(rows.shape) * np.sqrt(values.clip(0)) @ vectors.T
    return rows.mean(0) + noise


USELESS: dict[str, tuple[Callable[[np.ndarray, np.random.Generator], np.ndarray], str]] = {
    "one row, the mean": (lambda rows, rng: np.repeat(rows.mean(0, keepdims=True), 500, 0), "Collapsed"),
    "one row of the data": (lambda rows, rng: rows[np.zeros(500, int)], "Collapsed.*100% are copies"),
    "ten rows": (lambda rows, rng: rows[rng.integers(10, size=1000)], "Collapsed.*100% are copies"),
    "around the mean": (
        lambda rows, rng: rows.mean(0) + 0.02 * rows.std(0) * rng.standard_normal(rows.shape),
        "Collapsed",
    ),
    "wide Gaussians": (
        lambda rows, rng: rows.mean(0) + 2 * rows.std(0) * rng.standard_normal(rows.shape),
        "Far from the training rows",
    ),
    "standard Gaussians": (lambda rows, rng: rng.standard_normal(rows.shape), "Far from "),
    "Gaussians of the data's covariance": (of_one_covariance, ".*Another distribution: .*sliced W2"),
    "the right columns, by themselves": (lambda rows, rng: rng.permuted(rows, axis=0), "Far from "),
    "copies": (lambda rows, rng: rows, "Copies"),
    "copies of a half": (lambda rows, rng: rows[::2], "Copies"),
}


QUICK = ("ten rows", "wide Gaussians", "Gaussians of the data's covariance", "copies of a half")
"""Of the fast tier: one of each fault."""


@pytest.mark.long
@pytest.mark.parametrize(
    ("make", "says"),
    [pytest.param(*case, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, case in USELESS.items()],
)
def test_useless_rows_are_called_what_they_are(parts: Parts, make: Any, says: str, tmp_path: Path) -> None:
    """And in no sentence is there anything to be reassured by."""
    made = from_table(make(table(parts.train).astype(np.float64), np.random.default_rng(1)))
    report = fidelity(parts.train, made, parts.held_out, dynamics=None)
    assert re.match(f"Do not train on these rows. {says}", report.verdicts["overall"])
    assert next(iter(report.verdicts)) == "overall"
    if says.startswith("Far"):
        assert "No sign of memorisation" not in report.verdicts["nearest_neighbour"]
    assert report.verdicts["overall"] in html.unescape(page(report, b"", "useless"))


def test_no_row_of_the_table_contradicts_the_verdict(at_floor: FidelityReport) -> None:
    """Nearer to shuffled columns than to real rows, and yet within twice the floor: no words of comfort."""
    report = replace(at_floor, sliced_w2=Pair(1.9, 1.0), shuffled_w2=2.6)
    assert report.verdicts["overall"].startswith("Do not train on these rows. Another distribution")
    assert "within" not in report.verdicts["sliced_w2"]
    assert (
        "1.9, is nearer to that of shuffled columns, 2.6, than to the real-against-real floor, 1."
        in (report.verdicts["sliced_w2"])
    )
    collapsed = replace(at_floor, variety=Pair(0.1, 1.0))
    assert collapsed.verdicts["variety"].endswith("a real row's 1: rows are nearly the same.")


def test_the_verdict_stands_before_the_table_and_is_no_measures_words(at_floor: FidelityReport) -> None:
    text = html.unescape(page(at_floor, b"", "rows"))
    before, table, after = text.partition("<table>")
    verdict = at_floor.verdicts["overall"]
    assert f'<p class="verdict none">{verdict}</p>' in before
    assert table
    assert verdict not in after


@pytest.mark.long
@pytest.mark.parametrize("kind", [pytest.param("many", marks=pytest.mark.slow), "few", "noisy"])
def test_rows_that_are_good_or_nearly_so_are_not_called_useless(parts: Parts, kind: str) -> None:
    """Real rows, many and few, and with a fiftieth of each column's deviation of noise added."""
    made = take(parts.fresh, slice(100)) if kind == "few" else parts.fresh
    if kind == "noisy":
        rows = table(parts.fresh)
        made = from_table(rows + 0.02 * rows.std(0) * np.random.default_rng(1).standard_normal(rows.shape))
    for held_out in (parts.held_out, None):
        report = fidelity(parts.train, made, held_out, dynamics=None)
        assert uselessness(report) == []
        assert "Do not train" not in report.verdicts["overall"]
    if kind == "many":
        assert report.verdicts["overall"].startswith("No fault found in 1,0")


@pytest.mark.long
def test_rows_that_are_steered_may_differ_but_not_be_noise(parts: Parts) -> None:
    """Real rows of the lowest tenth of s_1 alone: another distribution, near the data; and wide Gaussians."""
    rows = table(parts.fresh)
    part = from_table(rows[rows[:, 0] < np.quantile(rows[:, 0], 0.1)])
    noise = noise_like(parts.train, np.random.default_rng(1))
    found = [
        " ".join(uselessness(fidelity(parts.train, made, parts.held_out, dynamics=None, steered=steered)))
        for made in (part, noise)
        for steered in (False, True)
    ]
    assert [re.split("[:,]", text)[0] for text in found] == [
        "Another distribution",
        "",
        *["Far from the training rows"] * 2,
    ]


def test_real_rows_leave_nothing_to_look_at_first(parts: Parts, dynamics: Dynamics) -> None:
    assert look_first(fidelity(parts.train, parts.fresh, parts.held_out, dynamics=dynamics)) == []
    copies = fidelity(parts.train, parts.train, parts.held_out, dynamics=dynamics)
    assert uselessness(copies) == ["Copies: 100% of the rows are training rows again, and add nothing to them"]
    assert look_first(copies) == []
    assert advice(copies) == "Fewer --steps, a smaller --width or more data usually help."


@pytest.mark.long
def test_only_options_that_the_method_has_are_advised(parts: Parts) -> None:
    copies = fidelity(parts.train, parts.train, parts.held_out, dynamics=None)
    noise = replace(parts.fresh, rewards=np.flip(parts.fresh.rewards).copy())
    odd = fidelity(parts.train, noise, parts.held_out, dynamics=None)
    for options, less, more in (
        (["steps"], "Fewer --steps or more data usually help.", "More --steps usually helps."),
        (["width", "samples"], "A smaller --width or more data usually help.", "More --width usually helps."),
        ([], "More data usually helps.", ""),
    ):
        assert advice(copies, options) == less
        assert advice(odd, options) == more
    assert advice(odd) == "More --steps or --width usually helps."


@pytest.mark.long
@pytest.mark.parametrize("with_held_out", [True, False])
def test_copies_of_training_rows_are_memorised_and_otherwise_perfect(parts: Parts, with_held_out: bool) -> None:
    held_out = parts.held_out if with_held_out else None
    report = fidelity(parts.train, take(parts.train, slice(1000)), held_out, dynamics=None)
    assert report.neighbours.closer == 1
    assert report.neighbours.median.synthetic == 0
    assert report.neighbours.median.real > 0
    assert excess(report.ks_mean) < 2
    assert "memorised" in report.verdicts["nearest_neighbour"]
    assert "Not measured" in report.verdicts["dynamics"]


def test_without_held_out_rows_halves_of_the_training_rows_are_the_floor(parts: Parts) -> None:
    report = fidelity(parts.train, parts.fresh, None, dynamics=None)
    assert "half" in report.floor
    assert report.rows == 1000
    assert excess(report.sliced_w2) < 2
    assert report.neighbours.closer < 0.03


def test_a_wrong_reward_is_seen_by_its_column_and_the_simulator(parts: Parts, dynamics: Dynamics) -> None:
    """All of its other columns stay at their floors."""
    wrong = replace(parts.fresh, rewards=parts.fresh.rewards + 5)
    report = fidelity(parts.train, wrong, parts.held_out, dynamics=dynamics)
    r = report.names.index("r")
    assert report.ks[r] > 0.9
    assert np.delete(report.ks, r).max() < 0.1
    assert report.dynamics is not None
    assert report.dynamics.reward.synthetic == pytest.approx(5, abs=1e-3)
    assert report.dynamics.high.synthetic < 1e-5


@pytest.mark.long
def test_another_simulator_is_told_from_another_model(parts: Parts) -> None:
    """Real rows that miss the simulator by much were made by another."""
    heavy = dynamics_for("Hopper-v5", frame_skip=8)
    report = fidelity(parts.train, parts.fresh, parts.held_out, dynamics=heavy)
    assert "not the simulator they come from" in report.verdicts["dynamics"]
    assert report.learned is not None  # which stands in for it


@pytest.mark.long
def test_rewards_that_are_not_the_simulators_are_judged_all_the_same(parts: Parts, dynamics: Dynamics) -> None:
    """As of data with scaled rewards: by a regressor, next states and ends by the simulator."""
    train, held_out, fresh = (
        replace(side, rewards=side.rewards * 0.1 - 1) for side in (parts.train, parts.held_out, parts.fresh)
    )
    sound = fidelity(train, fresh, held_out, dynamics=dynamics)
    assert uselessness(sound) == look_first(sound) == []
    assert "next states and ends by the simulator; rewards by a regressor" in sound.verdicts["overall"]
    wrong = replace(fresh, rewards=np.random.default_rng(0).permutation(fresh.rewards))
    report = fidelity(train, wrong, held_out, dynamics=dynamics)
    assert "Rewards are not those of their states and actions" in report.verdicts["overall"]


def test_rows_that_break_the_simulator_are_useless_wherever_they_are_steered(at_floor: FidelityReport) -> None:
    """By s', by terminals or by rewards; not where the real rows miss it too."""
    assert at_floor.dynamics is not None
    step = at_floor.dynamics.standing_still
    for steered in (False, True):
        for broken, useless in (
            ({"median": Pair(0.6 * step, 1e-8)}, ["does not obey the simulator: s' off by"]),
            ({"median": Pair(0.4 * step, 1e-8)}, []),
            ({"terminal": Pair(0.43, 0.0)}, ["terminal is not the simulator's in 43% of rows"]),
            ({"terminal": Pair(0.43, 0.3)}, []),
            ({"reward": Pair(0.9, 0.0), "other_rewards": 1.0}, ["rewards off by 0.9, where shuffled ones are by 1"]),
            ({"reward": Pair(0.9, 0.5), "other_rewards": 1.0}, []),
        ):
            report = replace(at_floor, steered=steered, dynamics=replace(at_floor.dynamics, **broken))
            found = uselessness(report)
            assert len(found) == len(useless)
            assert all(text.startswith(start) for text, start in zip(found, useless, strict=True))
            assert report.verdicts["overall"].startswith("Do not train") == bool(useless)


def test_rewards_of_other_rows_are_no_rewards(parts: Parts, dynamics: Dynamics, at_floor: FidelityReport) -> None:
    order = np.random.default_rng(1).permutation(len(parts.fresh))
    wrong = replace(parts.fresh, rewards=parts.fresh.rewards[order])
    report = fidelity(parts.train, wrong, parts.held_out, dynamics=dynamics)
    assert report.dynamics is not None
    assert at_floor.dynamics is not None
    assert report.dynamics.reward.synthetic == pytest.approx(at_floor.dynamics.other_rewards, rel=0.2)
    assert any(text.startswith("rewards off by") for text in uselessness(report))


def test_columns_are_beside_their_own_floors(at_floor: FidelityReport) -> None:
    """The worst is the one furthest above its own, not the one of the largest statistic."""
    ks, floor = np.full(len(at_floor.ks), 0.05), np.full(len(at_floor.ks), 0.04)
    ks[3], floor[3] = 0.2, 0.19
    ks[5], floor[5] = 0.18, 0.06
    report = replace(at_floor, ks=ks, ks_floor=floor)
    _, _, said = report.verdicts["marginals"].partition(". ")
    assert said == (
        "The column furthest above its own floor, s[5], is 3.0x the real-against-real floor (0.18 beside 0.06)."
    )
    floor[7], ks[7] = 0.0, 0.02  # a floor by luck: what chance gives stands in for it
    assert replace(at_floor, ks=ks, ks_floor=floor).verdicts["marginals"].endswith(said)


@pytest.mark.parametrize(
    ("bound", "steered", "odd"),
    [
        ((0.09, 0.0), False, True),
        ((0.09, 0.0), True, True),  # none of the data has any
        ((0.04, 0.0), False, False),
        ((0.30, 0.53), False, False),  # as of a model that is sound elsewhere
        ((0.10, 0.53), False, True),
        ((0.10, 0.53), True, False),
        ((0.53, 0.53), False, False),
    ],
)
def test_actions_on_their_bounds_are_told_and_judged(
    at_floor: FidelityReport, bound: tuple[float, float], steered: bool, odd: bool
) -> None:
    report = replace(at_floor, actions_at_bound=Pair(*bound), steered=steered)
    told = f"actions on a bound in {bound[0]:.1%} of rows instead of {bound[1]:.1%}"
    assert (told in look_first(report)) == odd
    assert f"{bound[0]:.2%} of synthetic rows have one exactly on a bound" in report.verdicts["actions"]
    assert report.verdicts["actions"].startswith("Another share at the bounds") == odd
    assert told not in look_first(replace(report, terminal_rows=(10, 10)))  # so few rows accuse nobody


def test_the_line_on_terminals_judges(at_floor: FidelityReport) -> None:
    odd = replace(at_floor, terminal_rate=Pair(0.011, 0.0014), terminal_rows=(6_000, 5_699))
    assert odd.verdicts["terminal_rate"].startswith("Another rate, 7.9x as many: 1.100% of synthetic rows")
    few = replace(odd, terminal_rows=(90, 2_000))
    assert few.verdicts["terminal_rate"].endswith("no more apart than chance sets them.")


def test_all_faults_are_named_the_worst_first(at_floor: FidelityReport) -> None:
    assert at_floor.dynamics is not None
    report = replace(
        at_floor,
        told_apart=Pair(0.99, 0.5),
        terminal_rate=Pair(0.3, 0.04),
        dynamics=replace(at_floor.dynamics, median=Pair(10.0, 1e-8)),
    )
    faults = ["Do not train on these rows. Does not obey", "told from real rows in 99%", "30.00% terminal rows"]
    places = [report.verdicts["overall"].find(fault) for fault in faults]
    assert places == sorted(places)
    assert places[0] == 0


def test_why_no_simulator_is_said_once(parts: Parts) -> None:
    why = "nobody has checked whether the observation of Pusher-v5 gives the simulator's whole state."
    report = fidelity(parts.train, parts.fresh, parts.held_out, dynamics=None, no_simulator=why)
    assert report.verdicts["dynamics"].startswith(f"Not measured by a simulator: {why} The median row's s' is")
    assert report.notes == ()
    assert html.unescape(page(report, b"", "rows")).count(why) == 1


def test_columns_are_called_as_data_info_calls_them(at_floor: FidelityReport, parts: Parts) -> None:
    """s[i] has the range that is printed of observations[i], and so on; the page says which is which."""
    rows = parts.fresh
    assert rows.next_observations is not None
    named = {"s": rows.observations, "a": rows.actions, "s'": rows.next_observations}
    table = table_of(rows, len(rows))
    assert at_floor.names[0] == "s[0]"
    for name, column in zip(at_floor.names, table.T, strict=True):
        letter, _, number = name.rstrip("]").partition("[")
        expected = named[letter][:, int(number)] if number else rows.rewards if letter == "r" else rows.terminals
        assert np.array_equal(column, expected)
    assert html.escape(LEGEND) in page(at_floor, b"", "")
    info = [str(cell) for cell in ranges(rows).columns[0].cells]
    for letter, column in (("s", "observations"), ("a", "actions"), ("s'", "next_observations")):
        assert f"{letter}[0] {'is ' if letter == 's' else ''}{column}[0]" in LEGEND
        assert column.startswith("next") or f"{column}\\[0]" in info


def test_the_tutorial_has_the_sentence_that_is_printed(at_floor: FidelityReport) -> None:
    """But for its numbers, which are of another task."""
    text = (Path(__file__).parents[2] / "docs" / "tutorials" / "augment.md").read_text()
    number = r"\d+(?:\.\d+)?(?:e-\d+)?"
    form = re.sub(number, "#", at_floor.verdicts["dynamics"])
    assert re.sub(number, "#", text).count(form) == 2


@pytest.mark.parametrize(
    ("ends", "rows", "odd"),
    [
        ((72, 7600), (500, 190_000), True),  # 14.4 % and 4 %: however few rows are compared as a whole
        ((4, 40), (10, 1000), True),
        ((1, 40), (10, 1000), False),  # 10 % and 4 %, of ten rows
        ((0, 2), (500, 1000), False),
        ((0, 40), (500, 1000), True),
        ((40, 0), (500, 1000), True),
        ((0, 0), (500, 1000), False),
        ((300, 4000), (5000, 100_000), False),  # rare by chance, and not twice the rate
    ],
)
def test_another_rate_of_terminals_is_looked_at_by_the_rows_it_is_measured_over(
    at_floor: FidelityReport, ends: tuple[int, int], rows: tuple[int, int], odd: bool
) -> None:
    rate = Pair(*(n / whole for n, whole in zip(ends, rows, strict=True)))
    for compared in (90, 20_000):
        found = look_first(replace(at_floor, rows=compared, terminal_rate=rate, terminal_rows=rows))
        assert any("terminal rows instead of" in sentence for sentence in found) == odd


def test_the_rates_of_terminals_are_of_all_rows_that_are_fit(at_floor: FidelityReport, parts: Parts) -> None:
    assert at_floor.terminal_rows == (len(parts.fresh), len(parts.train))
    assert at_floor.to_json()["terminal_rows"] == {"synthetic": len(parts.fresh), "real": len(parts.train)}
    for share, side in zip(at_floor.terminal_rate, (parts.fresh, parts.train), strict=True):
        assert share == pytest.approx(side.terminals.mean())


@pytest.mark.long
def test_what_follows_a_terminal_row_counts_for_nothing_where_it_is_not_stored(
    parts: Parts, dynamics: Dynamics
) -> None:
    """The real file has a stand-in there: whatever the synthetic row holds is neither right nor wrong."""
    assert parts.fresh.next_observations is not None
    reports = []
    for filler in (0.0, 1e3):
        following = parts.fresh.next_observations.copy()
        following[parts.fresh.terminals] = filler
        made = replace(parts.fresh, next_observations=following)
        reports.append(fidelity(parts.episodes, made, None, dynamics=dynamics))
    first, second = reports
    assert first.to_json() == second.to_json()
    assert first.terminal_rate.synthetic > 0.02
    assert excess(first.ks_largest) < 2
    assert any("terminal" in note for note in first.notes)
    assert first.dynamics is not None
    assert first.dynamics.high.synthetic < 1e-5
    assert first.dynamics.terminal == (0, 0)
    assert first.neighbours.closer > 0.99  # all but one are rows of the real file


def test_stand_ins_that_are_stored_can_be_named(parts: Parts, dynamics: Dynamics) -> None:
    """Rows taken from such a file, with their stand-ins: unnamed they are errors of the simulator."""
    real, made = (
        replace(side, next_observations=np.where(side.terminals[:, None], 0, side.next_observations))
        for side in (parts.train, parts.fresh)
    )
    about = {"terminal_successors": STAND_IN}
    named, unnamed = (fidelity(replace(real, metadata=known), made, None, dynamics=dynamics) for known in (about, {}))
    assert named.dynamics is not None
    assert unnamed.dynamics is not None
    assert named.dynamics.real.max() < 1e-4
    assert unnamed.dynamics.real.max() > 1


def test_actions_are_counted_against_their_bounds(parts: Parts) -> None:
    actions = np.zeros_like(parts.fresh.actions)
    actions[:100, 1] = 2
    actions[:50, 0] = 2.5
    actions[100:500, 2] = -1.5
    made = replace(parts.fresh, actions=actions)
    report = fidelity(parts.train, made, None, dynamics=None, action_bounds=([-1, -1, -1.5], 2))
    assert report.actions_outside.synthetic == 50 / 2000
    assert report.actions_at_bound.synthetic == 450 / 2000


def test_rows_that_are_not_finite_are_left_out_and_counted(parts: Parts) -> None:
    rewards = parts.fresh.rewards.copy()
    rewards[:7] = np.nan
    report = fidelity(parts.train, replace(parts.fresh, rewards=rewards), parts.held_out, dynamics=None)
    assert report.rows == 1993
    assert report.notes == ("7 synthetic rows hold values that are not finite, and are left out.",)


@pytest.mark.long
def test_one_seed_gives_one_report(parts: Parts) -> None:
    first, second, other = (
        fidelity(parts.train, parts.fresh, parts.held_out, dynamics=None, seed=seed, rows=500).to_json()
        for seed in (0, 0, 1)
    )
    assert first == second
    assert first["rows"] == 500
    assert first["sliced_w2"] != other["sliced_w2"]


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (lambda d: replace(d, actions=d.actions[:, :2]), DataError, r"\(11, 2\).*\(11, 3\)"),
        (lambda d: take(d, slice(3)), DataError, "Only 3 synthetic rows"),
        (lambda d: replace(d, rewards=d.rewards[:5]), DataError, "synthetic rows: rewards: 5 rows; expected 2,000"),
    ],
)
def test_unfit_data_are_named(
    parts: Parts, spoil: Callable[[OfflineDataset], OfflineDataset], error: type[UserError], says: str
) -> None:
    with pytest.raises(error, match=says):
        fidelity(parts.train, spoil(parts.fresh), None, dynamics=None)


# --- the files -----------------------------------------------------------------------------------------------------


class Sources(HTMLParser):
    """What a page loads, and its text; raises AssertionError where tags do not close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for key, value in attributes if key in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_holds_its_picture(at_floor: FidelityReport, parts: Parts, tmp_path: Path) -> None:
    title = "hopper <medium> & 'more'"
    written = write_report(at_floor, parts.train, parts.fresh, tmp_path / "new", title)
    assert [path.name for path in written] == ["fidelity.json", "fidelity.png", "fidelity.html"]
    assert sorted(tmp_path.joinpath("new").iterdir()) == sorted(written)
    content = json.loads(written[0].read_text())
    assert content.pop("title") == title
    assert content == at_floor.to_json()
    with Image.open(written[1]) as image:
        assert image.width == 1800
    page = Sources()
    page.feed(written[2].read_text(encoding="utf-8"))
    assert page.open == []
    (source,) = page.sources
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == written[1].read_bytes()
    assert title in page.text
    for verdict in at_floor.verdicts.values():
        assert verdict in page.text


def test_a_report_without_a_simulator_or_spread_is_drawn_too(parts: Parts, tmp_path: Path) -> None:
    """A constant column, and a model that makes one row: no figure is NaN, and JSON holds them all."""
    real = replace(parts.train, observations=parts.train.observations * (np.arange(11) > 0).astype(np.float32))
    made = take(real, np.zeros(50, int))
    report = fidelity(real, made, None, dynamics=None)
    assert report.correlations[0, 1] == 0
    written = write_report(report, real, made, tmp_path, "constant")
    assert "NaN" not in written[0].read_text()
    assert report.neighbours.closer == 1


@pytest.mark.parametrize(
    ("closer", "usual", "copied"),
    [(0.6, 0.6, 0.0), (0.8, 0.6, 0.5), (1.0, 0.6, 1.0), (0.3, 0.6, 0.0), (0.505, 0.01, 0.5)],
)
def test_copies_are_what_is_nearer_than_is_usual_of_what_need_not_be(
    closer: float, usual: float, copied: float
) -> None:
    """Data that repeat 60 % of their rows have as many of a sound model's; where 80 % are, half of the others copy."""
    side, pair = np.zeros(1_000), Pair(0.0, 0.0)
    near = Neighbours(side, side, median=pair, low=pair, closer=closer, usual=usual, shuffled=1.0)
    assert near.copied == pytest.approx(copied)
