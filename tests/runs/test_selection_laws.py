"""Selecting policies, as laws: the bandit, ranks and regret, and fitted Q evaluation of a known decision process."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats

from diffrl.data.offline import OfflineDataset
from diffrl.runs.study.bandit import bandit, play, ucb
from diffrl.runs.study.config import BanditConfig, FQEConfig
from diffrl.runs.study.fqe import Experience, fitted_values, settled, target_rates
from diffrl.runs.study.offline import _unsettled, initial_rows
from diffrl.runs.study.ranking import rank_correlation, regret_at
from diffrl.support.errors import UserError


def episodes(*means: float, n: int = 40, spread: float = 5.0, seed: int = 0) -> list[np.ndarray]:
    g = np.random.default_rng(seed)
    return [mean + spread * g.standard_normal(n + i) for i, mean in enumerate(means)]


# --- The bandit -----------------------------------------------------------------------------------------------------


def test_the_bound_is_its_formula_and_an_arm_without_a_pull_comes_first() -> None:
    found = ucb(np.array([3.0, 1.0, 0.0]), np.array([4, 1, 0]), 6, 2.0)
    assert found[0] == pytest.approx(3 + math.sqrt(2 * math.log(6) / 4))
    assert found[1] == pytest.approx(1 + math.sqrt(2 * math.log(6) / 1))
    assert found[2] == math.inf


def test_one_arm_is_its_mean() -> None:
    (arm,) = episodes(7.0)
    curve = bandit([arm], BanditConfig(pulls=5, trials=30))
    for line in (curve.mean, curve.low, curve.high):
        np.testing.assert_allclose(line, arm.mean(), rtol=1e-12)
    assert curve.pulls.tolist() == [1, 2, 3, 4, 5]


def test_a_trial_is_the_algorithm_pull_by_pull() -> None:
    """Two arms whose episodes are all alike leave nothing to chance but the first pull."""
    config = BanditConfig(pulls=12, arms=2, trials=6, alpha=2.0)
    pulled, best = play([np.full(3, 4.0), np.full(5, 3.0)], config)
    for arms, scores in zip(pulled, best, strict=True):
        n = {0: 0, 1: 0}
        for t, (arm, score) in enumerate(zip(arms.tolist(), scores, strict=True), 1):
            if t == 2:
                assert n[arm] == 0
            elif t > 2:
                bounds = {a: (4.0, 3.0)[a] + math.sqrt(2 * math.log(t) / n[a]) for a in n}
                assert arm == max(bounds, key=bounds.__getitem__)
            n[arm] += 1
            assert score == (4.0 if n[0] else 3.0)


def test_regret_falls_and_vanishes_where_arms_differ() -> None:
    arms = episodes(10, 30, 50, 90)
    curve = bandit(arms, BanditConfig(pulls=100, arms=4, trials=400))
    at_first = np.mean([arm.mean() for arm in arms])
    assert curve.mean[0] == pytest.approx(at_first, abs=4 * 30 / 20)  # one of four, at random
    assert curve.mean[3] == pytest.approx(arms[3].mean())  # each has been tried
    assert curve.mean[0] < curve.mean[1] < curve.mean[2] < curve.mean[3] == curve.mean[-1]
    assert (curve.low <= curve.mean + 1e-9).all()
    assert (curve.mean <= curve.high + 1e-9).all()
    assert curve.high[0] - curve.low[0] == pytest.approx(2 * 1.96 * 29.6 / 20, rel=0.2)  # of 400 means


def test_between_equal_arms_choice_is_uniform_up_to_noise() -> None:
    pulled, _ = play([np.zeros(10)] * 5, BanditConfig(pulls=50, arms=5, trials=400))
    counts = np.bincount(pulled.ravel(), minlength=5)
    np.testing.assert_allclose(counts, 4000, atol=200)
    first = np.bincount(pulled[:, 0], minlength=5)
    assert stats.chisquare(first).pvalue > 1e-3


def test_arms_are_drawn_anew_in_each_trial_and_the_seed_repeats_all() -> None:
    config = BanditConfig(pulls=20, arms=3, trials=50)
    pulled, _ = play(episodes(1, 2, 3, 4, 5, 6), config)
    assert all(len(set(trial)) == 3 for trial in pulled.tolist())
    assert len({tuple(sorted(set(trial))) for trial in pulled.tolist()}) > 5
    assert np.array_equal(pulled, play(episodes(1, 2, 3, 4, 5, 6), config)[0])
    assert not np.array_equal(pulled, play(episodes(1, 2, 3, 4, 5, 6), dataclasses.replace(config, seed=1))[0])


def test_negative_scores_do_not_make_an_untried_arm_the_best() -> None:
    _, best = play([np.full(3, -10.0), np.full(3, -20.0)], BanditConfig(pulls=1, arms=2, trials=200))
    assert set(best.ravel().tolist()) == {-10.0, -20.0}


def test_what_cannot_be_played_is_refused() -> None:
    with pytest.raises(UserError, match="pulls is 0; expected at least 1"):
        BanditConfig(pulls=0)


# --- Ranks and regret -----------------------------------------------------------------------------------------------


def test_rank_correlation_is_scipys_with_fishers_interval() -> None:
    g = np.random.default_rng(0)
    truth = g.standard_normal(30)
    estimates = truth + g.standard_normal(30)
    found = rank_correlation(estimates, truth)
    assert float(found.value) == pytest.approx(stats.spearmanr(estimates, truth).statistic)
    assert -1 < found.low < found.value < found.high < 1
    assert float(rank_correlation(-estimates, truth).value) == pytest.approx(-float(found.value))
    assert math.isnan(float(rank_correlation(estimates[:4], truth[:4]).low))
    assert math.isnan(float(rank_correlation(np.ones(6), truth[:6]).value))
    assert math.isnan(float(rank_correlation(truth[:1], truth[:1]).value))


def test_the_interval_covers_the_correlation_as_often_as_it_says() -> None:
    """Of normal pairs with r = 0.6, whose rank correlation is 6 / pi asin(r / 2)."""
    g, r, hit = np.random.default_rng(1), 0.6, 0
    for _ in range(400):
        x, e = g.standard_normal((2, 25))
        found = rank_correlation(r * x + math.sqrt(1 - r**2) * e, x)
        hit += bool(found.low < 6 / math.pi * math.asin(r / 2) < found.high)
    assert 0.92 < hit / 400 < 0.985


def test_regret_falls_in_k_and_is_none_of_all() -> None:
    g = np.random.default_rng(0)
    for _ in range(20):
        estimates, truth = g.standard_normal((2, 9))
        values = [float(regret_at(k, estimates, truth)) for k in range(1, 10)]
        assert values == sorted(values, reverse=True)
        assert values[-1] == 0
        assert values[0] == truth.max() - truth[estimates.argmax()]
        assert float(regret_at(1, truth, truth)) == 0
        assert float(regret_at(50, estimates, truth)) == 0


# --- Fitted Q evaluation --------------------------------------------------------------------------------------------

N_STATES, GAMMA = 4, 0.9


def chain(terminal: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Next states (4, 2), rewards (4, 2) and ends (4, 2) of a process with two actions."""
    after = np.array([[1, 2], [2, 3], [3, 0], [0, 1]])
    rewards = np.array([[0.0, 1.0], [-2.0, 0.5], [3.0, -1.0], [1.0, 2.0]])
    ends = np.zeros((4, 2))
    if terminal:
        ends[3, 1] = 1
    return after, rewards, ends


def exact(policy: np.ndarray, gamma: float, terminal: bool) -> np.ndarray:
    """V = (I - gamma P)^-1 r."""
    after, rewards, ends = chain(terminal)
    s = np.arange(N_STATES)
    transition = np.zeros((N_STATES, N_STATES))
    transition[s, after[s, policy]] = 1 - ends[s, policy]
    return np.linalg.solve(np.eye(N_STATES) - gamma * transition, rewards[s, policy])


def experience(terminal: bool) -> Experience:
    after, rewards, ends = chain(terminal)
    s, a = (x.ravel() for x in np.meshgrid(np.arange(N_STATES), [0, 1], indexing="ij"))
    eye = torch.eye(N_STATES)
    flat = [torch.tensor(table[s, a], dtype=torch.float32) for table in (rewards, ends)]
    actions = torch.tensor(2.0 * a[:, None] - 1, dtype=torch.float32)
    return Experience(eye[s], actions, *flat, eye[after[s, a]], eye[[0, 2]])


POLICIES = np.array([[0, 0, 0, 1], [1, 0, 1, 1], [1, 1, 0, 0]])
"""Of which the first comes to state 3 and takes the action that may end the episode there."""
SETTINGS = FQEConfig(steps=1500, batch_size=32, width=32, layers=1, learning_rate=1e-2, target_rate=0.1)


def asked(data: Experience, policies: np.ndarray, states: torch.Tensor) -> torch.Tensor:
    """The policies' actions (P, n, 1) at states (n, 4)."""
    return torch.tensor(2.0 * policies[:, states.argmax(-1).numpy()] - 1, dtype=torch.float32)[..., None]


def evaluated(terminal: bool, policies: np.ndarray, gamma: float = GAMMA, config: FQEConfig = SETTINGS) -> np.ndarray:
    data = experience(terminal)
    next_actions, start_actions = (asked(data, policies, x) for x in (data.next_observations, data.starts))
    return fitted_values(data, next_actions, start_actions, torch.full((len(policies),), gamma), config)


@pytest.mark.long
@pytest.mark.parametrize("terminal", [False, True])
def test_fitted_q_evaluation_is_the_solution_of_the_linear_equations(terminal: bool) -> None:
    found = evaluated(terminal, POLICIES)
    expected, otherwise = (
        np.array([(1 - GAMMA) * exact(policy, GAMMA, ends)[[0, 2]].mean() for policy in POLICIES])
        for ends in (terminal, not terminal)
    )
    assert np.ptp(expected) > 0.3
    assert abs(expected - otherwise)[0] > 0.12  # twice the tolerance: where the episode ends matters
    np.testing.assert_allclose(found, expected, atol=0.02 * 3)  # 2 % of the largest reward


def test_a_policys_value_does_not_depend_on_which_others_are_evaluated() -> None:
    config = dataclasses.replace(SETTINGS, steps=50)
    together = evaluated(False, POLICIES, config=config)
    for i in range(3):
        np.testing.assert_allclose(evaluated(False, POLICIES[i : i + 1], config=config), together[i : i + 1], rtol=1e-4)
    assert np.array_equal(together, evaluated(False, POLICIES, config=config))


def test_no_value_leaves_the_range_of_the_rewards() -> None:
    data = experience(False)._replace(rewards=torch.ones(8))
    actions = [asked(data, POLICIES, x) for x in (data.next_observations, data.starts)]
    found = fitted_values(data, *actions, torch.full((3,), 0.99), dataclasses.replace(SETTINGS, steps=20))
    np.testing.assert_allclose(found, 1)


def test_the_target_moves_with_the_horizon_and_as_asked_up_to_a_discount_of_99_of_100() -> None:
    """So that no discount has fewer of the times in which values settle than that one; at most it is the network."""
    config = FQEConfig()
    discounts = torch.tensor([0.9, 0.99, 0.995, 0.998, 0.9999])
    np.testing.assert_allclose(target_rates(discounts, config), [0.05, 0.05, 0.1, 0.25, 1.0], rtol=1e-4)
    np.testing.assert_allclose(settled(discounts, config), [50, 5, 5, 5, 1], rtol=1e-3)
    assert _unsettled(discounts[:4], config) == []
    (said,) = _unsettled(discounts, config)
    assert said.startswith(
        "fqe has not settled at a discount of 0.9999: 37% of the way to the values is left. --fqe.st"
    )
    assert said.endswith(" settles. The network's errors grow with the horizon, too, which more steps do not mend.")
    short, endless = _unsettled(torch.tensor([0.9, 1.0]), dataclasses.replace(config, steps=100))
    assert short.endswith(" settles.")  # of a short horizon
    assert endless.endswith(" is left.")  # no number of steps is enough


@pytest.mark.slow
def test_a_long_horizon_is_evaluated_as_a_short_one() -> None:
    """Two regions that are never left, with rewards 1 and -1: (1 - gamma) V = 1 from the one, by every discount.

    With the target of gamma = 0.99 it is 0.62 at 0.998. Errors of the network grow with the horizon: 0.83 is left.
    """
    g, n = torch.Generator().manual_seed(0), 512
    noise = lambda rows: 0.1 * torch.randn(rows, 1, generator=g)  # noqa: E731
    x = torch.where(torch.rand(n, 1, generator=g) < 0.5, -1.0, 1.0) + noise(n)
    actions = torch.rand(n, 1, generator=g) * 2 - 1
    data = Experience(x, actions, x[:, 0].sign(), torch.zeros(n), x.sign() + noise(n), torch.ones(8, 1) + noise(8))
    discounts = torch.tensor([0.99, 0.998])
    config = FQEConfig(width=16, batch_size=64)
    short, long = fitted_values(data, torch.zeros(2, n, 1), torch.zeros(2, 8, 1), discounts, config)
    assert short == pytest.approx(1, abs=0.02)
    assert 0.75 < long <= 1


@pytest.mark.parametrize("stored", [True, False])
def test_an_episode_that_only_follows_a_solved_row_begins_nowhere(stored: bool) -> None:
    """Rows 0 to 3 and 4 to 7 are recordings, cut by a time limit; rows 1, 2 and 5 solve the task, and these go on.

    The second recording ends by a terminal row, behind which the third begins in another state.
    """
    states = np.arange(12.0, dtype=np.float32)[:, None]
    following = states + 1
    following[[3, 7, 11]] = -1.0  # of ends of recordings no row begins there
    terminals = np.isin(np.arange(12), [1, 2, 5, 7])
    dataset = OfflineDataset(
        observations=states,
        actions=np.zeros((12, 1), np.float32),
        rewards=np.zeros(12, np.float32),
        terminals=terminals,
        timeouts=np.isin(np.arange(12), [3, 11]),
        next_observations=following if stored else None,
    )
    assert dataset.episodes()[:, 0].tolist() == [0, 2, 3, 4, 6, 8]
    assert initial_rows(dataset).tolist() == ([0, 4, 8] if stored else [0, 2, 3, 4, 6, 8])
