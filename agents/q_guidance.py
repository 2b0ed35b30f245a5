"""Q-guided diffusion: classifier guidance of a cloned policy by a critic, the sampling of QGPO (arXiv 2304.12824).

The policy wanted is pi(a | s) ~ mu(a | s) exp(w Q(s, a)), w = `guidance_scale` (eq. 4 there). A diffusion policy clones
mu, IQL's critics (`expectile.py`) give Q, and nothing else is trained. In acting, each denoising step is moved by the
gradient of the energy: with a_0 = D(a_t, t, s),

    D' = D + w (sigma^2 / alpha) grad_{a_t} min_i Q'_i(s, a_0)

(`diffrl.diffusion.classifier_guided`, the Q function in the classifier's place). The exact energy at a noisy action is
log E[exp(w Q(s, a_0)) | a_t]; QGPO learns it by contrast, from support actions drawn at every state of the data
beforehand. Q at the mean of a_0 is its value to first order in w, and costs no training: w can be chosen afterwards.
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor

from agents.base import Metrics
from agents.expectile import ExpectileAgent
from agents.expectile_config import QGuidance
from agents.solver_policy import SolverNoise, SolverPolicy
from diffrl.data.transitions import Batch
from diffrl.diffusion import Denoise, classifier_guided, denoising_loss
from diffrl.nets import Adam, average_


class QGuidanceAgent(ExpectileAgent):
    """Q-guided diffusion. Shapes: S seeds, B batch, O observation size, A action size."""

    config: QGuidance
    generative = "ema_actor"

    def __init__(
        self, config: QGuidance, observation_size: int, action_size: int, seeds: Sequence[int], device: str
    ) -> None:
        super().__init__(config, observation_size, action_size, seeds, device)
        self.actor = SolverPolicy(
            observation_size,
            action_size,
            self.generators,
            width=config.width,
            layers=config.layers,
            kind="edm",
            schedule="linear",
            steps=config.sampling_steps,
            solver=config.solver,
        ).to(self.device)
        self.ema_actor = deepcopy(self.actor).requires_grad_(False)
        self.networks |= {"actor": self.actor, "ema_actor": self.ema_actor}
        self.optimisers["actor"] = Adam(self.actor, config.actor_lr, config.grad_clip)

    def actor_loss(self, batch: Batch, noise: SolverNoise) -> Tensor:
        """Denoising score matching on actions: (S,). noise: of the policy's `bc_noise`."""
        network = self.actor.bound(batch.observations)
        return denoising_loss(self.actor.prediction, network, batch.actions, noise.t, noise.eps).mean(-1)

    def update(self, batch: Batch, generator: torch.Generator, phase: int = 0) -> Metrics:
        """One step of V, the critics and the policy."""
        _, metrics = self.update_critics(batch)
        loss = self.actor_loss(batch, self.actor.bc_noise(batch.actions, generator))
        norm = self.optimisers["actor"].step(loss)
        average_(self.ema_actor, self.actor, self.config.ema_rate)
        self.step += 1
        return metrics | {"bc_loss": loss.detach(), "actor_grad_norm": norm}

    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """One action a state, by the solver on the guided denoiser of the averaged policy."""

        def energy(a_0: Tensor, t: Tensor) -> Tensor:
            return self.aggregate(self.target_critic(observations, a_0.clamp(-1, 1)))

        def guide(denoise: Denoise) -> Denoise:
            if self.config.guidance_scale == 0:
                return denoise
            process = self.ema_actor.prediction.process
            return classifier_guided(process, denoise, energy, self.config.guidance_scale, at="x0")

        return self.ema_actor.sample(observations, self.ema_actor.sampling_noise(observations, generator), guide)
