"""D4RL's kitchen on Gymnasium-Robotics': its observations, counts and ends."""

import gymnasium
import numpy as np
import pytest

from diffrl.support.errors import UserError
from envs import registry

pytest.importorskip("gymnasium_robotics", reason="needs diffrl[robotics]")

from envs.kitchen import KitchenEnv

GOALS = {  # D4RL's, by position in the state
    "bottom burner": {11: -0.88, 12: -0.01},
    "light switch": {17: -0.69, 18: -0.05},
    "slide cabinet": {19: 0.37},
    "microwave": {22: -0.75},
    "kettle": {23: -0.23, 24: 0.75, 25: 1.62, 26: 0.99, 27: 0.0, 28: 0.0, 29: -0.06},
}


@pytest.fixture(scope="module")
def kitchen() -> KitchenEnv:
    return KitchenEnv("mixed")


@pytest.mark.parametrize(
    ("benchmark_id", "tasks"),
    [
        ("kitchen-complete-v0", "microwave, kettle, light switch, slide cabinet"),
        ("kitchen-partial-v0", "microwave, kettle, light switch, slide cabinet"),
        ("kitchen-mixed-v0", "microwave, kettle, bottom burner, light switch"),
    ],
)
def test_sizes_limit_tasks_and_goal_are_d4rls(benchmark_id: str, tasks: str) -> None:
    env = gymnasium.make(benchmark_id)
    assert (env.observation_space.shape, env.action_space.shape) == ((60,), (9,))
    assert env.spec is not None
    assert env.spec.max_episode_steps == registry.get(benchmark_id).max_episode_steps == 280
    observation, info = env.reset(seed=0)
    assert sorted(info["tasks_to_complete"]) == sorted(tasks.split(", "))
    expected = np.zeros(30)
    for task in tasks.split(", "):
        for where, value in GOALS[task].items():
            expected[where] = value
    np.testing.assert_array_equal(observation[30:], expected.astype(np.float32))


def test_an_observation_is_the_state_with_a_tenth_of_each_joints_noise(kitchen: KitchenEnv) -> None:
    """Amplitudes: .1 of the robot's nine joints, .005 of the burners' knobs and .0005 of their lamps, and so on."""
    noises = []
    for seed in range(40):
        observation, _ = kitchen.reset(seed=seed)
        noises.append(observation[:30] - kitchen._robot.data.qpos)
    amplitude = np.abs(noises).max(0)
    bound = 0.1 * np.array([0.1] * 9 + [0.005] * 2 + [0.0005] * 6 + [0.005] * 3 + [0.1] * 3 + [0.005] * 3 + [0.1] * 3)
    bound = np.append(bound, 0.1 * 0.005)
    assert (amplitude <= bound + 1e-6).all()
    assert (amplitude >= 0.7 * bound).all()
    again, _ = kitchen.reset(seed=3)
    np.testing.assert_array_equal(again, kitchen.reset(seed=3)[0])


def test_each_task_counts_once_and_the_last_ends_the_episode(kitchen: KitchenEnv) -> None:
    """The objects are put where their tasks are done, one after the other, and stay."""
    kitchen.reset(seed=0)
    data, rewards, terminals = kitchen._robot.data, [], []
    for task in ("microwave", None, "light switch", "kettle", "bottom burner"):
        for where, value in GOALS[task].items() if task else ():
            data.qpos[where] = value
        _, received, terminal, _, info = kitchen.step(np.zeros(9))
        rewards.append(received)
        terminals.append(terminal)
        assert info["step_task_completions"] == ([task] if task else [])
    assert rewards == [1, 0, 1, 1, 1]
    assert terminals == [False, False, False, False, True]


def test_a_task_is_done_nearer_than_its_threshold(kitchen: KitchenEnv) -> None:
    state = np.zeros(30)
    for distance, done in ((0.29, ["microwave"]), (0.31, [])):
        state[22] = -0.75 + distance
        assert kitchen.completed(state, ["microwave"]) == done
    state[22] = -0.75
    assert kitchen.completed(state, ["kettle"]) == []  # what is done already does not count


def test_an_action_moves_its_joint_at_twice_its_value() -> None:
    """D4RL's actions are velocities of 2 rad/s at most: .16 rad in a step of 80 ms, which the arm follows in part."""
    ends = []
    for action in (0.0, 1.0, 9.0):
        env = KitchenEnv("mixed", noise=0.0)
        first, _ = env.reset(seed=0)
        after, *_ = env.step(np.array([action] + [0.0] * 8))
        ends.append(after[0] - first[0])
    assert abs(ends[0]) < 0.01
    assert 0.02 < ends[1] < 0.16
    assert ends[2] == ends[1]  # clipped


def test_other_tasks_are_the_users_error() -> None:
    with pytest.raises(UserError, match="complete, partial, mixed"):
        KitchenEnv("all")
