"""A tiny run of Diffusion-QL on the maze's data, whole or cut in pieces."""

from pathlib import Path
from typing import Any

import pytest
import torch

import diffrl
from agents import AgentConfig, DiffusionQL
from diffrl.runs.config import TrainConfig
from diffrl.training import checkpoint

AGENT = DiffusionQL(width=16, layers=1, batch_size=16, act_candidates=3, ema_start=20)


def tiny(out: Path, agent: AgentConfig = AGENT, **fields: Any) -> TrainConfig:
    """200 steps on 3,000 rows, evaluated at 100 and 200: in episodes of four steps, where the maze's have 300."""
    values: dict[str, Any] = {"rows": 3000, "steps": 200, "eval_every": 100, "eval_episodes": 2, "log_every": 30}
    values |= {"seeds": (0, 1), "env": "tests.training.held_env:Held-v0"}
    return TrainConfig(dataset="maze2d-umaze-v1", agent=agent, out=out, **(values | fields))


def final_state(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's newest checkpoint."""
    return checkpoint.load(run, checkpoint.steps(run)[-1]).tensors


def assert_same_run(one: Path, other: Path) -> None:
    """Every tensor, every logged number and every score are equal."""
    a, b = final_state(one), final_state(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert (one / "metrics.csv").read_text() == (other / "metrics.csv").read_text()
    assert (one / "scores.json").read_text() == (other / "scores.json").read_text()


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory, data_directory: Path) -> Path:
    """The run that was never cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFRL_DATA", str(data_directory))
        return diffrl.train(tiny(tmp_path_factory.mktemp("runs") / "straight"), quiet=True)
