"""The diffusion policy of EDP and Q-guidance: in continuous time, sampled by any solver of the probability-flow ODE."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from agents.base import GenerativePolicy
from diffrl.diffusion import VP, Denoise, Kind, Prediction, Sampler, discrete_grid

_TRAINING_STEPS = 1000


class SolverNoise(NamedTuple):
    """All that is random in a denoising loss of a `SolverPolicy`."""

    t: Tensor
    """(S, B) times, uniform over the schedule's."""
    eps: Tensor
    """(S, B, A) standard normal noise on the actions."""


class SolverPolicy(GenerativePolicy):
    """A policy trained at the 1,000 times of a discrete schedule on VP, and sampled in few steps over the same levels.

    kind: what the network predicts, see `Prediction`; data_std: that of the actions, for kind "edm".
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
        kind: Kind,
        schedule: str,
        steps: int,
        solver: str,
        data_std: float = 0.5,
    ) -> None:
        super().__init__(observation_size, action_size, generators, width=width, layers=layers)
        process = VP()
        self.prediction = Prediction(kind, process, data_std)
        times = discrete_grid(schedule, _TRAINING_STEPS, dtype=torch.float64)[:-1]
        k = process.ratio(times)
        self._k_min, self._k_max = float(k[-1]), float(k[0])
        # Uniform in log-SNR, as DPM-Solver has it; the last step goes on to the data.
        grid = process.grid(steps, self._k_min, self._k_max, to_zero=True, dtype=torch.float64)
        self.solver, self.sampler = solver, Sampler(process, grid, solver)
        self._start = float(process.sigma(grid[0]))
        self.register_buffer("times", times.to(torch.get_default_dtype()), persistent=False)

    def noise_levels(self) -> tuple[float, ...]:
        """Eight ratios k over the range of training, evenly spaced in log k."""
        ratio = (self._k_max / self._k_min) ** (1 / 7)
        return tuple(self._k_min * ratio**i for i in range(8))

    def bc_noise(self, actions: Tensor, generator: torch.Generator) -> SolverNoise:
        """Draw what a denoising loss of actions (S, B, A) needs."""
        i = torch.randint(_TRAINING_STEPS, actions.shape[:-1], generator=generator, device=actions.device)
        return SolverNoise(self.times[i], torch.randn(actions.shape, generator=generator, device=actions.device))

    def sampling_noise(self, observations: Tensor, generator: torch.Generator, K: int = 1) -> Tensor:
        """Draw the starts of K paths a state: (S, B K, A)."""
        S, B, _ = observations.shape
        return torch.randn((S, B * K, self.action_size), generator=generator, device=observations.device)

    def sample(
        self, observations: Tensor, noise: Tensor, guide: Callable[[Denoise], Denoise] = lambda denoise: denoise
    ) -> Tensor:
        """Sample actions (S, B K, A) by the solver, D clamped to [-1, 1]; differentiable.

        observations: (S, B, O). noise: (S, B K, A), of `sampling_noise`. guide: changes the denoiser before its answer
        is clamped.
        """
        network = self.bound(observations, self._candidates(observations, noise))
        denoise = guide(self.prediction.denoiser(network))
        return self.sampler(denoise, self._start * noise, clip=(-1.0, 1.0))
