"""The diffusion policy's network by itself."""

import pytest
import torch

from agents.diffusion_policy import DiffusionPolicy
from diffrl.nets import seed_generator


@pytest.mark.parametrize("batch", [4, 300])
def test_network_in_forward_mode(batch: int) -> None:
    """Its derivative along an action's and a time's motion, as sCM takes it: against central differences."""
    generators = [seed_generator(0), seed_generator(1)]
    policy = DiffusionPolicy(11, 3, generators, width=32, layers=3, steps=5, schedule="vp").double()
    (actions, d_actions), (t, dt) = torch.randn(2, 2, batch, 3).double(), torch.rand(2, 2, batch).double()
    observations = torch.randn(2, batch, 11).double()

    def network(actions: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return policy(actions, t, observations)

    with torch.no_grad():
        value, tangent = torch.func.jvp(network, (actions, t), (d_actions, dt))
    h = 1e-5
    difference = network(actions + h * d_actions, t + h * dt) - network(actions - h * d_actions, t - h * dt)
    torch.testing.assert_close(value, network(actions, t), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tangent, difference / (2 * h), rtol=1e-6, atol=1e-8)
