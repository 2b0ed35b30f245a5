"""Stable-Baselines3's replay buffers: what is in them comes out, in order and to the letter, and goes in again."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from numpy.typing import NDArray

from diffrl.cli import main
from diffrl.data import d4rl, sb3
from diffrl.data.offline import OfflineDataset
from diffrl.support.errors import DataError, UserError

pytest.importorskip("stable_baselines3", reason="needs the extra: pip install 'diffrl[sb3]'")
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (2,), np.float32)
ACTIONS = spaces.Box(np.array([0.0, -3.0], np.float32), np.array([4.0, 5.0], np.float32))
"""Bounds that are not symmetric; actions in eighths survive the scaling both ways exactly."""


def filled(steps: int, capacity: int = 12, n_envs: int = 2, **options: Any) -> ReplayBuffer:
    """Observation (environment, time); reward 100 e + t; an episode ends at every fourth step, by turns cut.

    The step reached at an end is not the next episode's first one: its second number is t + 0.5.
    """
    buffer = ReplayBuffer(capacity * n_envs, OBSERVATIONS, ACTIONS, "cpu", n_envs, **options)
    rng = np.random.default_rng(0)
    for t in range(steps):
        here = np.array([[e, t] for e in range(n_envs)], np.float32)
        done, cut = t % 4 == 3, t % 8 == 7
        reached = here + np.array([0, 0.5 if done else 1], np.float32)
        actions = (rng.integers(-8, 9, (n_envs, 2)) / 8).astype(np.float32)
        infos = [{"TimeLimit.truncated": cut}] * n_envs
        buffer.add(here, reached, actions, 100.0 * here[:, 0] + t, np.full(n_envs, done), infos)
    return buffer


def of_env(dataset: OfflineDataset, e: int, n_envs: int = 2) -> dict[str, NDArray[Any]]:
    return {name: np.split(values, n_envs)[e] for name, values in dataset.columns().items()}


@pytest.mark.parametrize("steps", [7, 12, 18])
def test_rows_come_out_oldest_first_environment_by_environment(steps: int) -> None:
    """Of a ring of 12 that holds 7 steps, is just full, and has been overwritten by half."""
    dataset = sb3.to_dataset(filled(steps))
    times = np.arange(max(steps - 12, 0), steps)
    assert len(dataset) == 2 * len(times)
    for e in range(2):
        rows = of_env(dataset, e)
        done = times % 4 == 3
        assert rows["observations"].tolist() == [[e, t] for t in times]
        np.testing.assert_array_equal(rows["next_observations"][:, 1], times + np.where(done, 0.5, 1))
        np.testing.assert_array_equal(rows["rewards"], 100 * e + times)
        np.testing.assert_array_equal(rows["terminals"], done & (times % 8 == 3))
        last = times == steps - 1  # the episode goes on, but the next row is another environment's
        np.testing.assert_array_equal(rows["timeouts"], (times % 8 == 7) | (last & ~done))
    assert dataset.validate("the buffer", action_limit=5) is dataset


def test_actions_are_the_environments() -> None:
    """The low bound is -1 in the buffer, the high one 1."""
    buffer = filled(3)
    buffer.actions[0, 0], buffer.actions[1, 0], buffer.actions[2, 0] = (-1, 1), (1, -1), (0, 0.5)
    assert sb3.to_dataset(buffer).actions[:3].tolist() == [[0, 5], [4, -3], [2, 3]]
    assert sb3.to_dataset(buffer, scaled_actions=False).actions[:3].tolist() == [[-1, 1], [1, -1], [0, 0.5]]
    assert sb3.to_dataset(buffer).metadata["action_low"].tolist() == [0, -3]


@pytest.mark.parametrize("steps", [7, 12, 18])
def test_to_a_file_and_into_a_buffer_and_out_again_nothing_changes(steps: int, tmp_path: Path) -> None:
    buffer = filled(steps)
    dataset = sb3.to_dataset(buffer)
    path = sb3.write(tmp_path / "buffer.hdf5", buffer, env_id="Some-v0")
    assert d4rl.read(path, action_limit=None).metadata["env_id"] == "Some-v0"
    other = filled(5)
    assert sb3.read(path, other) == len(dataset)
    for name, values in sb3.to_dataset(other).columns().items():
        np.testing.assert_array_equal(values, dataset.columns()[name], err_msg=name)
    # The same ring but for its beginning, and for the newest step, where the export cuts.
    n = min(steps, 12)
    roll = buffer.pos if buffer.full else 0
    for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts"):
        mine, theirs = getattr(other, name)[: n - 1], np.roll(getattr(buffer, name), -roll, axis=0)[: n - 1]
        np.testing.assert_array_equal(mine, theirs, err_msg=name)
    assert (other.pos, other.full) == (n % 12, n == 12)


def test_a_filled_buffer_goes_on_and_its_batches_know_cuts_from_ends() -> None:
    buffer = filled(7)
    sb3.fill_buffer(buffer, sb3.to_dataset(filled(12)))
    np.random.seed(0)  # noqa: NPY002 - SB3 draws from the global state
    batch = buffer.sample(500)
    times = batch.observations[:, 1].numpy()
    np.testing.assert_array_equal(batch.dones[:, 0].numpy(), times % 8 == 3)
    one = np.ones((2, 2), np.float32)
    buffer.add(9 * one, 9 * one, one, one[0], one[0], [{}, {}])
    assert sb3.to_dataset(buffer).observations[[0, 11, 12, 23]].tolist() == [[0, 1], [9, 9], [1, 1], [9, 9]]


def test_the_newest_rows_stay_where_not_all_fit_and_unknown_successors_are_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    n = 11
    ends = np.zeros(n, np.bool_)
    ends[4] = True  # cut, and nothing is stored of what it reached: left out, and so is the last row
    observations = np.stack([np.zeros(n), np.arange(n)], 1).astype(np.float32)
    dataset = OfflineDataset(observations, observations + 1, np.arange(n, dtype=np.float32), ends & False, ends)
    buffer = filled(0, capacity=3, n_envs=1)
    assert sb3.fill_buffer(buffer, dataset, scaled_actions=False) == 3
    assert buffer.rewards[:, 0].tolist() == [7, 8, 9]
    said = " ".join(capsys.readouterr().err.split())
    assert "room for 3 of 9 rows: only the last 3 are in it. For all of them make it with buffer_size=9 or" in said
    large = filled(0, capacity=9, n_envs=1)
    assert sb3.fill_buffer(large, dataset, scaled_actions=False) == 9
    assert not capsys.readouterr().err
    two = filled(0, capacity=6)
    assert sb3.fill_buffer(two, dataset, scaled_actions=False) == 8  # of nine, in two parts
    assert two.rewards[:4].T.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert two.timeouts[:4].T.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]
    np.testing.assert_array_equal(two.next_observations[:4, 0], two.observations[:4, 0] + [0, 1])


def test_a_file_that_is_there_is_replaced_only_by_force(tmp_path: Path) -> None:
    path = sb3.write(tmp_path / "buffer.hdf5", filled(3))
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"exists.*force=True"):
        sb3.write(path, filled(5))
    assert path.read_bytes() == before
    assert len(d4rl.read(sb3.write(path, filled(5), force=True), action_limit=None)) == len(sb3.to_dataset(filled(5)))


@pytest.mark.parametrize("steps", [7, 12, 18])
def test_one_array_for_both_observations(steps: int) -> None:
    """What follows is the next row's observation; a full ring has lost its oldest step; all ends are terminals."""
    dataset = sb3.to_dataset(filled(steps, optimize_memory_usage=True, handle_timeout_termination=False))
    times = np.arange(max(steps - 11, 0), steps)
    rows = of_env(dataset, 1)
    done = times % 4 == 3
    assert rows["observations"].tolist() == [[1, t] for t in times]
    np.testing.assert_array_equal(rows["next_observations"][:, 1], times + ~done)
    np.testing.assert_array_equal(rows["terminals"], done)
    assert not rows["timeouts"][:-1].any()
    assert not dataset.has_terminal_next
    assert sb3.to_dataset(filled(steps)).has_terminal_next
    with pytest.raises(UserError, match="optimize_memory_usage=False"):
        sb3.fill_buffer(filled(3, optimize_memory_usage=True, handle_timeout_termination=False), dataset)


def test_images_and_whole_numbers_are_flattened_and_come_back() -> None:
    space = spaces.Box(0, 255, (3, 4, 5), np.uint8)
    buffer, other = (ReplayBuffer(4, space, ACTIONS, "cpu") for _ in range(2))
    rng = np.random.default_rng(0)
    for _ in range(3):
        here, reached = rng.integers(0, 256, (2, 1, 3, 4, 5), np.uint8)
        buffer.add(here, reached, np.zeros((1, 2)), np.zeros(1), np.zeros(1), [{}])
    dataset = sb3.to_dataset(buffer)
    assert dataset.observations.shape == (3, 60)
    sb3.fill_buffer(other, dataset)
    np.testing.assert_array_equal(other.observations, buffer.observations)
    np.testing.assert_array_equal(other.next_observations, buffer.next_observations)


def test_what_sac_collects_is_what_the_environment_gave() -> None:
    """Pendulum's observation is (cos, sin, velocity), its torque in [-2, 2]: x'' = 15 sin x + 3 u, dt = 0.05."""
    model = SAC("MlpPolicy", "Pendulum-v1", learning_starts=450, seed=0, device="cpu")
    model.learn(450)
    dataset = sb3.to_dataset(model.replay_buffer, env_id="Pendulum-v1")
    cos, sin, velocity = dataset.observations.T
    following = velocity + 0.05 * (15 * sin + 3 * dataset.actions[:, 0])
    np.testing.assert_allclose(dataset.next_observations[:, 2], following.clip(-8, 8), atol=1e-4)
    cost = np.arctan2(sin, cos) ** 2 + 0.1 * velocity**2 + 0.001 * dataset.actions[:, 0] ** 2
    np.testing.assert_allclose(dataset.rewards, -cost, atol=1e-4)
    assert dataset.episode_lengths().tolist() == [200, 200, 50]
    assert not dataset.terminals.any()


def test_what_cannot_be_a_table_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = spaces.Dict({"a": OBSERVATIONS, "b": OBSERVATIONS})
    unbounded = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    for buffer, words in (
        (DictReplayBuffer(4, both, ACTIONS, "cpu"), "FlattenObservation"),
        (ReplayBuffer(4, OBSERVATIONS, spaces.Discrete(3), "cpu"), "Discrete space; expected a Box"),
        (filled(0), "is empty"),
    ):
        with pytest.raises(UserError, match=words):
            sb3.to_dataset(buffer)
    dataset = sb3.to_dataset(filled(7))
    for buffer, words in (
        (ReplayBuffer(4, spaces.Box(-1, 1, (3,)), ACTIONS, "cpu"), "observations have 2 dimensions.*buffer's 3"),
        (ReplayBuffer(4, OBSERVATIONS, spaces.Box(-1, 1, (1,)), "cpu"), "actions have 2 dimensions.*buffer's 1"),
        (ReplayBuffer(4, OBSERVATIONS, spaces.Box(-1, 1, (2,)), "cpu"), "outside the action space"),
        (ReplayBuffer(4, OBSERVATIONS, unbounded, "cpu"), "scaled_actions=False"),
        (ReplayBuffer(40, OBSERVATIONS, ACTIONS, "cpu", 20), "14 usable rows for 20 environments"),
    ):
        with pytest.raises(UserError, match=words):
            sb3.fill_buffer(buffer, dataset)


@pytest.mark.parametrize("name", ["buffer.pkl", "buffer"])
def test_pickled_buffers_are_refused_with_the_reason(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = SAC("MlpPolicy", gymnasium.make("Pendulum-v1"), buffer_size=10, device="cpu")
    path = tmp_path / name
    with path.open("wb") as file:
        model.save_replay_buffer(file)
    assert main(["data", "convert", str(path), str(tmp_path / "out.hdf5")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "reading one runs whatever code it holds" in said
    assert "diffrl.data.sb3.write" in said
    with pytest.raises(DataError, match="is a pickle"):
        sb3.read(path, filled(0))
