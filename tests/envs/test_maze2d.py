"""The rebuilt maze against D4RL's own figures, and its data against its counts."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest

import envs  # noqa: F401 (registers the environments)
from diffrl.data import d4rl
from diffrl.support.errors import UserError
from envs import registry
from envs.datasets import load_dataset
from envs.maze2d import MAZES, Maze2dEnv, WaypointController, generate, parse_id, reward, walk


def mean_return(maze: str, policy: str, episodes: int, seed: int = 0) -> tuple[float, float]:
    """Mean and standard error. The planner keeps its plan across resets, as D4RL's reference did."""
    env = Maze2dEnv(maze)
    rng = np.random.default_rng(seed)
    controller = WaypointController(env.maze, rng)
    env.reset(seed=seed)
    returns = np.zeros(episodes)
    for i in range(episodes):
        env.reset()
        states = []
        for _ in range(env.maze.max_episode_steps):
            if policy == "random":
                action = rng.uniform(-1, 1, 2)
            else:
                x, y, vx, vy = env.state().tolist()
                action = np.array(controller.act((x, y), (vx, vy), np.array(env.goal))[0])
            env.advance(action)
            states.append(env.state())
        returns[i] = reward(np.array(states), env.goal, "sparse").sum()
    return float(returns.mean()), float(returns.std(ddof=1) / np.sqrt(episodes))


REFERENCES = list(itertools.product(("random", "planner"), ("umaze", "medium", "large")))
FEW = (("random", "umaze"), ("planner", "umaze"), ("planner", "large"))
"""Of the fast tier."""


@pytest.mark.long
@pytest.mark.parametrize(
    ("policy", "maze"), [pair if pair in FEW else pytest.param(*pair, marks=pytest.mark.slow) for pair in REFERENCES]
)
def test_reference_policies_score_as_in_d4rl(maze: str, policy: str) -> None:
    """Within three combined standard errors; D4RL's own error is that of 100 episodes of the spread measured here."""
    episodes = 250 if policy == "random" else 150
    mean, error = mean_return(maze, policy, episodes)
    reference = registry.get(f"maze2d-{maze}-v1").reference_scores
    assert reference is not None
    theirs = reference[0] if policy == "random" else reference[1]
    combined = error * np.sqrt(1 + episodes / 100)
    assert abs(mean - theirs) < 3 * combined, f"{mean:.1f} +- {error:.1f} against {theirs}"
    assert combined < 0.5 * reference[1]  # the comparison means something


@pytest.mark.long
def test_the_data_have_as_many_segments_as_d4rls() -> None:
    """12,459 segment ends in a million rows of umaze (D4RL issue 65), +- 150; here a quarter of them, +- 75."""
    timeouts = np.concatenate([chunk["timeouts"] for chunk in walk("umaze", 250_000)])
    assert abs(timeouts.sum() - 12_459 / 4) < 75


@pytest.mark.slow
def test_a_million_rows_have_as_many_segments_as_d4rls() -> None:
    timeouts = np.concatenate([chunk["timeouts"] for chunk in walk("umaze", 1_000_000)])
    assert abs(timeouts.sum() - 12_459) < 150


def test_without_action_noise_there_are_too_many_segments() -> None:
    """The count tells the noise: 13,900 a million without."""
    timeouts = np.concatenate([chunk["timeouts"] for chunk in walk("umaze", 100_000, noise=0.0)])
    assert timeouts.sum() > 1_330


@pytest.mark.usefixtures("own_data")
def test_generated_data_are_one_continuous_walk() -> None:
    """Replayed from each row, the simulator gives the next: also across timeouts, where D4RL repeats a row."""
    dataset = load_dataset("maze2d-umaze-v1", rows=3000, progress=False)
    env = Maze2dEnv("umaze")
    rows = np.flatnonzero(dataset.timeouts)[:20].tolist() + list(range(0, 2000, 50))
    for row in rows:
        env.reset(options={"state": dataset.observations[row]})
        env.advance(dataset.actions[row])
        np.testing.assert_allclose(env.state(), dataset.observations[row + 1], atol=2e-5)
    assert not dataset.terminals.any()
    np.testing.assert_array_equal(dataset.rewards, reward(dataset.observations, (1, 1), "sparse"))
    assert np.abs(dataset.actions).max() <= 1


@pytest.mark.usefixtures("own_data")
def test_dense_data_are_the_same_walk_with_other_rewards() -> None:
    sparse, dense = (load_dataset(f"maze2d-umaze{kind}-v1", rows=2000, progress=False) for kind in ("", "-dense"))
    np.testing.assert_array_equal(sparse.observations, dense.observations)
    distance = np.linalg.norm(dense.observations[:, :2] - [1, 1], axis=1)
    np.testing.assert_allclose(dense.rewards, np.exp(-distance), rtol=1e-5)


def test_full_thrust_changes_the_speed_as_d4rls_mass_says() -> None:
    """100 / (4/3 pi .1^3 1000) x .01 s = .2387 a step, less damping; the speed is clipped at 5 before a step."""
    env = Maze2dEnv("open")
    env.reset(options={"state": np.array([2.0, 2.0, 0.0, 0.0])})
    env.advance(np.array([1.0, -1.0]))
    expected = 0.01 * 100 / (4 / 3 * np.pi * 0.1**3 * 1000)
    np.testing.assert_allclose(env.state()[2:], [expected, -expected], rtol=5e-3)
    env.reset(options={"state": np.array([2.0, 2.0, 9.0, 0.0])})
    env.advance(np.zeros(2))
    assert 4.8 < env.state()[2] <= 5.0


def test_walls_hold_and_stand_where_d4rl_puts_them() -> None:
    """Cell (1, 1) of umaze: the wall's face is at -.7 + .5 + .5 = .3, the ball's centre at .4 at the nearest."""
    env = Maze2dEnv("umaze")
    env.reset(options={"state": np.array([1.0, 1.0, 0.0, 0.0])})
    for _ in range(200):
        env.advance(np.array([-1.0, -1.0]))
    np.testing.assert_allclose(env.state()[:2], [0.4, 0.4], atol=0.02)


def test_the_module_in_the_name_registers_the_environments() -> None:
    code = "import gymnasium; gymnasium.make('envs:maze2d-umaze-v1').reset(seed=0)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_fewer_rows_are_the_first_of_more() -> None:
    few, many = (list(walk("umaze", rows, seed=3, chunk=100)) for rows in (250, 400))
    for a, b in zip(few, many, strict=False):
        np.testing.assert_array_equal(a["observations"], b["observations"][: len(a["observations"])])


def test_a_file_of_fewer_rows_is_what_reading_so_many_of_the_whole_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that began on the one goes on on the other: they have one fingerprint, the cut at the last row included."""
    monkeypatch.setitem(MAZES, "umaze", dataclasses.replace(MAZES["umaze"], rows_in_d4rl=400))
    few, whole = (generate("maze2d-umaze-v1", tmp_path / f"{n}.hdf5", n, progress=False) for n in (250, None))
    assert d4rl.fingerprint(d4rl.read(few)) == d4rl.fingerprint(d4rl.read(whole, rows=250))
    assert d4rl.read(few).timeouts[-1]


def test_observation_reward_and_end() -> None:
    for kind in ("", "-dense"):
        env = gymnasium.make(f"maze2d-umaze{kind}-v1")
        observation, _ = env.reset(seed=3)
        total = 0
        cut = False
        while not cut:
            observation, value, terminal, cut, _ = env.step(env.action_space.sample())
            distance = float(np.linalg.norm(observation[:2] - [1, 1]))
            assert value == pytest.approx(np.exp(-distance) if kind else float(distance <= 0.5), rel=1e-5)
            assert not terminal
            total += 1
        assert total == 300


def test_every_maze_is_registered_with_its_limit_and_can_be_drawn() -> None:
    for benchmark_id in registry.ids():
        benchmark = registry.get(benchmark_id)
        if benchmark.generated:
            env = gymnasium.make(benchmark_id, render_mode="rgb_array")
            assert env.spec is not None
            assert env.spec.max_episode_steps == benchmark.max_episode_steps
            env.reset(seed=0)
            image = env.render()
            assert isinstance(image, np.ndarray)
            assert (image == (30, 60, 200)).all(-1).sum() > 10  # the ball
            assert (image == (150, 220, 150)).all(-1).sum() > 100  # the goal


def test_resets_cover_free_cells_alone_and_repeat_by_seed() -> None:
    env = Maze2dEnv("umaze")
    starts = np.array([env.reset(seed=seed)[0] for seed in range(300)])
    cells = {tuple(cell) for cell in np.round(starts[:, :2]).astype(int)}
    assert cells == set(MAZES["umaze"].free)
    assert np.abs(starts[:, :2] - np.round(starts[:, :2])).max() <= 0.1
    assert 0.07 < starts[:, 2:].std() < 0.13
    np.testing.assert_array_equal(env.reset(seed=5)[0], env.reset(seed=5)[0])


@pytest.mark.parametrize("maze", list(MAZES))
def test_the_planners_way_leads_to_the_target_without_crossing_walls(maze: str) -> None:
    for target in MAZES[maze].free:
        table = MAZES[maze].next_cells(target)
        for cell in MAZES[maze].free:
            for _ in range(100):
                if cell == target:
                    break
                step = table[cell]
                assert abs(step[0] - cell[0]) + abs(step[1] - cell[1]) == 1
                assert MAZES[maze].grid[step[0]][step[1]] != "#"
                cell = step
            assert cell == target


@pytest.mark.parametrize("wrong", ["maze2d-tiny-v1", "maze2d-umaze-thick-v1", "hopper-medium-v2"])
def test_other_ids_are_refused(wrong: str) -> None:
    with pytest.raises(UserError, match="maze2d"):
        parse_id(wrong)
