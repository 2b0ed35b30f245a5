"""Small runs to fine-tune: a bandit whose best action is known, cloned off its centre."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from numpy.typing import NDArray

import diffrl
from agents import AgentConfig, DiffusionBC
from diffrl.data import d4rl
from diffrl.data.offline import OfflineDataset
from diffrl.runs.config import TrainConfig
from envs.task import Task
from tests.runs.made_runs import SIZES

BEST = np.array([0.3, -0.5])
"""The bandit's best action."""
BANDIT = Task("Target-v0", {}, None, False)
"""As a task of `made_run`, whose runs are not trained."""
SIZES["Target-v0"] = 1, 2
SMALL: dict[str, Any] = {"width": 32, "layers": 1, "batch_size": 32}


class Target(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """One step: the reward is 1 - |a - BEST|^2, so 1 at best; the data's actions, at (-.3, .2), earn .15 at most."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 1).astype(np.float32), {}

    def step(self, action: NDArray[np.float32]) -> Any:
        return np.zeros(1, np.float32), 1 - float(((action - BEST) ** 2).sum()), True, False, {}


@pytest.fixture(autouse=True, scope="package")
def target() -> Iterator[None]:
    """The bandit, under the name Target-v0."""
    gymnasium.register("Target-v0", entry_point=Target)
    yield
    del gymnasium.registry["Target-v0"]


def target_data() -> OfflineDataset:
    """Episodes of 4 steps, actions around (-.3, .2) with deviation .1, rewards their first coordinate."""
    rng = np.random.default_rng(0)
    actions = np.clip(np.array([-0.3, 0.2]) + 0.1 * rng.standard_normal((800, 2)), -1, 1).astype(np.float32)
    observations = rng.uniform(-1, 1, (800, 1)).astype(np.float32)
    ends = np.arange(800) % 4 == 3
    return OfflineDataset(observations, actions, actions[:, 0].copy(), ends, np.zeros(800, np.bool_))


def target_run(out: Path, agent: AgentConfig | None = None, **fields: Any) -> Path:
    """An agent trained on that data; by default it clones."""
    file = d4rl.write(out.parent / "target.hdf5", target_data(), force=True)
    values = {
        "env": "Target-v0",
        "steps": 500,
        "eval_every": 500,
        "eval_episodes": 20,
        "log_every": 100,
        "seeds": (0, 1),
    }
    agent = DiffusionBC(**SMALL, learning_rate=3e-3) if agent is None else agent
    return diffrl.train(TrainConfig(str(file), agent, out=out, **(values | fields)), quiet=True)


@pytest.fixture(scope="package")
def cloned(tmp_path_factory: pytest.TempPathFactory, target: None) -> Path:
    """A cloned policy, two seeds."""
    return target_run(tmp_path_factory.mktemp("cloned") / "run")
