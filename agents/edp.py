"""EDP: Efficient Diffusion Policies for Offline Reinforcement Learning (Kang et al., NeurIPS 2023), arXiv 2305.20081.

Diffusion-QL, but the action that climbs Q is not sampled by a chain that the gradient must run back through: it is
guessed in one step from a noised action of the data (section 4.1),

    L(theta) = E |D_theta(a_t, t, s) - a|^2 - eta E Q(s, D_theta(a_t, t, s)) / E|Q|,    a_t = alpha a + sigma eps,

(|.|^2 a mean over the action's dimensions), so that one pass through the network serves both terms. The network
predicts the action itself. Acting, and the target's actions, come from a solver of the ODE (section 4.2).
"""

import torch
from torch import Tensor

from agents.base import Metrics
from agents.config import EDP
from agents.diffusion_ql import QWeightedAgent
from agents.solver_policy import SolverPolicy
from diffrl.data.transitions import Batch


class EDPAgent(QWeightedAgent):
    """See the module, and `QWeightedAgent`."""

    config: EDP
    actor: SolverPolicy

    def make_actor(self) -> SolverPolicy:
        """See `QWeightedAgent`."""
        return SolverPolicy(
            self.observation_size,
            self.action_size,
            self.generators,
            width=self.config.width,
            layers=self.config.layers,
            kind="x0",
            schedule=self.config.schedule,
            steps=self.config.sampling_steps,
            solver=self.config.solver,
        ).to(self.device)

    def actor_noise(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, ...]:
        """t, eps, coin of `actor_loss`."""
        return *self.actor.bc_noise(batch.actions, generator), self.coin(generator)

    def actor_loss(self, batch: Batch, *noise: Tensor) -> tuple[Tensor, Metrics]:
        """The loss above: (S,). noise: t, eps of `SolverPolicy.bc_noise`, and the coin."""
        t, eps, coin = noise
        a_t = self.actor.prediction.process.perturb(batch.actions, t, eps)
        guess = self.actor.prediction.denoiser(self.actor.bound(batch.observations))(a_t, t)
        bc_loss = (guess - batch.actions).square().mean((-2, -1))
        return self.weighted(bc_loss, batch.observations, guess.clamp(-1, 1), coin)
