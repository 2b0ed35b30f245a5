"""Consistency-AC: Consistency Models as a Rich and Efficient Policy Class (Ding & Jin, ICLR 2024), arXiv 2309.16984.

Diffusion-QL with a consistency policy in the place of the diffusion policy: L_d is the consistency loss, and an action
takes T = 2 calls of the network instead of 5. See `ConsistencyPolicy` for the two forms of it.

What the published code leaves open, and what is done here:
- its number of noise levels grows from 2 to 150 within each call of its `train`, which makes 50,000 steps, and starts
  over at the next: here it grows once, over `boundaries_steps`, as the schedule is meant;
- its setting `scale_consis_loss` never reaches the agent, so that the weight 100 / (t - r) is always on: so it is here;
- for T = 1 its sampling level, linspace(2, 80, 1), is 2, and its noise of size 80: here the level is 80;
- `q_norm` divides the critics' targets by their deviation over the batch, which leaves Q without a fixed scale: kept as
  an option, for the published settings.
"""

import torch
from torch import Tensor

from agents.base import Metrics
from agents.config import ConsistencyAC
from agents.consistency_policy import ConsistencyPolicy
from agents.diffusion_ql import QWeightedAgent
from diffrl.data.transitions import Batch


class ConsistencyACAgent(QWeightedAgent):
    """See the module, and `QWeightedAgent`."""

    config: ConsistencyAC
    actor: ConsistencyPolicy
    ema_actor: ConsistencyPolicy

    def make_actor(self) -> ConsistencyPolicy:
        """See `QWeightedAgent`."""
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
    def target(self, batch: Batch, noise: Tensor) -> Tensor:
        """See `QWeightedAgent`; with q_norm divided by its deviation over the batch."""
        y = super().target(batch, noise)
        return y / (y.std(-1, keepdim=True) + 1e-6) if self.config.q_norm else y

    def actor_noise(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, ...]:
        """t, r, z, noise, coin of `actor_loss`."""
        config = self.config
        t, r, z = self.actor.bc_noise(
            batch.actions,
            generator,
            self.step,
            config.boundaries_steps,
            config.boundaries_start,
            config.boundaries_end,
        )
        return t, r, z, self.actor.sampling_noise(batch.observations, generator), self.coin(generator)

    def actor_loss(self, batch: Batch, *noise: Tensor) -> tuple[Tensor, Metrics]:
        """Consistency loss + eta L_q: (S,). noise: t, r, z of the policy's `bc_loss`, that of `sample`, the coin."""
        t, r, z, sampling, coin = noise
        bc_loss = self.actor.bc_loss(batch.actions, batch.observations, t, r, z, self.ema_actor)
        return self.weighted(bc_loss, batch.observations, self.actor.sample(batch.observations, sampling), coin)
