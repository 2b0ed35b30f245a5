"""The diffusion policy pi(a | s): the actor of Diffusion-QL and IDQL, and a behaviour-cloning policy by itself."""

from collections.abc import Sequence

import torch
from torch import Tensor

from agents.action_network import GenerativePolicy
from agents.base import Agent
from agents.config import IDQL, DiffusionBC, DiffusionQL
from diffrl.diffusion import VP, Prediction, Sampler, denoising_loss, discrete_grid


class DiffusionPolicy(GenerativePolicy):
    """A conditional DDPM of T steps over actions in [-1, 1] (arXiv 2208.06193, section 3).

    Its network is eps_theta(a_t, t, s). Its time label is the time of the VP process (0.22, 0.83, 1.8, 3.2, 5.1 for
    T = 5) where the original code has the step's index (0 to 4): about the same numbers, and with a meaning for any
    other grid or solver. The first layer's time part is computed once for each of the T times.
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
        blocks: int = 0,
    ) -> None:
        super().__init__(observation_size, action_size, generators, width=width, layers=layers, blocks=blocks)
        self.steps = steps
        times = discrete_grid(schedule, steps, dtype=torch.get_default_dtype())
        self.prediction = Prediction("eps", VP())
        self.sampler = Sampler(VP(), times, eta=1.0)
        # (c_skip, c_out) of the denoiser at each time of the grid.
        self._preconditioning = torch.stack(self.prediction.preconditioning(times[:-1].double()), 1).tolist()
        self.register_buffer("times", times[:-1], persistent=False)

    def _parts(self, observations: Tensor, K: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """The first layer's time parts (S, T, width), its state part with bias (S, B K, width), and w_a."""
        w_a, w_t, w_s = self.first_layer()
        labels = self.times.expand(self.n_seeds, -1)
        return torch.bmm(self.embed_time(labels), w_t), self.state_part(observations, w_s, K), w_a

    def noise_levels(self) -> tuple[float, ...]:
        """The ratios k of its T times, rising."""
        return tuple(self.prediction.process.ratio(self.times.double()).flip(0).tolist())

    def bc_noise(self, actions: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What `bc_loss` needs: steps i (S, B), uniform over the grid of times, and noise eps (S, B, A)."""
        i = torch.randint(self.steps, actions.shape[:-1], generator=generator, device=actions.device)
        return i, torch.randn(actions.shape, generator=generator, device=actions.device)

    def bc_loss(
        self, actions: Tensor, observations: Tensor, i: Tensor, eps: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """L_d = E |eps - eps_theta(a_t, t, s)|^2 (eq. 2), the mean over batch and action dimensions: (S,).

        keep: the dropout of a residual network, see `ResidualMLP`.
        """
        time_parts, state_part, w_a = self._parts(observations)
        one_hot = (i.unsqueeze(-1) == torch.arange(self.steps, device=i.device)).to(time_parts.dtype)
        # The row of each time, taken by a product: its backward pass is one too, and not a scatter.
        h = torch.baddbmm(state_part, one_hot, time_parts)
        t = self.times[i]
        return denoising_loss(self.prediction, lambda a, t: self.from_parts(h, a, w_a, keep), actions, t, eps).mean(-1)

    def sampling_noise(self, observations: Tensor, generator: torch.Generator, K: int = 1) -> Tensor:
        """What `sample` needs for K actions a state: (T + 1, S, B K, A), the start a_T first, in one draw."""
        S, B, _ = observations.shape
        shape = (self.steps + 1, S, B * K, self.action_size)
        return torch.randn(shape, generator=generator, device=observations.device)

    def sample(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Actions (S, B K, A) by the T steps of the reverse process, D clamped to [-1, 1] (eq. 1); differentiable.

        observations: (S, B, O). noise: (T + 1, S, B K, A), of `sampling_noise`; the K actions of a state in a row.
        """
        time_parts, state_part, w_a = self._parts(observations, self._candidates(observations, noise))
        # The sampler, DDPM's, asks for the denoised action once at each time of the grid, in its order.
        steps = iter(zip(time_parts.unbind(1), self._preconditioning, strict=True))

        def denoise(a: Tensor, t: Tensor) -> Tensor:
            time_part, (c_skip, c_out) = next(steps)
            eps = self.from_parts(state_part + time_part.unsqueeze(1), a, w_a)
            a_0: Tensor = c_skip * a + c_out * eps
            return a_0

        return self.sampler(denoise, noise[0], noise=noise[1:], clip=(-1.0, 1.0))


def build_policy(agent: Agent, config: DiffusionBC | DiffusionQL | IDQL, blocks: int = 0) -> DiffusionPolicy:
    """The diffusion policy of an agent, as its configuration says, on its device."""
    return DiffusionPolicy(
        agent.observation_size,
        agent.action_size,
        agent.generators,
        width=config.width,
        layers=config.layers,
        steps=config.denoising_steps,
        schedule=config.schedule,
        blocks=blocks,
    ).to(agent.device)
