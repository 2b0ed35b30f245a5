"""The consistency policy: from noise to an action in one step, or a few (Ding & Jin 2024, arXiv 2309.16984)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from agents.base import GenerativePolicy
from diffrl.diffusion import (
    VE,
    Boundaries,
    Denoise,
    KarrasBoundary,
    Prediction,
    consistency_loss,
    consistency_sample,
    n_boundaries,
)
from diffrl.diffusion.process import check_times
from diffrl.support.errors import UserError


class ConsistencyNoise(NamedTuple):
    """All that is random in `ConsistencyPolicy.bc_loss`."""

    t: Tensor
    """(S, B) noise levels."""
    r: Tensor
    """(S, B) the level next below each t."""
    z: Tensor
    """(S, B, A) standard normal noise on the actions."""


class ConsistencyPolicy(GenerativePolicy):
    """f_theta(a_t, t, s) on VE, the noise levels sigma_min to sigma_max, trained by consistency training.

    form "published": that of the paper's code. The boundary is at sigma_min (`KarrasBoundary`), the network gets a_t
        and t as they are, neighbouring levels are drawn uniformly, the goal is an averaged network's, and the loss is
        100 / (t - r) times the mean square. Sampled at the levels linspace(2, sigma_max, T).
    form "improved": what iCT (Song & Dhariwal 2024, arXiv 2310.14189) changed, on EDM's preconditioning: the boundary
        is at 0, the inputs are scaled, low levels are drawn more often, the goal is the network's own, the loss
        1 / (t - r) times the pseudo-Huber distance. The number of levels grows as published, not by doubling. Sampled
        at levels evenly spaced in log k, 80 and 0.4 for T = 2, each answer clamped to [-1, 1].
    form "angular": ours, for broad data and much weight on Q. As improved, but the levels go from 0.02 to 5, log k ~
        N(-0.5, 1), and the loss is the mean square over theta_t - theta_r, tan(theta) = k / c_d, the angle of TrigFlow
        (arXiv 2410.11081): every level bears the same rate of change df/dtheta, however many levels there are.

    Why there is a third form: Q's gradient enters where the function is sampled, first of all at sigma_max, and cloning
    has to hold the function there. With iCT's weight and levels up to 80, one row in a hundred lies near the top, and
    weighs a ten-thousandth of one at the lowest level; Q pushes such a function out of [-1, 1], where the clamp of the
    action leaves it no gradient to come back by. It uses the square, not the pseudo-Huber distance, because the
    square's pull grows with the departure from the data, as that of Diffusion-QL's loss does. The price: clouds of
    actions as narrow as the levels that are seldom drawn, 0.05 say, come out blurred.
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
        form: str,
        sigma_min: float,
        sigma_max: float,
        data_std: float = 0.5,
    ) -> None:
        super().__init__(observation_size, action_size, generators, width=width, layers=layers)
        self.steps, self.form, self.improved = steps, form, form != "published"
        self.prediction = Prediction("edm", VE(), data_std)
        self.boundary = KarrasBoundary(data_std, sigma_min)
        self.boundaries = Boundaries(VE(), sigma_min, sigma_max)
        self.eps = 0.0 if self.improved else sigma_min
        dtype = torch.get_default_dtype()
        if self.improved:
            times = self.prediction.process.grid(steps, sigma_min, sigma_max, dtype=dtype)[:-1]
        else:
            times = torch.linspace(sigma_max, 2.0, steps, dtype=dtype)
        check_times(self.prediction.process, times)
        self.register_buffer("times", times, persistent=False)

    def function(self, observations: Tensor, K: int = 1) -> Denoise:
        """f_theta with its observations (S, B, O) bound: a function of a_t (S, B K, A) and t () or (S, B K)."""
        network = self.bound(observations, K)
        return self.prediction.denoiser(network) if self.improved else self.boundary.denoiser(network)

    def denoiser(self, observations: Tensor) -> Denoise:
        """Raises UserError: the function says where the path through a_t ends, which is not the mean of a_0."""
        raise UserError(
            "A consistency policy has no denoiser to diagnose: its function gives the end of a path, not the mean of "
            "the data. Diagnose a policy it could have been distilled from, such as diffusion_bc's."
        )

    def noise_levels(self) -> tuple[float, ...]:
        """Eight ratios k over the range of training, evenly spaced in log k."""
        low, high = self.boundaries.k_min, self.boundaries.k_max
        return tuple(low * (high / low) ** (i / 7) for i in range(8))

    def bc_noise(
        self, actions: Tensor, generator: torch.Generator, step: Tensor, total: int, start: int, end: int
    ) -> ConsistencyNoise:
        """Draw what `bc_loss` needs for actions (S, B, A) at training step `step`, a tensor ().

        t and r are neighbours among N levels; N grows from `start` to `end` over `total` steps, see `n_boundaries`.
        """
        u = torch.rand(actions.shape[:-1], generator=generator, device=actions.device, dtype=actions.dtype)
        n = n_boundaries(step, total, start, end)
        lognormal = {"improved": (-1.1, 2.0), "angular": (-0.5, 1.0)}.get(self.form)
        t, r = self.boundaries.draw_times(u, n, lognormal=lognormal)
        z = torch.randn(actions.shape, generator=generator, device=actions.device, dtype=actions.dtype)
        return ConsistencyNoise(t, r, z)

    def bc_loss(
        self, actions: Tensor, observations: Tensor, noise: ConsistencyNoise, average: "ConsistencyPolicy"
    ) -> Tensor:
        """The consistency loss, the mean over the batch: (S,).

        actions: (S, B, A). observations: (S, B, O). noise: of `bc_noise`. average: the averaged policy, whose answer
        is the goal in the form "published".
        """
        t, r, z = noise
        process, f = self.prediction.process, self.function(observations)
        if self.form == "angular":
            loss = consistency_loss(process, f, actions, t, r, z, weighting=self._angle_weight)
        elif self.form == "improved":
            loss = consistency_loss(process, f, actions, t, r, z, weighting="gap", metric="huber")
        else:
            loss = consistency_loss(
                process,
                f,
                actions,
                t,
                r,
                z,
                target=average.function(observations),
                weighting=lambda k_t, k_r: 100 / (k_t - k_r),
            )
        return loss.mean(-1)

    def _angle_weight(self, k_t: Tensor, k_r: Tensor) -> Tensor:
        """1 / (theta_t - theta_r), tan(theta) = k / c_d, as one arctangent: their difference would cancel."""
        c = self.prediction.data_std
        return 1 / torch.atan(c * (k_t - k_r) / (c**2 + k_t * k_r))

    def sampling_noise(self, observations: Tensor, generator: torch.Generator, K: int = 1) -> Tensor:
        """Draw what `sample` needs for K actions a state: (T, S, B K, A), the start first."""
        S, B, _ = observations.shape
        shape = (self.steps, S, B * K, self.action_size)
        return torch.randn(shape, generator=generator, device=observations.device)

    def sample(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Sample actions (S, B K, A) by T calls of the function, clamped to [-1, 1] at the end; differentiable."""
        f = self.function(observations, self._candidates(observations, noise))
        start = self.boundaries.k_max * noise[0]
        clip = (-1.0, 1.0) if self.improved else None
        process, times = self.prediction.process, self.times
        actions = consistency_sample(f, process, start, times, noise=noise[1:], clip=clip, eps=self.eps, check=False)
        return actions.clamp(-1, 1)
