"""The diffusion policy pi(a | s): the actor of Diffusion-QL, and a behaviour-cloning policy by itself."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from agents.base import Agent
from agents.config import DiffusionBC, DiffusionQL
from diffrl.diffusion import VP, Prediction, denoising_loss, discrete_grid, grid_times, sample
from diffrl.nets import MLP, TimeEmbedding


class DiffusionPolicy(nn.Module):
    """A conditional DDPM of T steps over actions in [-1, 1] (arXiv 2208.06193, section 3).

    The network eps_theta(a_t, t, s) is an MLP on [a_t, time embedding, s]. Its time label is the time of the VP
    process (0.22, 0.83, 1.8, 3.2, 5.1 for T = 5) where the original code has the step's index (0 to 4): about the same
    numbers, and with a meaning for any other grid or solver. All noise is drawn beforehand and passed in, so that the
    losses are plain functions of tensors, which the compiler takes whole.
    """

    times: Tensor

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        generators: Sequence[torch.Generator],
        *,
        width: int,
        layers: int,
        steps: int,
        schedule: str,
        time_size: int = 16,
    ) -> None:
        super().__init__()
        n_seeds = len(generators)
        self.action_size = action_size
        self.register_buffer("times", discrete_grid(schedule, steps), persistent=False)
        self.prediction = Prediction("eps", VP())
        self.embed_time = TimeEmbedding(n_seeds, time_size, generators)
        inputs = action_size + time_size + observation_size
        self.mlp = MLP((n_seeds,), inputs, action_size, generators, width=width, layers=layers)

    def forward(self, actions: Tensor, t: Tensor, observations: Tensor) -> Tensor:
        """eps_theta: actions (S, B, A), t () or (S, B), observations (S, B, O) -> (S, B, A)."""
        time = self.embed_time(t).expand(*actions.shape[:-1], -1)
        eps: Tensor = self.mlp(torch.cat([actions, time, observations], -1))
        return eps

    def bc_noise(self, actions: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What `bc_loss` needs: times t (S, B), uniform over the grid, and noise eps (S, B, A)."""
        eps = torch.randn(actions.shape, generator=generator, device=actions.device)
        return grid_times(self.times, actions.shape[:-1], generator), eps

    def bc_loss(self, actions: Tensor, observations: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """L_d = E |eps - eps_theta(a_t, t, s)|^2 (eq. 2), the mean over batch and action dimensions: (S,)."""
        return denoising_loss(self.prediction, lambda a, t: self(a, t, observations), actions, t, eps).mean(-1)

    def sampling_noise(self, observations: Tensor, generator: torch.Generator, K: int = 1) -> Tensor:
        """What `sample` needs for K actions a state: (T + 1, S, B K, A), the start a_T first, in one draw."""
        S, B, _ = observations.shape
        shape = (len(self.times), S, B * K, self.action_size)
        return torch.randn(shape, generator=generator, device=observations.device)

    def sample(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Actions (S, B, A) by the T steps of the reverse process, D clamped to [-1, 1] (eq. 1); differentiable."""
        denoise = self.prediction.denoiser(lambda a, t: self(a, t, observations), clip=(-1.0, 1.0))
        return sample(VP(), denoise, noise[0], self.times, eta=1.0, noise=noise[1:])


def build_policy(agent: Agent, config: DiffusionBC | DiffusionQL) -> DiffusionPolicy:
    """The diffusion policy of an agent, as its configuration says, on its device."""
    return DiffusionPolicy(
        agent.observation_size,
        agent.action_size,
        agent.generators,
        width=config.width,
        layers=config.layers,
        steps=config.denoising_steps,
        schedule=config.schedule,
    ).to(agent.device)
