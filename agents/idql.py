"""IDQL: Implicit Q-Learning as an Actor-Critic Method with Diffusion Policies (Hansen-Estruch et al. 2023).

arXiv 2304.10573. A diffusion policy clones the data's, by itself; IQL's critics (`expectile.py`) learn beside it, and
meet it only in acting: of N actions drawn, the one with the largest min_i Q'_i is taken (algorithm 2).

As the authors run it: ReLU in critics and value function, Mish in the policy; the policy's learning rate on a cosine
(`lr_decay_steps`); their sampler (`sampler="beta"`), whose wider noise spreads the candidates. Their AdamW has no
weight decay, which makes it Adam. What is different here:
- one batch a step serves all (the authors draw 512 rows, of which the critics take the first 256);
- V(s') in the critics' target is that of before V's step, as CORL has it (theirs: after it);
- the time is embedded as in Diffusion-QL (theirs: 64 learned Fourier features and an MLP 128 wide), layers are
  initialised as `torch.nn.Linear` (theirs: scaled by the average of the fans);
- all of the data are trained on (theirs: 95 %, the rest held out).
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
        super().__init__(config, observation_size, action_size, seeds, device, activation=torch.relu)
        self.actor = build_policy(self, config, blocks=config.blocks, sampler=config.sampler)
        self.ema_actor = deepcopy(self.actor).requires_grad_(False)
        self.networks |= {"actor": self.actor, "ema_actor": self.ema_actor}
        self.optimisers["actor"] = Adam(self.actor, config.actor_lr, config.grad_clip, config.lr_decay_steps)

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
