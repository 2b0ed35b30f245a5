"""Small runs for tests: any agent's, written without training, as initialised; trained for 20 steps; and spoilt."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import agents
import diffrl
from agents import AgentConfig
from diffrl.data.preprocessing import Normaliser, Preprocessing
from diffrl.runs.config import TrainConfig
from diffrl.runs.policy import build_agent
from diffrl.runs.run import Run
from diffrl.support import folder
from diffrl.training import checkpoint
from diffrl.training.logs import Scores
from envs.task import Task

MAZE = Task("envs:maze2d-umaze-v1", {}, "maze2d-umaze-v1", True)
PENDULUM = Task("Pendulum-v1", {}, None, False)
BY_SUCCESS = Task("Pendulum-v1", {}, "cube-single-play-singletask-v0", False)
"""A task whose scores are successes, as OGBench's; of a made run an episode with an odd return has succeeded."""
SIZES = {"Pendulum-v1": (3, 1)}
SMALL: dict[str, Any] = {
    "width": 8,
    "layers": 2,
    "blocks": 1,
    "denoising_steps": 3,
    "sampling_steps": 3,
    "flow_steps": 2,
    "horizon": 8,
    "multipliers": (1, 2),
    "act_candidates": 4,
}
"""What makes any agent small: those of these fields that it has are set."""


def small(name: str, **fields: Any) -> AgentConfig:
    """The small configuration of an agent by name."""
    schema = agents.get(name)
    known = {field.name for field in dataclasses.fields(schema)}
    return schema(**{key: value for key, value in (SMALL | fields).items() if key in known})


def trained_run(out: Path, agent: AgentConfig, seeds: tuple[int, ...] = (0, 1), **fields: Any) -> Path:
    """Train a real run of 20 steps on 2,000 rows of the maze, evaluated at 10 and 20 in two episodes of four steps."""
    short: dict[str, Any] = {"rows": 2000, "steps": 20, "eval_every": 10, "eval_episodes": 2, "log_every": 5}
    config = TrainConfig("maze2d-umaze-v1", agent, seeds=seeds, out=out, max_episode_steps=4, **(short | fields))
    return diffrl.train(config, quiet=True)


def made_run(
    path: Path, agent: AgentConfig, task: Task = PENDULUM, seeds: Sequence[int] = (3, 5), dataset: str = "data.hdf5"
) -> Path:
    """Write a run's folder, its networks with random biases too, and scores of two evaluations at its two steps."""
    observations, actions = SIZES.get(str(task.env_id), (4, 2))
    g = torch.Generator().manual_seed(1)
    scales = [
        Normaliser(torch.randn(n, generator=g), torch.rand(n, generator=g) + 0.5) for n in (observations, actions)
    ]
    config = TrainConfig(dataset=dataset, agent=agent, env=task.env_id, seeds=tuple(seeds), steps=20, eval_every=10)
    run = Run(path, config, task, observations, actions, Preprocessing(*scales), 1.0, "0" * 64)
    path.mkdir(parents=True)
    run.write()
    built = build_agent(run, "cpu")
    scores = Scores(path, {"seeds": list(seeds), "env": task.env_id, "reference": task.reference, "dataset": dataset})
    for step in (10, 20):
        state = built.state_dict()
        for tensor in state.values():
            if tensor.is_floating_point():
                tensor += 0.03 * torch.randn(tensor.shape, generator=g)
        checkpoint.save(path, step, {f"{checkpoint.LEARNER}{name}": tensor for name, tensor in state.items()}, {})
        returns = np.arange(5.0 * len(seeds)).reshape(len(seeds), 5) ** 2 + step
        outcomes = np.stack([returns, returns % 2], -1) if task.scored_by_success else returns
        scores.add(step, outcomes, task.score if task.reference else None)
    return path


def observations_of(run: Path, rows: int = 6) -> np.ndarray:
    """Some observations for a run's policy, (rows, O)."""
    size = Run.read(run).observation_size
    return np.random.default_rng(0).uniform(0.5, 2, (rows, size)).astype(np.float32)


def frozen_in(path: Path, step: int) -> None:
    """Have the checkpoint of a run say that its second seed stands still."""
    at = checkpoint.folder(path, step)
    state = json.loads((at / "state.json").read_text())
    assert state["frozen"] == []
    (at / folder.SUMS).unlink()
    (at / "state.json").write_text(json.dumps(state | {"frozen": [1]}))
