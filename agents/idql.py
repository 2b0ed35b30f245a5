"""IDQL: Implicit Q-Learning as an Actor-Critic Method with Diffusion Policies (Hansen-Estruch et al. 2023).

arXiv 2304.10573. A diffusion policy clones the data's, by itself; IQL's critics (`expectile.py`) learn beside it, and
meet it only in acting: of N sampled actions, the one with the largest min_i Q'_i is taken (algorithm 2).

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
from typing import NamedTuple

import torch
from torch import Tensor

from agents.base import Metrics
from agents.critic import CandidateNoise, choose, gumbel_noise
from agents.diffusion_policy import DiffusionNoise, build_policy
from agents.expectile import ExpectileAgent
from agents.expectile_config import IDQL
from diffrl.data.transitions import Batch
from diffrl.nets import Adam, average_, dropout_mask


class IDQLNoise(NamedTuple):
    """All that is random in `IDQLAgent.actor_loss`."""

    cloning: DiffusionNoise
    """What is random in the policy's `bc_loss`."""
    keep: Tensor
    """(blocks, S, B, width) factors of dropout, see `dropout_mask`."""


class IDQLAgent(ExpectileAgent):
    """IDQL. Shapes: S seeds, B batch, K candidates, O observation size, A action size."""

    config: IDQL
    acting = ("act_from",)
    generative = "ema_actor"

    def __init__(
        self, config: IDQL, observation_size: int, action_size: int, seeds: Sequence[int], device: str
    ) -> None:
        super().__init__(config, observation_size, action_size, seeds, device, activation=torch.relu)
        self.actor = build_policy(self, config, blocks=config.blocks, sampler=config.sampler)
        self.ema_actor = deepcopy(self.actor).requires_grad_(False)
        self.networks |= {"actor": self.actor, "ema_actor": self.ema_actor}
        self.optimisers["actor"] = Adam(self.actor, config.actor_lr, config.grad_clip, config.lr_decay_steps)

    def actor_noise(self, batch: Batch, generator: torch.Generator) -> IDQLNoise:
        """Draw all that is random in `actor_loss` for a batch (S, B, ...)."""
        cloning = self.actor.bc_noise(batch.actions, generator)
        shape = (self.config.blocks, *batch.actions.shape[:-1], self.config.width)
        return IDQLNoise(cloning, dropout_mask(shape, self.config.dropout, generator))

    def actor_loss(self, batch: Batch, noise: IDQLNoise) -> Tensor:
        """Denoising score matching on actions, with dropout: (S,). noise: of `actor_noise`."""
        return self.actor.bc_loss(batch.actions, batch.observations, noise.cloning, noise.keep)

    def update(self, batch: Batch, generator: torch.Generator, phase: int = 0) -> Metrics:
        """One step of V, the critics and the policy."""
        _, metrics = self.update_critics(batch)
        loss = self.actor_loss(batch, self.actor_noise(batch, generator))
        norm = self.optimisers["actor"].step(loss)
        average_(self.ema_actor, self.actor, self.config.ema_rate)
        self.step += 1
        return metrics | {"bc_loss": loss.detach(), "actor_grad_norm": norm}

    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """The best of N actions sampled from the averaged policy, by min_i Q'_i."""
        K = self.config.act_candidates
        noise = self.ema_actor.sampling_noise(observations, generator, K)
        gumbel = gumbel_noise((*observations.shape[:-1], K), generator)
        return self.act_from(observations, CandidateNoise(noise, gumbel))

    def act_from(self, observations: Tensor, noise: CandidateNoise) -> Tensor:
        """The actions (S, B, A) of `act`, as a plain function of tensors: of observations (S, B, O) and its noise."""
        actions = self.ema_actor.sample(observations, noise.sampling)
        q = self.target_critic(observations.repeat_interleave(noise.gumbel.shape[-1], dim=1), actions)
        return choose(actions, self.aggregate(q), noise.gumbel, self.config.act_temperature)
