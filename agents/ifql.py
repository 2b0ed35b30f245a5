"""IFQL: implicit flow Q-learning, IDQL with a flow (Park, Li & Levine, ICML 2025, arXiv 2502.02538, appendix).

A flow clones the data's policy by flow matching (`flow_policy.py`), by itself; IQL's critics (`expectile.py`) learn
beside it, and meet it only in acting: of N sampled actions, the one with the largest min_i Q_i is taken. As its authors
run it the online critics choose (IDQL's: the target ones), the expectile is 0.9, and networks are FQL's, 4 x 512 GELU
with layer normalisation in critics and value function (see `fql.py` for `networks`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from agents.base import Metrics
from agents.critic import choose
from agents.expectile import ExpectileAgent
from agents.expectile_config import IFQL
from agents.flow_policy import FlowPolicy, time_size
from diffrl.data.transitions import Batch
from diffrl.nets import Adam, initialise_fan_average_


class IFQLAgent(ExpectileAgent):
    """IFQL. Shapes: S seeds, B batch, K candidates (the paper's N), O observation size, A action size."""

    config: IFQL
    acting = ("act_from",)

    def __init__(
        self, config: IFQL, observation_size: int, action_size: int, seeds: Sequence[int], device: str
    ) -> None:
        published, gelu = config.networks == "published", torch.nn.functional.gelu
        super().__init__(config, observation_size, action_size, seeds, device, gelu, norm_after=published)
        self.actor = FlowPolicy(
            *(observation_size, action_size, self.generators),
            steps=config.flow_steps,
            time_size=time_size(config.networks),
            width=config.width,
            layers=config.layers,
            activation=gelu,
        ).to(self.device)
        self.networks["actor"] = self.actor
        if published:
            for network in (self.value, self.critic, self.actor):
                initialise_fan_average_(network, self.generators)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.optimisers["actor"] = Adam(self.actor, config.actor_lr)

    def actor_loss(self, batch: Batch, t: Tensor, z: Tensor) -> Tensor:
        """Flow matching: (S,). t: (S, B), uniform on (0, 1]; z: (S, B, A), standard normal."""
        return self.actor.matching_loss(batch.actions, batch.observations, t, z)

    def update(self, batch: Batch, generator: torch.Generator, phase: int = 0) -> Metrics:
        """One step of V, the critics and the flow."""
        _, metrics = self.update_critics(batch)
        loss = self.actor_loss(batch, *self.actor.matching_noise(batch.actions, generator))
        norm = self.optimisers["actor"].step(loss)
        self.step += 1
        return metrics | {"bc_loss": loss.detach(), "actor_grad_norm": norm}

    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """The best of N actions sampled from the flow, by min_i Q_i: (S, B, A) for observations (S, B, O)."""
        return self.act_from(
            observations, self.actor.sampling_noise(observations, generator, self.config.act_candidates)
        )

    def act_from(self, observations: Tensor, noise: Tensor) -> Tensor:
        """The actions (S, B, A) of `act`, as a plain function of tensors: of observations (S, B, O) and its noise."""
        S, B, _ = observations.shape
        K = noise.shape[1] // B
        actions = self.actor.sample(observations, noise)
        q = self.aggregate(self.critic(observations.repeat_interleave(K, dim=1), actions))
        return choose(actions, q, torch.zeros(S, B, K, device=q.device), 0.0)
