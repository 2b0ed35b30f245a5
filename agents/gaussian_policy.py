"""A Gaussian behind tanh, its mean and deviation functions of the state: the policy of SAC and of DTQL.

    a = tanh(u),    u = mu(s) + e^{log_std(s)} z,    z ~ N(0, I)

(Haarnoja et al. 2018, arXiv 1812.05905, appendix C.)
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from diffrl.nets import MLP


class SquashedGaussian(nn.Module):
    """An MLP with ReLU from observations (S, B, O) to mu and log_std, (S, B, A) each; log_std clamped to `log_std`."""

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        generators: Sequence[torch.Generator],
        *,
        width: int,
        layers: int,
        log_std: tuple[float, float],
    ) -> None:
        super().__init__()
        size: dict[str, Any] = {"width": width, "layers": layers, "activation": torch.relu}
        self.mlp = MLP((len(generators),), observation_size, 2 * action_size, generators, **size)
        self.log_std = log_std

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """mu and log_std, (S, B, A) each, at observations (S, B, O)."""
        mu, log_std = self.mlp(observations).chunk(2, -1)
        return mu, log_std.clamp(*self.log_std)

    def sample(self, observations: Tensor, z: Tensor) -> Tensor:
        """Actions tanh(mu + e^log_std z) (S, B K, A), the K of a state in a row; differentiable.

        observations: (S, B, O). z: (S, B K, A), standard normal.
        """
        mu, log_std = self(observations)
        K = z.shape[1] // observations.shape[1]
        if K > 1:
            mu, log_std = mu.repeat_interleave(K, dim=1), log_std.repeat_interleave(K, dim=1)
        return torch.tanh(mu + log_std.exp() * z)

    def draw(self, observations: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (S, B, A) as `sample`, and their log pi(a | s), summed over dimensions: (S, B).

        log pi = log N(u; mu, std) - log(1 - tanh(u)^2), the last as 2 (log 2 - u - softplus(-2 u)), which is finite at
        every u. z: (S, B, A).
        """
        mu, log_std = self(observations)
        u = mu + log_std.exp() * z
        normal = -0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)
        slope = 2 * (math.log(2) - u - softplus(-2 * u))
        return torch.tanh(u), (normal - slope).sum(-1)

    def mean(self, observations: Tensor) -> Tensor:
        """tanh(mu(s)), the action without noise: (S, B, A)."""
        mu: Tensor = self(observations)[0]
        return torch.tanh(mu)

    def log_prob_before(self, observations: Tensor, actions: Tensor, margin: float) -> Tensor:
        """log N(artanh(a / (1 + margin)); mu, std), summed over dimensions: (S, B), for actions (S, B, A) in [-1, 1].

        The density before tanh: what is left out, the slope of tanh there, does not depend on the network.
        """
        mu, log_std = self(observations)
        z = (torch.atanh(actions / (1 + margin)) - mu) * torch.exp(-log_std)
        densities: Tensor = -0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)
        return densities.sum(-1)
