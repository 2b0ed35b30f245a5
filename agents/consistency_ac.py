"""Consistency-AC: Consistency Models as a Rich and Efficient Policy Class (Ding & Jin, ICLR 2024), arXiv 2309.16984.

Diffusion-QL with a consistency policy in the place of the diffusion policy: L_d is the consistency loss, and an action
takes T = 2 calls of the network instead of 5. See `ConsistencyPolicy` for the three forms of that loss.

What the published code leaves open, and what is done here:
- its number of noise levels grows from 2 to 150 within each call of its `train`, which makes 50,000 steps, and starts
  over at the next: here it grows once, over `boundaries_steps`, as the schedule is meant;
- its setting `scale_consis_loss` never reaches the agent, so that the weight 100 / (t - r) is always on: so it is here;
- for T = 1 its sampling level, linspace(2, 80, 1), is 2, and its noise of size 80: here the level is 80;
- `q_norm` divides the critics' targets by their deviation over the batch, which leaves Q without a fixed scale: kept as
  an option, for the published settings.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from agents.base import Metrics
from agents.config import ConsistencyAC
from agents.consistency_policy import ConsistencyNoise, ConsistencyPolicy
from agents.diffusion_ql import QWeightedAgent
from diffrl.data.transitions import Batch


class ConsistencyACNoise(NamedTuple):
    """All that is random in `ConsistencyACAgent.actor_loss`."""

    cloning: ConsistencyNoise
    """What is random in the policy's `bc_loss`."""
    sampling: Tensor
    """(T, S, B, A) noise of the policy's `sample`."""
    coin: Tensor
    """(S, 1), drawn by `QWeightedAgent.coin`."""


class ConsistencyACAgent(QWeightedAgent[ConsistencyACNoise]):
    """Consistency-AC. Shapes: S seeds, B batch, O observation size, A action size."""

    config: ConsistencyAC
    actor: ConsistencyPolicy
    ema_actor: ConsistencyPolicy

    @override
    def make_actor(self) -> ConsistencyPolicy:
        sigma_min, sigma_max = self.config.noise_range
        return ConsistencyPolicy(
            self.observation_size,
            self.action_size,
            self.generators,
            width=self.config.width,
            layers=self.config.layers,
            steps=self.config.denoising_steps,
            form=self.config.form,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
        ).to(self.device)

    @torch.no_grad()
    @override
    def target(self, batch: Batch, noise: Tensor) -> Tensor:
        """Diffusion-QL's target y (S, B); with q_norm divided by its standard deviation over the batch."""
        y = super().target(batch, noise)
        return y / (y.std(-1, keepdim=True) + 1e-6) if self.config.q_norm else y

    @override
    def actor_noise(self, batch: Batch, generator: torch.Generator) -> ConsistencyACNoise:
        config = self.config
        cloning = self.actor.bc_noise(
            batch.actions,
            generator,
            self.step,
            config.boundaries_steps,
            config.boundaries_start,
            config.boundaries_end,
        )
        sampling = self.actor.sampling_noise(batch.observations, generator)
        return ConsistencyACNoise(cloning, sampling, self.coin(generator))

    @override
    def actor_loss(self, batch: Batch, noise: ConsistencyACNoise) -> tuple[Tensor, Metrics]:
        """The consistency loss + eta L_q (Diffusion-QL's eq. 3): (S,), its parts as metrics bc_loss and q_loss."""
        bc_loss = self.actor.bc_loss(batch.actions, batch.observations, noise.cloning, self.ema_actor)
        actions = self.actor.sample(batch.observations, noise.sampling)
        return self.weighted(bc_loss, batch.observations, actions, noise.coin)
