"""EDP: Efficient Diffusion Policies for Offline Reinforcement Learning (Kang et al., NeurIPS 2023), arXiv 2305.20081.

Diffusion-QL, but the action that climbs Q is not sampled by a chain that the gradient must run back through: it is
guessed in one step from a noised action of the data, a_t = alpha a + sigma eps, so that one pass through the network
serves both terms of

    L(theta) = E |eps_theta(a_t, t, s) - eps|^2 - eta E Q_i(s, a^) / E|Q_i|,    a^ = (a_t - sigma eps_theta) / alpha

with |.|^2 a mean over the action's dimensions, a^ clamped to [-1, 1], critic i drawn anew at each step and scaled by
itself, and eta = 2: this is the form "published". Acting chooses among 50 candidates by the online critics. With the
form "x0", ours, the network predicts the action itself, a^ = D_theta(a_t, t, s), and |a^ - a|^2 (before a^ is clamped)
is the first term: beside an error of the noise it weighs noisy times more, by sigma^2 / alpha^2.

Acting, and the target's actions, come from a solver of the ODE in 15 steps: the authors' is DPM-Solver, ours multistep
DPM-Solver++, with the guesses clamped in both. The policy climbs the critics after their step, as Diffusion-QL's does;
the authors take both gradients before. They clip each critic's gradient by itself, and the data's actions at .999.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from agents.base import Metrics
from agents.config import EDP
from agents.diffusion_ql import QWeightedAgent
from agents.solver_policy import SolverNoise, SolverPolicy
from diffrl.data.transitions import Batch


class EDPNoise(NamedTuple):
    """All that is random in `EDPAgent.actor_loss`."""

    cloning: SolverNoise
    """Times and noise of the noised actions."""
    coin: Tensor
    """(S, 1), drawn by `QWeightedAgent.coin`."""


class EDPAgent(QWeightedAgent[EDPNoise]):
    """EDP. Shapes: S seeds, B batch, O observation size, A action size."""

    config: EDP
    actor: SolverPolicy

    @override
    def make_actor(self) -> SolverPolicy:
        return SolverPolicy(
            self.observation_size,
            self.action_size,
            self.generators,
            width=self.config.width,
            layers=self.config.layers,
            kind="eps" if self.config.form == "published" else "x0",
            schedule=self.config.schedule,
            steps=self.config.sampling_steps,
            solver=self.config.solver,
        ).to(self.device)

    @override
    def actor_noise(self, batch: Batch, generator: torch.Generator) -> EDPNoise:
        return EDPNoise(self.actor.bc_noise(batch.actions, generator), self.coin(generator))

    @override
    def actor_loss(self, batch: Batch, noise: EDPNoise) -> tuple[Tensor, Metrics]:
        """L(theta) of the module's docstring: (S,), with bc_loss and q_loss as metrics."""
        t, eps = noise.cloning
        prediction = self.actor.prediction
        a_t = prediction.process.perturb(batch.actions, t, eps)
        m = self.actor.bound(batch.observations)(a_t, t)
        bc_loss = (m - prediction.target(batch.actions, eps, t)).square().mean((-2, -1))
        guess = prediction.to_x0(m, a_t, t)
        return self.weighted(bc_loss, batch.observations, guess.clamp(-1, 1), noise.coin)
