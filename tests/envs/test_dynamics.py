"""A roll-out's own rows are what the simulator, set to each of them in any order, makes again."""

import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from numpy.typing import NDArray

from diffrl.support.errors import UserError
from envs.dynamics import dynamics_for, why_none
from envs.maze2d import MAZES, reward, walk

Arrays = tuple[NDArray[Any], ...]


def rollout(env_id: str, steps: int, seed: int = 0) -> Arrays:
    """s, a, r, s' (float32, as data sets hold them) and terminal of a random policy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of v4
        env = gymnasium.make(env_id)
    rng = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    rows = []
    for _ in range(steps):
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        following, received, terminal, cut, _ = env.step(action)
        rows.append((observation, action, received, following, terminal))
        observation = env.reset()[0] if terminal or cut else following
    s, a, r, successors, terminals = (np.array(column) for column in zip(*rows, strict=True))
    return s.astype(np.float32), a, r, successors.astype(np.float32), terminals


@pytest.mark.parametrize("version", ["v4", "v5"])
@pytest.mark.parametrize(("family", "tolerance"), [("Hopper", 1e-5), ("HalfCheetah", 5e-4), ("Walker2d", 1e-4)])
def test_a_rollout_is_reproduced(family: str, tolerance: float, version: str) -> None:
    """From float32 observations: 8e-7, 6e-5 and 2e-5 at worst over 1,500 steps, rewards 2e-7, 8e-6 and 9e-8."""
    dynamics = dynamics_for(f"{family}-{version}")
    assert dynamics is not None
    s, a, r, successors, terminals = rollout(f"{family}-{version}", 600)
    order = np.random.default_rng(1).permutation(np.flatnonzero(dynamics.reproducible(s)))
    found, rewards, ends = dynamics.step(s[order], a[order])
    assert np.abs(found - successors[order]).max() < tolerance
    assert np.abs(rewards - r[order]).max() < tolerance
    assert (ends == terminals[order]).all()
    assert terminals[order].any() == (family != "HalfCheetah")
    assert np.median(np.abs(s - successors).max(1)) > 100 * tolerance  # a step is far more than that


def test_a_maze_rollout_is_reproduced() -> None:
    """Walls included, which the random walk meets; the reward is that of s' or of s, as asked."""
    s, a, r, successors, _ = rollout("maze2d-umaze-dense-v1", 600)
    for reward_at, wanted in (("next_observation", r), ("observation", reward(s, MAZES["umaze"].goal, "dense"))):
        dynamics = dynamics_for("maze2d-umaze-dense-v1", reward_at=reward_at)
        assert dynamics is not None
        found, rewards, ends = dynamics.step(s, a)
        assert np.abs(found - successors).max() < 1e-4
        assert np.abs(rewards - wanted).max() < 1e-5
        assert not ends.any()
    assert np.abs(r - wanted).max() > 1e-3  # the two conventions differ


def test_generated_maze_data_are_reproduced_without_being_told_whose_the_reward_is() -> None:
    dynamics = dynamics_for("maze2d-umaze-v1")
    assert dynamics is not None
    data = next(walk("umaze", 1000))
    found, rewards, _ = dynamics.step(data["observations"][:-1], data["actions"][:-1])
    assert np.abs(found - data["observations"][1:]).max() < 1e-4
    wanted = reward(data["observations"], MAZES["umaze"].goal, "sparse")
    assert (rewards == wanted[:-1]).all()
    assert (wanted[1:] != wanted[:-1]).any()


def test_only_rows_with_a_clipped_velocity_are_not_reproducible() -> None:
    """Hopper shows velocities (the last 6 of 11) within [-10, 10]; positions may be anything, HalfCheetah's too."""
    hopper, cheetah = dynamics_for("Hopper-v4"), dynamics_for("HalfCheetah-v4")
    assert hopper is not None
    assert cheetah is not None
    s = np.zeros((5, 11), np.float32)
    s[0, 4], s[1, 5], s[2, 10], s[3, 10], s[4, 0] = 20, -10, 10, 9.8, np.nan
    assert hopper.reproducible(s).tolist() == [True, False, False, True, False]
    assert hopper.reproducible(s, margin=0.05).tolist() == [True, False, False, False, False]
    assert cheetah.reproducible(np.full((1, 17), 20, np.float32)).all()


def test_rows_that_break_the_simulator_are_nan_and_disturb_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # where MuJoCo would write its log
    dynamics = dynamics_for("Hopper-v4")
    assert dynamics is not None
    s, a, *_ = rollout("Hopper-v4", 4)
    alone = dynamics.step(s, a)
    s_bad, a_bad = (np.repeat(x, 2, axis=0) for x in (s, a))
    s_bad[0], s_bad[2], a_bad[4] = 1e6, np.nan, np.inf
    found, rewards, _ = dynamics.step(s_bad, a_bad)
    assert np.isnan(found[[0, 2, 4]]).all()
    assert np.isnan(rewards[[0, 2, 4]]).all()
    assert (found[1::2] == alone[0]).all()
    assert (rewards[1::2] == alone[1]).all()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Pusher-v5", "whole state"),
        ("nonsense-v0", "has no environment"),
        ("lab.data:Point-v0", "no simulator of it is known that can be set to a state"),
        ("ant-medium-v2", "Not comparable"),
    ],
)
def test_there_is_a_reason_where_there_is_no_dynamics(name: str, why: str) -> None:
    assert dynamics_for(name) is None
    assert why in (why_none(name) or "")


def test_a_benchmark_has_the_dynamics_of_its_environment() -> None:
    dynamics = dynamics_for("walker2d-medium-v2")
    assert dynamics is not None
    assert dynamics.env_id == "Walker2d-v4"
    assert why_none("walker2d-medium-v2") is None


def test_keyword_arguments_reach_the_environment() -> None:
    """With the root's x in the observation, and another healthy reward, rows are still reproduced."""
    kwargs = {"exclude_current_positions_from_observation": False, "healthy_reward": 3.0}
    dynamics, plain = dynamics_for("Hopper-v4", **kwargs), dynamics_for("Hopper-v4")
    assert dynamics is not None
    assert plain is not None
    s, a, r, successors, _ = rollout("Hopper-v4", 20)
    x = np.full((20, 1), 5, np.float32)
    found, rewards, _ = dynamics.step(np.concatenate([x, s], 1), a)
    assert np.abs(found[:, 1:] - successors).max() < 1e-5
    assert np.abs(found[:, 0] - 5).max() < 0.1
    assert np.abs(rewards - r - 2).max() < 1e-5


def test_shapes_that_do_not_fit_are_named() -> None:
    dynamics = dynamics_for("Hopper-v4")
    assert dynamics is not None
    with pytest.raises(UserError, match=r"\(N, 11\).*\(N, 3\).*\(2, 17\)"):
        dynamics.step(np.zeros((2, 17), np.float32), np.zeros((2, 3), np.float32))
