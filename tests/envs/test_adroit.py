"""D4RL's Adroit tasks: a random policy's returns are its references, which Gymnasium-Robotics' own rewards miss."""

import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from numpy.typing import NDArray

from diffrl.data.env_spec import EnvSpec
from diffrl.support.errors import UserError
from envs import registry

pytest.importorskip("gymnasium_robotics", reason="needs diffrl[robotics]")

from envs.adroit import TASKS, AdroitEnv
from envs.making import otherwise_rewarded


def random_returns(task: str, episodes: int) -> NDArray[np.float64]:
    env, rng = gymnasium.make(f"{task}-human-v1"), np.random.default_rng(0)
    returns = np.zeros(episodes)
    for i in range(episodes):
        env.reset(seed=i)
        ended = False
        while not ended:
            _, received, terminal, cut, _ = env.step(rng.uniform(-1, 1, env.action_space.shape or ()))
            returns[i] += float(received)
            ended = terminal or cut
    return returns


def assert_as_the_reference(task: str, episodes: int) -> None:
    """Within three combined standard errors; D4RL's own error is taken to be that of 100 episodes of this spread."""
    returns, low = random_returns(task, episodes), registry.get(f"{task}-human-v1").ref_min
    assert low is not None
    combined = returns.std(ddof=1) * np.sqrt(1 / episodes + 1 / 100)
    assert abs(returns.mean() - low) < 3 * combined, f"{returns.mean():.2f} against {low}, +- {combined:.2f}"


@pytest.mark.parametrize("task", ["door", "hammer", "relocate"])
def test_a_random_policy_scores_as_in_d4rl(task: str) -> None:
    assert_as_the_reference(task, 4)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "episodes"), [("pen", 800), ("door", 100), ("hammer", 100), ("relocate", 200)])
def test_a_random_policy_scores_as_in_d4rl_over_many_episodes(task: str, episodes: int) -> None:
    assert_as_the_reference(task, episodes)


@pytest.mark.parametrize("task", ["door", "hammer", "relocate"])
def test_the_distance_to_what_is_grasped_is_punished(task: str) -> None:
    """Gymnasium-Robotics' -v1 rewards it: the difference is .2 times the distance, and nothing else."""
    env = AdroitEnv(task)
    env.reset(seed=0)
    rng = np.random.default_rng(1)
    for _ in range(5):
        _, theirs, *_ = env._env.step(rng.uniform(-1, 1, env.action_space.shape or ()))
        data = env._data
        grasped = data.site("S_handle").xpos if task == "door" else data.body("Object").xpos
        reach = np.linalg.norm(data.site("S_grasp").xpos - grasped)
        assert reach > 0.01
        assert env.reward() == pytest.approx(float(np.squeeze(theirs)) - 0.2 * reach, rel=1e-9)


@pytest.mark.parametrize(
    ("angle", "bonus"),
    [(0.3, 2.0), (1.2, 10.0), (1.4, 20.0)],
)
def test_an_opened_door_gives_d4rls_bonuses(angle: float, bonus: float) -> None:
    env = AdroitEnv("door")
    env.reset(seed=0)
    before = env.reward()
    env._data.joint("door_hinge").qpos[0] = angle
    smooth = -0.1 * ((angle - 1.57) ** 2 - 1.57**2)
    assert env.reward() - before == pytest.approx(bonus + smooth, rel=1e-9)


def test_a_dropped_pen_ends_the_episode() -> None:
    env, rng = AdroitEnv("pen"), np.random.default_rng(0)
    dropped = 0
    for seed in range(4):
        env.reset(seed=seed)
        for _ in range(100):
            observation, received, terminal, _, _ = env.step(rng.uniform(-1, 1, 24))
            low = bool(observation[26] < 0.075)  # the pen's height
            assert terminal == low
            assert (received < -4) == low
            if terminal:
                dropped += 1
                break
    assert dropped > 0


def test_starts_repeat_by_seed_and_targets_differ() -> None:
    env = AdroitEnv("relocate")
    first, second = env.reset(seed=4)[0], env.reset(seed=5)[0]
    np.testing.assert_array_equal(first, env.reset(seed=4)[0])
    assert not np.array_equal(first, second)


def test_other_tasks_are_the_users_error() -> None:
    with pytest.raises(UserError, match="pen, door, hammer, relocate"):
        AdroitEnv("knife")


@pytest.mark.long
@pytest.mark.parametrize("env_id", ["AdroitHandDoor-v1", "door-human-v1", "kitchen-mixed-v0"])
def test_nobody_is_told_to_go_back_to_an_old_version(env_id: str) -> None:
    """Gymnasium-Robotics prints its notice when it is imported: once a process."""
    code = f"import gymnasium, envs.making\nenvs.making.make_env({env_id!r})\ngymnasium.make('door-human-v1')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "AdroitHand" not in done.stdout + done.stderr
    assert "==1.2" not in done.stdout + done.stderr


def test_what_the_package_rewards_otherwise_than_d4rl_is_said() -> None:
    """Of each task whose rewards differ from ours, and of no other; in the words of who has asked for it."""
    for task, env_id in TASKS.items():
        said = otherwise_rewarded(EnvSpec(env_id))
        assert (f"--env {task}-human-v1" in said) == (task != "pen")
        assert not otherwise_rewarded(EnvSpec(f"{task}-human-v1"))
        assert not otherwise_rewarded(EnvSpec(env_id, {"reward_type": "sparse"}))
