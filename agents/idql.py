"""IDQL: Implicit Q-Learning as an Actor-Critic Method with Diffusion Policies (Hansen-Estruch et al. 2023).

arXiv 2304.10573. A diffusion policy clones the data's, by itself; IQL's critics (`expectile.py`) learn beside it, and
meet it only in acting: of N actions drawn, the one with the largest min_i Q'_i is taken (algorithm 2).
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor

from agents.base import Metrics
from agents.config import IDQL
from agents.critic import choose, gumbel_noise
from agents.diffusion_policy import build_policy
from agents.expectile import ExpectileAgent
from diffrl.data.transitions import Batch
from diffrl.nets import Adam, average_, dropout_mask


class IDQLAgent(ExpectileAgent):
    """See the module. Shapes: S seeds, B batch, K candidates, O observation size, A action size."""

    config: IDQL
    acting = ("draw",)
    generative = "ema_actor"

    def __init__(
        self, config: IDQL, observation_size: int, action_size: int, seeds: Sequence[int], device: str
    ) -> None:
        super().__init__(config, observation_size, action_size, seeds, device)
        self.actor = build_policy(self, config, blocks=config.blocks)
        self.ema_actor = deepcopy(self.actor).requires_grad_(False)
        self.networks |= {"actor": self.actor, "ema_actor": self.ema_actor}
        self.optimisers["actor"] = Adam(self.actor, config.actor_lr, config.grad_clip)

    def actor_loss(self, batch: Batch, i: Tensor, eps: Tensor, keep: Tensor) -> Tensor:
        """Denoising score matching on actions, with dropout: (S,)."""
        return self.actor.bc_loss(batch.actions, batch.observations, i, eps, keep)

    def update(self, batch: Batch, generator: torch.Generator, phase: int = 0) -> Metrics:
        """One step of V, the critics and the policy."""
        _, metrics = self.update_critics(batch)
        i, eps = self.actor.bc_noise(batch.actions, generator)
        shape = (self.config.blocks, *batch.actions.shape[:-1], self.config.width)
        loss = self.actor_loss(batch, i, eps, dropout_mask(shape, self.config.dropout, generator))
        norm = self.optimisers["actor"].step(loss)
        average_(self.ema_actor, self.actor, self.config.ema_rate)
        self.step += 1
        return metrics | {"bc_loss": loss.detach(), "actor_grad_norm": norm}

    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """The best of N actions drawn from the averaged policy, by min_i Q'_i."""
        K = self.config.act_candidates
        noise = self.ema_actor.sampling_noise(observations, generator, K)
        return self.draw(observations, noise, gumbel_noise((*observations.shape[:-1], K), generator))

    def draw(self, observations: Tensor, noise: Tensor, gumbel: Tensor) -> Tensor:
        """`act` as a function of its noise."""
        actions = self.ema_actor.sample(observations, noise)
        q = self.target_critic(observations.repeat_interleave(gumbel.shape[-1], dim=1), actions)
        return choose(actions, self.aggregate(q), gumbel, self.config.act_temperature)
