"""Diffusion-QL: Diffusion Policies as an Expressive Policy Class for Offline RL (Wang, Hunt & Zhou, ICLR 2023).

arXiv 2208.06193. The actor is a diffusion policy trained on

    L(theta) = L_d(theta) + eta L_q(theta),    L_q = -E_{s, a0 ~ pi_theta} [Q_phi(s, a0)] / E|Q_phi|       (eq. 3, 4)

the critics on

    E (r + gamma min_i Q_phi'_i(s', a0') - Q_phi_i(s, a))^2,    a0' ~ pi_theta'                            (eq. 5)

with theta' and phi' moving averages. `config.q_weight` is the paper's eta.
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor

from agents.base import Agent, Metrics
from agents.config import DiffusionQL
from agents.critic import TwinCritic
from agents.diffusion_policy import build_policy
from diffrl.data.transitions import Batch
from diffrl.diffusion import Denoise, Process
from diffrl.nets import Adam, average_, frozen


class DiffusionQLAgent(Agent):
    """See the module. Shapes: S seeds, B batch, K candidates, O observation size, A action size."""

    value_metrics = ("q",)
    compilable = ("critic_loss", "actor_loss")
    acting = ("choose",)

    def __init__(
        self, config: DiffusionQL, observation_size: int, action_size: int, seeds: Sequence[int], device: str
    ) -> None:
        super().__init__(config, observation_size, action_size, seeds, device)
        self.config = config
        self.backup_candidates = config.backup_candidates if config.max_q_backup else 1
        self.actor = build_policy(self, config)
        self.critic = TwinCritic(
            observation_size,
            action_size,
            self.generators,
            width=config.width,
            layers=config.layers,
            layer_norm=config.critic_layer_norm,
        ).to(self.device)
        self.ema_actor = deepcopy(self.actor).requires_grad_(False)
        self.target_critic = deepcopy(self.critic).requires_grad_(False)
        self.frozen_critic = frozen(self.critic)
        self.networks = {
            "actor": self.actor,
            "critic": self.critic,
            "ema_actor": self.ema_actor,
            "target_critic": self.target_critic,
        }
        self.optimisers = {
            "actor": Adam(self.actor, config.actor_lr, config.grad_clip),
            "critic": Adam(self.critic, config.critic_lr, config.grad_clip),
        }

    @torch.no_grad()
    def target(self, batch: Batch, noise: Tensor) -> Tensor:
        """y = r + gamma (1 - terminal) min_i Q_phi'_i(s', a0'): (S, B), with the sampling noise (T + 1, S, B K, A).

        With max_q_backup, each critic's best of K next actions before the minimum over critics.
        """
        K = self.backup_candidates
        actions = self.ema_actor.sample(batch.next_observations, noise)
        q: Tensor = self.target_critic(batch.next_observations.repeat_interleave(K, dim=1), actions)
        q = q.view(self.n_seeds, 2, -1, K).amax(-1).amin(1)
        return batch.rewards + self.config.discount * (1 - batch.terminals) * q

    def critic_loss(self, batch: Batch, noise: Tensor) -> tuple[Tensor, Metrics]:
        """Eq. 5, summed over the two critics: (S,). noise: that of `target`."""
        y = self.target(batch, noise)
        q = self.critic(batch.observations, batch.actions)
        loss = (q - y.unsqueeze(1)).square().mean(-1).sum(1)
        return loss, {"critic_loss": loss.detach(), "q": q.detach().mean((1, 2))}

    def actor_loss(self, batch: Batch, i: Tensor, eps: Tensor, noise: Tensor, coin: Tensor) -> tuple[Tensor, Metrics]:
        """L_d + eta L_q (eq. 3): (S,). i, eps, noise: those of `DiffusionPolicy.bc_loss` and `.sample`.

        coin: uniform on [0, 1], (S, 1): which critic is climbed and which one scales it.
        """
        bc_loss = self.actor.bc_loss(batch.actions, batch.observations, i, eps)
        q = self.frozen_critic(batch.observations, self.actor.sample(batch.observations, noise))
        heads = coin < 0.5
        q_i, q_j = torch.where(heads, q[:, 0], q[:, 1]), torch.where(heads, q[:, 1], q[:, 0])
        q_loss = -q_i.mean(-1) / q_j.detach().abs().mean(-1)
        loss = bc_loss + self.config.q_weight * q_loss
        return loss, {"bc_loss": bc_loss.detach(), "q_loss": q_loss.detach()}

    def update(self, batch: Batch, generator: torch.Generator, phase: int = 0) -> Metrics:
        """One step of the critics, one of the actor, then the averages."""
        target_noise = self.actor.sampling_noise(batch.next_observations, generator, self.backup_candidates)
        critic_loss, critic_metrics = self.critic_loss(batch, target_noise)
        critic_norm = self.optimisers["critic"].step(critic_loss)

        i, eps = self.actor.bc_noise(batch.actions, generator)
        noise = self.actor.sampling_noise(batch.observations, generator)
        coin = torch.rand((self.n_seeds, 1), generator=generator, device=self.device)
        actor_loss, actor_metrics = self.actor_loss(batch, i, eps, noise, coin)
        actor_norm = self.optimisers["actor"].step(actor_loss)

        # A rate of 0 between the updates of the averaged actor, as a tensor: no step branches on a counter.
        due = (self.step >= self.config.ema_start) & (self.step % self.config.ema_every == 0)
        average_(self.ema_actor, self.actor, self.config.ema_rate * due.float())
        average_(self.target_critic, self.critic, self.config.target_rate)
        self.step += 1
        return critic_metrics | actor_metrics | {"critic_grad_norm": critic_norm, "actor_grad_norm": actor_norm}

    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """Draw K actions a state from the actor and choose one by a softmax over min_i Q_phi'_i (section 3)."""
        K = self.config.act_candidates
        noise = self.actor.sampling_noise(observations, generator, K)
        shape = (*observations.shape[:-1], K)
        exponential = torch.empty(shape, device=self.device).exponential_(generator=generator)
        return self.choose(observations, noise, exponential)

    def choose(self, observations: Tensor, noise: Tensor, exponential: Tensor) -> Tensor:
        """`act` as a function of its noise: (T + 1, S, B K, A) of the actor, (S, B, K) ~ Exp(1) of the choice.

        The draw from softmax(Q / temperature) is the argmax of Q + temperature * Gumbel noise, which is -log Exp(1).
        """
        S, B, K = exponential.shape
        actions = self.actor.sample(observations, noise)
        q: Tensor = self.target_critic(observations.repeat_interleave(K, dim=1), actions)
        q = q.amin(1).view(S, B, K)
        best = (q - self.config.act_temperature * exponential.log()).argmax(-1)
        return actions.view(S, B, K, -1).take_along_dim(best[..., None, None], dim=2).squeeze(2)

    def generative_model(self, observations: Tensor) -> tuple[Process, Denoise]:
        """See `Agent.generative_model`."""
        return self.actor.prediction.process, self.actor.denoiser(observations)

    def noise_levels(self) -> tuple[float, ...]:
        """See `Agent.noise_levels`."""
        return self.actor.noise_levels()

    @torch.no_grad()
    def sample_actions(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """See `Agent.sample_actions`: the actor's, without the critics' choice."""
        return self.actor.sample(observations, self.actor.sampling_noise(observations, generator))
