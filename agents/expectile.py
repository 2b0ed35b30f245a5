"""IQL's critics: Q-learning that asks for the value of no action outside the data (arXiv 2110.06169, section 4).

    L_V = E |tau - 1(u < 0)| u^2,    u = min_i Q'_i(s, a) - V(s)                                             (eq. 5)
    L_Q = E (r + gamma V(s') - Q_i(s, a))^2                                                                  (eq. 6)

V is the expectile tau of Q over the data's actions: near 1, the value of the best of them.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor

from agents.base import Agent, Metrics
from agents.critic import CriticEnsemble, aggregate, td_error, td_target
from agents.expectile_config import ExpectileConfig
from diffrl.data.transitions import Batch
from diffrl.nets import MLP, Adam, average_, mish


class ExpectileAgent(Agent):
    """An agent with IQL's critics. A subclass adds the actor, and what it learns from them.

    value_norm: layer normalisation, where the critics have it, is in the value function too.
    Networks: value, critic, target_critic. Shapes: S seeds, B batch, O observation size, A action size.
    """

    config: ExpectileConfig
    value_metrics = ("q",)
    compilable: ClassVar[tuple[str, ...]] = ("value_loss", "critic_loss", "actor_loss")

    def __init__(
        self,
        config: ExpectileConfig,
        observation_size: int,
        action_size: int,
        seeds: Sequence[int],
        device: str,
        activation: Callable[[Tensor], Tensor] = mish,
        norm_after: bool = False,
        value_norm: bool = True,
    ) -> None:
        super().__init__(config, observation_size, action_size, seeds, device)
        size: dict[str, Any] = {
            "width": config.width,
            "layers": config.layers,
            "layer_norm": config.critic_layer_norm and value_norm,
            "activation": activation,
            "norm_after": norm_after,
        }
        self.value = MLP((self.n_seeds,), observation_size, 1, self.generators, **size).to(self.device)
        sizes = (observation_size, action_size, self.generators)
        self.critic = CriticEnsemble(*sizes, config, activation, norm_after).to(self.device)
        self.target_critic = deepcopy(self.critic).requires_grad_(False)
        self.networks = {"value": self.value, "critic": self.critic, "target_critic": self.target_critic}
        self.optimisers = {
            "value": Adam(self.value, config.critic_lr),
            "critic": Adam(self.critic, config.critic_lr),
        }

    def aggregate(self, q: Tensor) -> Tensor:
        """One value (S, B) of the target critics' (S, n, B): min_i Q'_i, or as `q_agg` says."""
        return aggregate(q, self.config.q_agg, self.config.q_spread)

    @property
    def judge(self) -> CriticEnsemble:
        """The critics whose values of the data's actions V learns from: the target ones."""
        return self.target_critic

    def value_loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """L_V (eq. 5) (S,), the advantages u of the data's actions (S, B), and V(s') before the step (S, B)."""
        with torch.no_grad():
            q = self.aggregate(self.judge(batch.observations, batch.actions))
            v_next = self.value(batch.next_observations).squeeze(-1)
        u = q - self.value(batch.observations).squeeze(-1)
        weight = torch.where(u < 0, 1 - self.config.expectile, self.config.expectile)
        return (weight * u.square()).mean(-1), u.detach(), v_next

    def critic_loss(self, batch: Batch, v_next: Tensor) -> tuple[Tensor, Metrics]:
        """L_Q (eq. 6), summed over the critics: (S,). v_next: V(s') (S, B)."""
        y = td_target(batch, v_next, self.config.discount)
        q = self.critic(batch.observations, batch.actions)
        loss = td_error(q, y)
        return loss, {"critic_loss": loss.detach(), "q": q.detach().mean((1, 2))}

    def update_critics(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Make one step of V, Q and the target's average, in CORL's order; give the advantages (S, B) before it."""
        value_loss, advantages, v_next = self.value_loss(batch)
        self.optimisers["value"].step(value_loss)
        critic_loss, metrics = self.critic_loss(batch, v_next)
        norm = self.optimisers["critic"].step(critic_loss)
        average_(self.target_critic, self.critic, self.config.target_rate)
        return advantages, {**metrics, "value_loss": value_loss.detach(), "critic_grad_norm": norm}
