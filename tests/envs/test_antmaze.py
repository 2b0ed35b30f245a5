"""The ant is Gymnasium's, the maze D4RL's; states, rewards and ends follow from both."""

import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest

from diffrl.support.errors import UserError
from envs import registry
from envs.antmaze import CELL, GOAL_RADIUS, MAZES, AntMazeEnv, reward

IDS = [benchmark_id for benchmark_id in registry.ids() if benchmark_id.startswith("antmaze")]


def standing(x: float, y: float, vx: float = 0.0) -> np.ndarray:
    """The state of an ant at (x, y), legs down and feet on the floor, with a velocity in x."""
    state = np.zeros(29)
    state[:4] = x, y, 0.55, 1.0
    state[7:15] = 0.0, 1.0, 0.0, -1.0, 0.0, -1.0, 0.0, 1.0
    state[15] = vx
    return state


def actions(n: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (n, 8))


def ant_v4() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return gymnasium.make("Ant-v4").unwrapped


def test_every_id_is_registered_with_d4rls_limit_and_sizes() -> None:
    assert len(IDS) == 12
    for benchmark_id in IDS:
        spec = gymnasium.spec(benchmark_id)
        assert spec.max_episode_steps == (700 if "umaze" in benchmark_id else 1000)
        assert spec.kwargs["maze"] == benchmark_id.split("-")[1]
    env = gymnasium.make("antmaze-umaze-v2")
    assert (env.observation_space.shape, env.action_space.shape) == ((29,), (8,))
    assert (env.action_space.low == -1).all()
    assert (env.action_space.high == 1).all()


def test_an_observation_is_positions_and_then_velocities() -> None:
    env = AntMazeEnv()
    observation, _ = env.reset(seed=1)
    for action in actions(3):
        simulated = np.concatenate([env._data.qpos, env._data.qvel]).astype(np.float32)
        np.testing.assert_array_equal(observation, simulated)
        observation, *_ = env.step(action)


def test_resets_are_d4rls_and_repeat_by_seed() -> None:
    env = AntMazeEnv("large")
    starts = np.array([env.reset(seed=seed)[0] for seed in range(200)])
    upright = np.zeros(15)
    upright[2:4] = 0.75, 1.0
    off = np.delete(starts[:, :15] - upright, np.s_[3:7], axis=1)  # the quaternion is normalised
    assert np.abs(off).max() <= 0.1 + 1e-6
    assert abs(off.std() - 0.1 / np.sqrt(3)) < 0.003
    np.testing.assert_allclose(np.linalg.norm(starts[:, 3:7], axis=1), 1.0, rtol=1e-6)
    assert abs(starts[:, 15:].std() - 0.1) < 0.005  # of 2,800 numbers: four standard errors
    np.testing.assert_array_equal(starts[7], env.reset(seed=7)[0])


@pytest.mark.parametrize(("maze", "centre"), [("umaze", (0, 8)), ("medium", (20, 20)), ("large", (32, 24))])
def test_goals_lie_in_their_free_cell_where_d4rl_draws_them(maze: str, centre: tuple[int, int]) -> None:
    """Each coordinate: the centre + U(0, 1) + U(0, .5), of mean .75 and standard deviation .323."""
    env = AntMazeEnv(maze)
    goals = np.array([env.reset(seed=seed)[1]["goal"] for seed in range(300)])
    shift = goals - centre
    assert shift.min() >= 0
    assert 1.3 < shift.max() <= 1.5
    np.testing.assert_allclose(shift.mean(0), 0.75, atol=4 * 0.323 / np.sqrt(300))
    assert {env.maze.cell_at(*goal) for goal in goals} == {env.maze.cells("G")[0]}


@pytest.mark.parametrize("maze", list(MAZES))
def test_a_way_leads_from_the_start_to_the_goal_and_the_border_is_closed(maze: str) -> None:
    grid = MAZES[maze].grid
    assert len({len(row) for row in grid}) == 1
    assert set(grid[0] + grid[-1]) | {row[0] + row[-1] for row in grid} == {"#", "##"}
    reached, edge = set(), [MAZES[maze].cells("R")[0]]
    while edge:
        r, c = edge.pop()
        if (r, c) not in reached and grid[r][c] != "#":
            reached.add((r, c))
            edge += [(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)]
    assert reached == set(MAZES[maze].cells("ORG"))


def test_cells_and_positions_are_each_others_inverse() -> None:
    maze = MAZES["large"]
    for cell in maze.cells("ORG"):
        x, y = maze.centre(cell)
        for dx, dy in ((0, 0), (1.9, -1.9), (-1.9, 1.9)):
            assert maze.cell_at(x + dx, y + dy) == cell


def test_the_goal_gives_1_within_its_radius_and_ends_the_episode() -> None:
    goal = np.array([3.0, 4.0])
    positions = goal + np.array([[0, 0], [GOAL_RADIUS, 0], [0, -GOAL_RADIUS - 1e-6], [0.4, 0.4], [0.3, 0.3]])
    np.testing.assert_array_equal(reward(positions, goal), [1, 1, 0, 0, 1])
    env = AntMazeEnv()
    for distance, expected in ((0.1, 1.0), (GOAL_RADIUS + 0.2, 0.0)):
        env.reset(seed=0, options={"state": standing(0.5, 8.0), "goal": (0.5 + distance, 8.0)})
        _, received, terminal, cut, info = env.step(np.zeros(8))
        assert (received, terminal, cut, info["success"]) == (expected, expected == 1, False, expected == 1)


def test_the_same_actions_lead_to_the_same_states() -> None:
    def rollout() -> np.ndarray:
        env = AntMazeEnv("medium")
        env.reset(seed=3)
        return np.array([env.step(action)[0] for action in actions(40)])

    first = rollout()
    np.testing.assert_array_equal(first, rollout())
    assert np.abs(np.diff(first[:, 0])).max() > 1e-3  # it moves


def test_walls_hold() -> None:
    """The wall west of the start has its face at x = -2; to the east the way is free, and so is none above the wall."""
    reached = {}
    for speed in (-8.0, 8.0):
        env = AntMazeEnv()
        env.reset(seed=0, options={"state": standing(0, 0, speed)})
        reached[speed] = np.array([env.step(np.zeros(8))[0][0] for _ in range(15)])
    assert reached[-8.0].min() > -CELL / 2 - 0.05
    assert reached[8.0].max() > CELL / 2 + 0.5
    env = AntMazeEnv()
    tops = [env._model.geom(f"wall_{r}_{c}").pos[2] * 2 for r, c in env.maze.cells("#")]
    assert set(tops) == {2.0}


def test_mass_joints_and_motors_are_those_of_the_ant() -> None:
    ours, theirs = AntMazeEnv()._model, ant_v4().model
    # A sphere of .25 and twelve capsules of .08, four of them twice as long, of density 5.
    ball, ends = 4 / 3 * np.pi * 0.25**3, 4 / 3 * np.pi * 0.08**3
    legs = 8 * (ends + np.pi * 0.08**2 * np.hypot(0.2, 0.2)) + 4 * (ends + np.pi * 0.08**2 * np.hypot(0.4, 0.4))
    assert ours.body_mass.sum() == pytest.approx(5 * (ball + legs), rel=1e-9)
    for name in ("body_mass", "body_inertia", "jnt_range", "dof_damping", "dof_armature", "qpos0"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    np.testing.assert_array_equal(ours.actuator_trnid, theirs.actuator_trnid)
    np.testing.assert_array_equal(ours.actuator_ctrlrange, np.tile([-30.0, 30.0], (8, 1)))
    np.testing.assert_array_equal(ours.actuator_gear[:, 0], 1.0)
    assert ours.opt.timestep == 0.02
    np.testing.assert_array_equal(ours.geom_solimp[:, :3], np.tile([0.8, 0.8, 0.01], (ours.ngeom, 1)))


def test_in_the_open_it_moves_as_gymnasiums_ant_with_d4rls_constants() -> None:
    """Ant-v4, whose constants are changed in its compiled model: torque 30 an action, 20 ms, softer contacts."""
    import mujoco

    env, ant = AntMazeEnv(), ant_v4()
    env.reset(seed=0)
    ant.model.opt.timestep, ant.model.actuator_gear[:, 0] = 0.02, 30.0
    ant.model.geom_solref[:], ant.model.geom_solimp[:, :3] = (0.02, 1.0), (0.8, 0.8, 0.01)
    mujoco.mj_resetData(ant.model, ant.data)
    ant.data.qpos[:], ant.data.qvel[:] = env._data.qpos, env._data.qvel
    for action in actions(10):
        env.step(action)
        ant.data.ctrl[:] = action
        mujoco.mj_step(ant.model, ant.data, 5)
        theirs = np.concatenate([ant.data.qpos, ant.data.qvel])
        np.testing.assert_allclose(env.state(), theirs, rtol=0, atol=1e-6)  # rounding, grown by contacts


def test_actions_beyond_1_are_clipped() -> None:
    states = []
    for scale in (1.0, 5.0):
        env = AntMazeEnv()
        env.reset(seed=0)
        env.step(scale * np.ones(8))
        states.append(env.state())
    np.testing.assert_array_equal(*states)


def test_from_above_the_ant_stands_at_its_place_in_the_maze() -> None:
    env = AntMazeEnv("umaze", render_mode="rgb_array")
    env.reset(seed=0, options={"state": standing(4.0, 8.0), "goal": (0.0, 8.0)})
    image = env.render()
    assert image.shape == (5 * 48, 5 * 48, 3)
    for colour, cell in (((30, 60, 200), (3, 2)), ((150, 220, 150), (3, 1))):
        where = np.argwhere((image == colour).all(-1)).mean(0) / 48 - 0.5
        np.testing.assert_allclose(where, cell, atol=0.05)


@pytest.mark.parametrize("options", [{"state": [1.0, 2.0]}, {"goal": "there"}, {"goal": [np.nan, 1]}])
def test_what_is_no_state_or_goal_is_the_users_error(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="finite numbers"):
        AntMazeEnv().reset(seed=0, options=options)
    with pytest.raises(UserError, match="umaze, medium, large"):
        AntMazeEnv("huge")
