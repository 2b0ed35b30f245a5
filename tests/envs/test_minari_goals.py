"""Minari's goal-conditioned sets as Gymnasium-Robotics records them: the policy sees the goal, in data and task."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from diffrl.cli import main
from envs.datasets import load_dataset
from envs.task import open_task

minari = pytest.importorskip("minari")
gymnasium_robotics = pytest.importorskip("gymnasium_robotics", reason="needs diffrl[robotics]")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

ENDS_AT_THE_GOAL = {"continuing_task": False, "reset_target": False}
MIXED = {"tasks_to_complete": ["microwave", "kettle", "bottom burner", "light switch"]}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    gymnasium.register_envs(gymnasium_robotics)


def record(name: str, env: gymnasium.Env[Any, Any]) -> list[dict[str, Any]]:
    """Two short episodes as Minari's own collector records them, and the dictionaries that were seen first."""
    collector = minari.DataCollector(env)
    collector.action_space.seed(0)
    seen = []
    for episode in range(2):
        seen.append(collector.reset(seed=episode)[0])
        for _ in range(6):
            collector.step(collector.action_space.sample())
    collector.create_dataset(name)
    return seen


@pytest.mark.parametrize(
    ("name", "env_id", "arguments", "size", "reference"),
    [
        ("D4RL/pointmaze/umaze-v2", "PointMaze_UMaze-v3", {}, 4 + 2, None),
        ("D4RL/antmaze/umaze-v1", "AntMaze_UMaze-v4", ENDS_AT_THE_GOAL, 29 + 2, "antmaze-umaze-v2"),
        ("D4RL/antmaze/umaze-v1", "AntMaze_UMaze-v4", {}, 29 + 2, None),
        ("D4RL/kitchen/mixed-v2", "FrankaKitchen-v1", MIXED, 59 + 12, "kitchen-mixed-v0"),
    ],
)
def test_the_goal_is_in_the_observation(
    name: str, env_id: str, arguments: dict[str, Any], size: int, reference: str | None
) -> None:
    seen = record(name, gymnasium.make(env_id, max_episode_steps=6, **arguments))
    dataset = load_dataset(name)
    assert dataset.observation_size == size
    starts = dataset.observations[dataset.episodes()[:, 0]]
    for start, first in zip(starts, seen, strict=True):
        goal = first["desired_goal"]
        whole = np.concatenate([goal[key] for key in sorted(goal)]) if isinstance(goal, dict) else goal
        np.testing.assert_array_equal(start[-len(whole) :], np.float32(whole))
    task, env = open_task(name, dataset)
    assert (task.env_id, task.reference, task.comparable) == (env_id, reference, False)
    assert env is not None
    np.testing.assert_array_equal(env.reset(seed=0)[0], starts[0])  # made alike, in the same order
    env.close()


def test_data_info_says_whose_references_these_are(capsys: pytest.CaptureFixture[str]) -> None:
    record("D4RL/antmaze/umaze-v1", gymnasium.make("AntMaze_UMaze-v4", max_episode_steps=6, **ENDS_AT_THE_GOAL))
    main(["data", "info", "D4RL/antmaze/umaze-v1", "--env", "none"])
    said = " ".join(capsys.readouterr().out.split())
    assert "reference returns: random 0.00 (D4RL's), expert 1.00 (D4RL's). Not D4RL itself: Minari's AntMaze" in said
    assert main(["data", "list", "antmaze/umaze"]) == 0
    assert "1.00 (D4RL's)" in capsys.readouterr().out
