"""IQL: Offline Reinforcement Learning with Implicit Q-Learning (Kostrikov, Nair & Levine, ICLR 2022), arXiv 2110.06169.

The critics are in `expectile.py`. The policy is cloned from the data with advantage weights (eq. 7):

    L_pi = -E exp(beta u) log pi(a | s),    u = min_i Q'_i(s, a) - V(s),    exp(beta u) <= max_weight.

Settings as CORL runs it: 2 x 256 ReLU, Adam 3e-4, the actor's rate on a cosine; a Gaussian whose mean is tanh of the
network and whose deviation does not depend on the state.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from agents.base import Metrics
from agents.expectile import ExpectileAgent
from agents.expectile_config import IQL
from diffrl.data.transitions import Batch
from diffrl.nets import MLP, Adam


class GaussianActor(nn.Module):
    """N(tanh(f(s)), diag(e^log_std)^2), log_std clamped to [-20, 2]: observations (S, B, O) -> means (S, B, A)."""

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        generators: Sequence[torch.Generator],
        *,
        width: int,
        layers: int,
    ) -> None:
        super().__init__()
        stack = (len(generators),)
        self.mlp = MLP(
            stack, observation_size, action_size, generators, width=width, layers=layers, activation=torch.relu
        )
        self.log_std = nn.Parameter(torch.zeros(*stack, 1, action_size))

    def forward(self, observations: Tensor) -> Tensor:
        """The means tanh(f(s)) (S, B, A) at observations (S, B, O)."""
        return torch.tanh(self.mlp(observations))

    def log_prob(self, means: Tensor, actions: Tensor) -> Tensor:
        """log N(actions; means), summed over the action's dimensions: (S, B)."""
        log_std = self.log_std.clamp(-20.0, 2.0)
        z = (actions - means) * torch.exp(-log_std)
        return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


class IQLAgent(ExpectileAgent):
    """IQL. Shapes: S seeds, B batch, O observation size, A action size."""

    config: IQL

    def __init__(self, config: IQL, observation_size: int, action_size: int, seeds: Sequence[int], device: str) -> None:
        super().__init__(config, observation_size, action_size, seeds, device, activation=torch.relu)
        self.actor = GaussianActor(
            observation_size, action_size, self.generators, width=config.width, layers=config.layers
        ).to(self.device)
        if config.deterministic:
            self.actor.log_std.requires_grad_(False)
        self.networks["actor"] = self.actor
        trained = self.actor.mlp if config.deterministic else self.actor
        self.optimisers["actor"] = Adam(trained, config.actor_lr, decay_steps=config.lr_decay_steps)

    def actor_loss(self, batch: Batch, advantages: Tensor) -> tuple[Tensor, Metrics]:
        """L_pi (eq. 7): (S,). With `deterministic`, |mean - a|^2 takes the place of -log pi, as in CORL.

        advantages: u (S, B).
        """
        weight = torch.exp(self.config.beta * advantages).clamp(max=self.config.max_weight)
        means = self.actor(batch.observations)
        if self.config.deterministic:
            cost = (means - batch.actions).square().sum(-1)
        else:
            cost = -self.actor.log_prob(means, batch.actions)
        loss = (weight * cost).mean(-1)
        return loss, {"actor_loss": loss.detach(), "advantage_weight": weight.mean(-1)}

    def update(self, batch: Batch, generator: torch.Generator, phase: int = 0) -> Metrics:
        """One step of V, the critics and the actor."""
        advantages, metrics = self.update_critics(batch)
        actor_loss, actor_metrics = self.actor_loss(batch, advantages)
        norm = self.optimisers["actor"].step(actor_loss)
        self.step += 1
        return metrics | actor_metrics | {"actor_grad_norm": norm}

    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """The policy's mean at each state: the policy is evaluated without its noise."""
        actions: Tensor = self.actor(observations)
        return actions
