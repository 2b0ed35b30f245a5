"""TD3+BC: A Minimalist Approach to Offline Reinforcement Learning (Fujimoto & Gu, NeurIPS 2021), arXiv 2106.06860.

A deterministic actor pi climbs

    E [lambda Q_1(s, pi(s)) - |pi(s) - a|^2],    lambda = alpha / E |Q_1(s, pi(s))|                        (eq. 3, 5)

and the critics follow TD3 (arXiv 1802.09477):

    y = r + gamma min_i Q'_i(s', pi'(s') + eps),    eps ~ clip(N(0, policy_noise^2), +-noise_clip),

the actor and all targets moving at every second step (`policy_delay`). Settings as CORL runs it: 2 x 256 ReLU, Adam
3e-4, observations normalised.
"""

from abc import abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from agents.base import Agent, Metrics
from agents.config import TD3BC, TD3Config
from agents.critic import CriticEnsemble, aggregate, td_error, td_target
from diffrl.data.next_actions import AnyBatch
from diffrl.nets import MLP, Adam, average_, frozen


class TD3Agent(Agent):
    """An agent on TD3. A subclass adds what its actor descends, and what else is in the critics' target.

    norm_after: layer normalisation in the critics stands after the activation. Shapes: S seeds, B batch, O observation
    size, A action size.
    """

    config: TD3Config
    value_metrics = ("q",)
    compilable = ("critic_loss", "actor_loss")

    def __init__(
        self,
        config: TD3Config,
        observation_size: int,
        action_size: int,
        seeds: Sequence[int],
        device: str,
        norm_after: bool = False,
    ) -> None:
        super().__init__(config, observation_size, action_size, seeds, device)
        self.period = config.policy_delay
        size: dict[str, Any] = {"width": config.width, "layers": config.layers, "activation": torch.relu}
        self.actor = MLP((self.n_seeds,), observation_size, action_size, self.generators, **size).to(self.device)
        sizes = (observation_size, action_size, self.generators)
        self.critic = CriticEnsemble(*sizes, config, torch.relu, norm_after).to(self.device)
        self.target_actor = deepcopy(self.actor).requires_grad_(False)
        self.target_critic = deepcopy(self.critic).requires_grad_(False)
        self.frozen_critic = frozen(self.critic)
        self.networks = {
            "actor": self.actor,
            "critic": self.critic,
            "target_actor": self.target_actor,
            "target_critic": self.target_critic,
        }
        self.optimisers = {
            "actor": Adam(self.actor, config.actor_lr),
            "critic": Adam(self.critic, config.critic_lr),
        }
        self._nothing = torch.zeros(self.n_seeds, device=self.device)

    def smoothed(self, batch: AnyBatch, noise: Tensor) -> Tensor:
        """The target's actions clip(pi'(s') + eps) (S, B, A); noise as in `target`."""
        eps = (self.config.policy_noise * noise).clamp(-self.config.noise_clip, self.config.noise_clip)
        return (torch.tanh(self.target_actor(batch.next_observations)) + eps).clamp(-1, 1)

    @torch.no_grad()
    def target(self, batch: AnyBatch, noise: Tensor) -> Tensor:
        """y = r + gamma (1 - terminal) min_i Q'_i(s', clip(pi'(s') + eps)): (S, B).

        noise: (S, B, A), standard normal; eps is that noise, scaled and clipped.
        """
        actions = self.smoothed(batch, noise)
        q = aggregate(self.target_critic(batch.next_observations, actions), self.config.q_agg, self.config.q_spread)
        return td_target(batch, q, self.config.discount)

    def critic_loss(self, batch: AnyBatch, noise: Tensor) -> tuple[Tensor, Metrics]:
        """E (y - Q_i(s, a))^2, summed over the critics: (S,). noise: as in `target`."""
        q = self.critic(batch.observations, batch.actions)
        loss = td_error(q, self.target(batch, noise))
        return loss, {"critic_loss": loss.detach(), "q": q.detach().mean((1, 2))}

    @abstractmethod
    def actor_loss(self, batch: AnyBatch) -> tuple[Tensor, Metrics]:
        """What the actor descends: (S,), with the metrics `bc_loss` and `q_loss`."""

    def update(self, batch: AnyBatch, generator: torch.Generator, phase: int = 0) -> Metrics:
        """One step of the critics; in the period's last phase also one of the actor and of the averages."""
        noise = torch.randn(batch.actions.shape, generator=generator, device=self.device)
        critic_loss, metrics = self.critic_loss(batch, noise)
        metrics = {**metrics, "critic_grad_norm": self.optimisers["critic"].step(critic_loss)}
        # What is logged is the mean over all steps: 0 where the actor rests, times the period where it moves.
        actor_metrics = dict.fromkeys(("bc_loss", "q_loss", "actor_grad_norm"), self._nothing)
        if phase == self.period - 1:
            actor_loss, parts = self.actor_loss(batch)
            parts = {**parts, "actor_grad_norm": self.optimisers["actor"].step(actor_loss)}
            actor_metrics = {name: self.period * value for name, value in parts.items()}
            average_(self.target_critic, self.critic, self.config.target_rate)
            average_(self.target_actor, self.actor, self.config.target_rate)
        self.step += 1
        return metrics | actor_metrics

    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """The actor's one action a state, tanh of its output: (S, B, A) for observations (S, B, O)."""
        return torch.tanh(self.actor(observations))


class TD3BCAgent(TD3Agent):
    """TD3+BC. Shapes: S seeds, B batch, O observation size, A action size."""

    config: TD3BC

    def actor_loss(self, batch: AnyBatch) -> tuple[Tensor, Metrics]:
        """-lambda E Q_1(s, pi(s)) + E |pi(s) - a|^2, the mean over action dimensions as in the authors' code: (S,)."""
        actions = torch.tanh(self.actor(batch.observations))
        q = self.frozen_critic(batch.observations, actions)
        how = self.config.actor_q
        q = q[:, 0] if how == "first" else aggregate(q, how, self.config.q_spread)
        q_loss = -q.mean(-1) / q.detach().abs().mean(-1)
        bc_loss = (actions - batch.actions).square().mean((-2, -1))
        loss = bc_loss + self.config.alpha * q_loss
        return loss, {"bc_loss": bc_loss.detach(), "q_loss": q_loss.detach()}
