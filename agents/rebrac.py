"""ReBRAC: Revisiting the Minimalist Approach to Offline RL (Tarasov et al., NeurIPS 2023), arXiv 2305.09836.

TD3+BC (`td3_bc.py`) with a penalty for leaving the data in the actor's loss and another one in the critics' target:

    L_pi = E [beta_1 |pi(s) - a|^2 - lambda min_i Q_i(s, pi(s))],    lambda = 1 / E |min_i Q_i(s, pi(s))|
    y    = r + gamma (min_i Q'_i(s', a*) - beta_2 |a* - a'|^2),      a* = clip(pi'(s') + eps),

where a' is the action that the data took in s'. Squares are summed over the action's dimensions, as in the authors'
code. Three hidden layers of 256 ReLU, layer normalisation in the critics (after the activation), initialised as EDAC:
biases of 0.1, and last layers drawn from +-0.001 (actor) and +-0.003 (critics).

What is different here:
- a row that a time limit cut off bootstraps, without the penalty, since its a' is not in the data (D4RL's
  `qlearning_dataset` drops the row); online no a' is known, and `going_online` takes beta_2 away;
- the actor moves in a period's last step (theirs: the first), and the target actor follows it as it is after that step
  (theirs: as it was before).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from agents.base import Metrics
from agents.config import ReBRAC
from agents.critic import aggregate, td_target
from agents.td3_bc import TD3Agent
from diffrl.data.next_actions import AnyBatch, SuccessiveBatch, SuccessiveSource
from diffrl.data.transitions import Source, Transitions
from diffrl.nets import initialise_small_output_


class ReBRACAgent(TD3Agent):
    """ReBRAC. Shapes: S seeds, B batch, O observation size, A action size."""

    config: ReBRAC

    def __init__(
        self, config: ReBRAC, observation_size: int, action_size: int, seeds: Sequence[int], device: str
    ) -> None:
        super().__init__(config, observation_size, action_size, seeds, device, norm_after=True)
        initialise_small_output_(self.actor, 1e-3, self.generators)
        initialise_small_output_(self.critic.mlp, 3e-3, self.generators)
        self.target_actor.load_state_dict(self.actor.state_dict())
        self.target_critic.load_state_dict(self.critic.state_dict())

    @override
    def source(self, transitions: Transitions) -> Source[SuccessiveBatch]:
        """The transitions with the actions that the data took next."""
        return SuccessiveSource(transitions)

    @override
    @torch.no_grad()
    def target(self, batch: AnyBatch, noise: Tensor) -> Tensor:
        """y = r + gamma (1 - terminal) (min_i Q'_i(s', a*) - beta_2 |a* - a'|^2): (S, B).

        noise: (S, B, A), standard normal; eps is that noise, scaled and clipped. The penalty is 0 where a' is unknown:
        behind the last row of an episode, and in a plain `Batch`.
        """
        actions = self.smoothed(batch, noise)
        q = aggregate(self.target_critic(batch.next_observations, actions), self.config.q_agg, self.config.q_spread)
        if isinstance(batch, SuccessiveBatch):
            distance = (actions - batch.next_actions).square().sum(-1)
            q = q - self.config.critic_penalty * batch.succeeded * distance
        return td_target(batch, q, self.config.discount)

    @override
    def actor_loss(self, batch: AnyBatch) -> tuple[Tensor, Metrics]:
        """beta_1 E |pi(s) - a|^2 - lambda E min_i Q_i(s, pi(s)): (S,)."""
        actions = torch.tanh(self.actor(batch.observations))
        q = aggregate(self.frozen_critic(batch.observations, actions), self.config.actor_q, self.config.q_spread)
        q_loss = -q.mean(-1) / q.detach().abs().mean(-1)
        bc_loss = (actions - batch.actions).square().sum(-1).mean(-1)
        loss = self.config.actor_penalty * bc_loss + q_loss
        return loss, {"bc_loss": bc_loss.detach(), "q_loss": q_loss.detach()}
