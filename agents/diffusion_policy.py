"""The diffusion policy pi(a | s): the actor of Diffusion-QL and IDQL, and a behaviour-cloning policy by itself."""

from collections.abc import Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor

from agents.base import Agent, GenerativePolicy
from agents.config import DiffusionBC, DiffusionQL
from agents.expectile_config import IDQL, ReverseVariance
from diffrl.diffusion import VP, Denoise, Prediction, Sampler, denoising_loss, discrete_grid
from diffrl.diffusion.chain import DenoisingChain


class DiffusionNoise(NamedTuple):
    """All that is random in `DiffusionPolicy.bc_loss`."""

    i: Tensor
    """(S, B) steps of the grid of times, uniform."""
    eps: Tensor
    """(S, B, A) standard normal noise on the actions."""


class DiffusionPolicy(GenerativePolicy):
    """A conditional DDPM of T steps over actions in [-1, 1] (arXiv 2208.06193, section 3).

    Its network is eps_theta(a_t, t, s). Its time label is the time of the VP process (0.22, 0.83, 1.8, 3.2, 5.1 for
    T = 5) where the original code has the step's index (0 to 4): about the same numbers, and with a meaning for any
    other grid or solver. The first layer's time part is computed once for each of the T times.

    sampler: the reverse process in sampling. "posterior": D is clamped to [-1, 1], and the noise is that of the DDPM
    posterior. "beta": D is taken as it is, the noise is sqrt(beta_t), and the state is clamped to [-1, 1] after each
    step, as IDQL's authors sample. The mean of a step is the posterior's in both, and the last step has no noise.

    The first steps of the chain may belong to another, frozen network: see `freeze_start`.
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
        sampler: ReverseVariance = "posterior",
    ) -> None:
        super().__init__(observation_size, action_size, generators, width=width, layers=layers, blocks=blocks)
        self.steps = steps
        times = discrete_grid(schedule, steps, dtype=torch.get_default_dtype())
        self.prediction = Prediction("eps", VP())
        self.sampler = Sampler(VP(), times, eta=1.0)
        self._beta_steps: list[tuple[float, float, float]] = []  # (f, g, std) of a step a -> f D + g a + std z
        if sampler == "beta":  # on VP 1 - beta_t, the square of a step's alpha_t / alpha_r, is e^(r - t)
            betas = -torch.expm1(times[1:].double() - times[:-1].double())
            stds = [*betas[:-1].sqrt().tolist(), 0.0]
            self._beta_steps = [(step.f, step.g, s) for step, s in zip(self.sampler.plan, stds, strict=True)]
        # (c_skip, c_out) of the denoiser at each time of the grid.
        self._preconditioning = torch.stack(self.prediction.preconditioning(times[:-1].double()), 1).tolist()
        self.register_buffer("times", times[:-1], persistent=False)
        self.early: DiffusionPolicy | None = None
        """The frozen network of the first `n_early` steps, if they have their own; part of this module's state."""
        self.n_early = 0

    def _parts(self, observations: Tensor, K: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """The first layer's time parts (S, T, width), its state part with bias (S, B K, width), and w_a."""
        w_a, w_t, w_s = self.first_layer()
        labels = self.times.expand(self.n_seeds, -1)
        return torch.bmm(self.embed_time(labels), w_t), self.state_part(observations, w_s, K), w_a

    def noise_levels(self) -> tuple[float, ...]:
        """The ratios k of the T times of training, rising."""
        return tuple(self.prediction.process.ratio(self.times.double()).flip(0).tolist())

    def bc_noise(self, actions: Tensor, generator: torch.Generator) -> DiffusionNoise:
        """Draw what `bc_loss` needs for actions (S, B, A)."""
        i = torch.randint(self.steps, actions.shape[:-1], generator=generator, device=actions.device)
        return DiffusionNoise(i, torch.randn(actions.shape, generator=generator, device=actions.device))

    def bc_loss(
        self, actions: Tensor, observations: Tensor, noise: DiffusionNoise, keep: Tensor | None = None
    ) -> Tensor:
        """L_d = E |eps - eps_theta(a_t, t, s)|^2 (eq. 2), the mean over batch and action dimensions: (S,).

        actions: (S, B, A). observations: (S, B, O). noise: of `bc_noise`. keep: the dropout of a residual network, see
        `ResidualMLP`.
        """
        i, eps = noise
        time_parts, state_part, w_a = self._parts(observations)
        one_hot = (i.unsqueeze(-1) == torch.arange(self.steps, device=i.device)).to(time_parts.dtype)
        # The row of each time, taken by a product: its backward pass is one too, and not a scatter.
        h = torch.baddbmm(state_part, one_hot, time_parts)
        t = self.times[i]
        return denoising_loss(self.prediction, lambda a, t: self.from_parts(h, a, w_a, keep), actions, t, eps).mean(-1)

    def sampling_noise(self, observations: Tensor, generator: torch.Generator, K: int = 1) -> Tensor:
        """Draw what `sample` needs for K actions a state: (T + 1, S, B K, A), the start a_T first."""
        S, B, _ = observations.shape
        shape = (self.steps + 1, S, B * K, self.action_size)
        return torch.randn(shape, generator=generator, device=observations.device)

    def sample(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Sample actions (S, B K, A) by the T steps of the reverse process (eq. 1), see `sampler`; differentiable.

        observations: (S, B, O). noise: (T + 1, S, B K, A), of `sampling_noise`; the K actions of a state in a row.
        """
        denoise = self.step_denoiser(observations, K=self._candidates(observations, noise))
        if not self._beta_steps:
            return self.sampler(denoise, noise[0], noise=noise[1:], clip=(-1.0, 1.0))
        a, *draws = noise.unbind()
        for (f, g, std), t, z in zip(self._beta_steps, self.times.unbind(), draws, strict=True):
            a = (f * denoise(a, t) + g * a + std * z).clamp(-1, 1)
        return a

    def step_denoiser(self, observations: Tensor, first: int = 0, K: int = 1) -> Denoise:
        """The denoiser of one chain, not clamped: to be called once at each time of the grid from step `first` on.

        observations: (S, B, O). K: actions a state, which stand in a row; the state's part is computed once for them.
        """
        own = self._parts(observations, K)
        early = self.early._parts(observations, K) if self.early is not None and first < self.n_early else own
        steps = iter(range(first, self.steps))

        def denoise(a: Tensor, t: Tensor) -> Tensor:
            i = next(steps)
            network, parts = (self.early, early) if self.early is not None and i < self.n_early else (self, own)
            time_parts, state_part, w_a = parts
            c_skip, c_out = self._preconditioning[i]
            eps = network.from_parts(state_part + time_parts[:, i].unsqueeze(1), a, w_a)
            a_0: Tensor = c_skip * a + c_out * eps
            return a_0

        return denoise

    def chain(self, min_std: float = 0.0) -> DenoisingChain:
        """The policy's sampling as a decision process over x (S, B, A); with min_std = 0 it is `sample`, step for step.

        Raises ValueError for the sampler "beta", whose clamped states have no probability density.
        """
        if self._beta_steps:
            raise ValueError("a policy with sampler 'beta' is no decision process: build it with sampler='posterior'")
        grid = torch.cat([self.times, self.times.new_zeros(1)])
        return DenoisingChain(self.prediction.process, grid, eta=1.0, min_std=min_std, clip=(-1.0, 1.0))

    def freeze_start(self, n: int) -> None:
        """Give the first n steps of the chain to a frozen copy of the network as it stands; n = 0: to none.

        Raises ValueError where no step would be left.
        """
        if not 0 <= n < self.steps:
            raise ValueError(f"n must be from 0 to {self.steps - 1}, got {n}")
        self.early = None
        if n:
            self.early = deepcopy(self).requires_grad_(False)
        self.n_early = n

    def denoiser(self, observations: Tensor) -> Denoise:
        """D(a_t, t) = E[a_0 | a_t, s], clamped to [-1, 1]; at times of the first `n_early` steps, by `early`."""
        own = super().denoiser(observations)
        if self.early is None:
            return own
        # Between two times of the grid: a level turned into a time and back is a rounding away from it.
        early, switch = self.early.denoiser(observations), self.times[self.n_early - 1 : self.n_early + 1].mean()

        def denoise(a: Tensor, t: Tensor) -> Tensor:
            return torch.where((t >= switch).unsqueeze(-1), early(a, t), own(a, t))

        return denoise


def build_policy(
    agent: Agent,
    config: DiffusionBC | DiffusionQL | IDQL,
    blocks: int = 0,
    sampler: ReverseVariance = "posterior",
) -> DiffusionPolicy:
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
        sampler=sampler,
    ).to(agent.device)
