"""Every agent through the whole of a run: train, cut at an odd step, go on, evaluate, load."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import diffrl
from agents import AGENTS, AgentConfig, Diffuser
from diffrl.runs import config as configuration
from tests.training.conftest import final_state, tiny

pytestmark = pytest.mark.usefixtures("own_data")


GUIDED = "diffuser, guided by returns"
QUICK = ("td3_bc", "diffusion_ql", "edp", "consistency_ac", "fql", "dtql", GUIDED)
"""Of the fast tier: one of each kind of policy. Of every agent it is `test_capture.py` that finds state left out."""


def small(name: str) -> AgentConfig:
    """The agent as its configuration for maze2d has it, where there is one, with networks that take no time."""
    if name == GUIDED:
        return dataclasses.replace(small("diffuser"), guidance="return")  # type: ignore[call-arg]
    found = [c for c in configuration.shipped() if c == f"{name}/maze2d-umaze-v1"]
    config = configuration.find(found[0]).agent if found else AGENTS[name]()
    config = dataclasses.replace(config, width=8, layers=1, batch_size=8)
    if isinstance(config, Diffuser):  # plans as short as 500 rows have them, in an environment without a goal
        config = dataclasses.replace(config, horizon=20, denoising_steps=4, goal_reaching=False)
    return config


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in (*sorted(AGENTS), GUIDED)]
)
def test_a_run_cut_anywhere_is_the_run_that_was_not(name: str, tmp_path: Path) -> None:
    """13 steps in one go and as 7 + 6, bit for bit: the cut falls into the middle of TD3's period."""
    fields = {"steps": 13, "eval_every": 10, "eval_episodes": 1, "log_every": 3, "rows": 500}
    straight = diffrl.train(tiny(tmp_path / "straight", small(name), **fields), quiet=True)
    cut = diffrl.train(tiny(tmp_path / "cut", small(name), **{**fields, "steps": 7, "eval_every": 100}), quiet=True)
    text = (cut / "config.yaml").read_text()
    (cut / "config.yaml").write_text(text.replace("eval_every: 100", "eval_every: 10"))
    diffrl.resume(cut, steps=13, accept_changes=True, quiet=True)
    a, b = final_state(straight), final_state(cut)
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key
    # The cut run has rows of its end at 7 besides.
    rows = [(run / "metrics.csv").read_text().splitlines() for run in (straight, cut)]
    assert [row for row in rows[1] if not row.startswith("7,")] == rows[0]
    policy = diffrl.load_policy(cut, seed=1)
    actions = policy(np.zeros((3, 4), np.float32))
    assert actions.shape == (3, 2)
    assert np.abs(actions).max() <= 1


def test_every_agent_ships_configurations_for_maze2d_and_hopper() -> None:
    for name in AGENTS:
        assert {f"{name}/maze2d-umaze-v1", f"{name}/hopper-medium-v2"} <= set(configuration.shipped())
