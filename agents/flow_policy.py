"""A policy that is a rectified flow over actions, cloned from the data by flow matching.

    L(theta) = E |v_theta(a_t, t, s) - (z - a)|^2,    a_t = (1 - t) a + t z,    z ~ N(0, I)

Squares are means over the action's dimensions, as in FQL's authors' code (arXiv 2502.02538).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from agents.base import GenerativePolicy
from agents.base_config import FlowNetworks
from diffrl.diffusion import Prediction, RectifiedFlow, Sampler, denoising_loss


class FlowPolicy(GenerativePolicy):
    """A rectified flow over actions: the velocity v_theta(a_t, t, s), followed in `steps` Euler steps."""

    def __init__(
        self, observation_size: int, action_size: int, generators: Sequence[torch.Generator], *, steps: int, **size: Any
    ) -> None:
        super().__init__(observation_size, action_size, generators, **size)
        self.prediction = Prediction("velocity", RectifiedFlow())
        grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        self.sampler = Sampler(self.prediction.process, grid)  # on a rectified flow DDIM is Euler

    def noise_levels(self) -> tuple[float, ...]:
        """The ratios k at t = 1/16, 3/16 ... 15/16."""
        return tuple(t / (1 - t) for t in ((2 * i + 1) / 16 for i in range(8)))

    def sampling_noise(self, observations: Tensor, generator: torch.Generator, K: int = 1) -> Tensor:
        """Draw the starts z of K paths a state: (S, B K, A)."""
        S, B, _ = observations.shape
        return torch.randn((S, B * K, self.action_size), generator=generator, device=observations.device)

    def sample(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Sample actions mu_theta(s, z) (S, B K, A), clamped to [-1, 1] at the end; noise is z."""
        network = self.bound(observations, self._candidates(observations, noise))
        return self.sampler(self.prediction.denoiser(network), noise).clamp(-1, 1)

    def matching_noise(self, actions: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw t (S, B), uniform on (0, 1], and z (S, B, A) for `matching_loss` on actions (S, B, A)."""
        z = torch.randn(actions.shape, generator=generator, device=actions.device)
        t = torch.rand(actions.shape[:-1], generator=generator, device=actions.device)
        return 1 - t, z

    def matching_loss(
        self, actions: Tensor, observations: Tensor, t: Tensor, z: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """E |v_theta(a_t, t, s) - (z - a)|^2: (S,). t: (S, B), uniform on (0, 1]; z: (S, B, A), standard normal.

        mask: (S, B, H), where a is a chunk of H actions one after the other: the steps that count, 1.0 or 0.0. The mean
        is over all.
        """
        network = self.bound(observations)
        if mask is None:
            return denoising_loss(self.prediction, network, actions, t, z).mean(-1)
        error = denoising_loss(self.prediction, network, actions, t, z, event_dims=0)
        return (error.view(*mask.shape, -1) * mask.unsqueeze(-1)).mean((-3, -2, -1))


def time_size(networks: FlowNetworks) -> int:
    """The size of the flow's time embedding: 0, the time as it is, in the authors' networks."""
    return 0 if networks == "published" else 16
