"""An exported student: its graph, and what its card says of its teacher."""

from pathlib import Path

import numpy as np
import pytest
import torch

import diffrl
from agents.critic import CandidateNoise
from diffrl.runs.distil import distil
from diffrl.runs.export.export import export
from diffrl.runs.run import Run
from diffrl.tuning.distil_config import DistilConfig
from tests.rounding import rounding

ROUNDINGS = 200
"""Of an action in [-1, 1]: a network of three layers of 32, its scales and their quotients."""


@pytest.fixture(scope="module")
def student(cloned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A consistency student of the cloned policy, after few steps."""
    settings = DistilConfig(start_run=cloned, batch_size=16)
    return distil(settings, quiet=True, steps=4, eval_episodes=1, out=tmp_path_factory.mktemp("student") / "run")


@pytest.mark.long
def test_a_consistency_students_graph_is_the_policy_to_rounding(student: Path, tmp_path: Path) -> None:
    """From the same noise, in the environment's units."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    to = export(student, tmp_path / "to", onnx=True)
    policy = diffrl.load_policy(to)
    session = onnxruntime.InferenceSession(str(to / "policy.onnx"))
    x = np.random.default_rng(0).uniform(-1, 1, (40, 1)).astype(np.float32)
    z = Run.read(student).preprocessing.observations(torch.from_numpy(x))[None]
    noise = policy.agent.policy.sampling_noise(z, torch.Generator().manual_seed(1))  # (T, S, B, A)
    with torch.no_grad():
        ours = policy.agent.act_from(z, CandidateNoise(noise, z.new_zeros(1, len(x), 1)))
    expected = Run.read(student).preprocessing.actions.inverse(ours)[0].numpy()
    (found,) = session.run(["action"], {"observation": x, "noise": noise[:, 0].movedim(1, 0).numpy()})
    np.testing.assert_allclose(found, expected, rtol=0, atol=rounding(torch.float32, ROUNDINGS))
    assert len(np.unique(found)) > 40


def test_its_card_names_the_teacher(student: Path, tmp_path: Path) -> None:
    """Its agent and the step it was taken at; and not that the student saw the data's actions."""
    card = (export(student, tmp_path / "to", seed=1) / "README.md").read_text()
    assert "A policy that diffrl distilled from a trained policy of the agent `diffusion_bc`: agent" in card
    assert "Its teacher is the policy of the agent `diffusion_bc` of another run, RUN, after 500 steps." in card
    assert "diffrl distil RUN --steps 4" in card
    assert "Learned from its teacher, in states of the data, it is tested in simulation only" in card
    assert "offline run" not in card
