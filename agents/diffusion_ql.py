"""Diffusion-QL: Diffusion Policies as an Expressive Policy Class for Offline RL (Wang, Hunt & Zhou, ICLR 2023).

arXiv 2208.06193. The actor is a diffusion policy trained on

    L(theta) = L_d(theta) + eta L_q(theta),    L_q = -E_{s, a0 ~ pi_theta} [Q_phi(s, a0)] / E|Q_phi|       (eq. 3, 4)

the critics on

    E (r + gamma min_i Q_phi'_i(s', a0') - Q_phi_i(s, a))^2,    a0' ~ pi_theta'                            (eq. 5)

with theta' and phi' moving averages. `config.q_weight` is the paper's eta. `QWeightedAgent` is all of it but the policy
and the loss L_d: the base of all agents that are Diffusion-QL with another policy.

The original's `--lr_decay` is left out. It does nothing: a cosine over as many steps as there are epochs, which makes
one step every 50 epochs and leaves .999 of the learning rate at the end.
"""

from abc import abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from agents.base import Agent, GenerativePolicy, Metrics
from agents.config import DiffusionQL, QWeightedConfig
from agents.critic import CandidateNoise, CriticEnsemble, aggregate, choose, gumbel_noise, td_error, td_target
from agents.diffusion_policy import DiffusionNoise, DiffusionPolicy, build_policy
from diffrl.data.transitions import Batch
from diffrl.nets import Adam, average_, frozen

ActorNoise = TypeVar("ActorNoise", bound=tuple[Any, ...])
"""The NamedTuple of all that is random in an agent's `actor_loss`."""


class QWeightedAgent(Agent, Generic[ActorNoise]):
    """Diffusion-QL with any generative policy.

    Shapes: S seeds, B batch, K candidates, O observation size, A action size.
    """

    config: QWeightedConfig
    value_metrics = ("q",)
    compilable = ("critic_loss", "actor_loss")
    acting = ("act_from",)

    def __init__(
        self, config: QWeightedConfig, observation_size: int, action_size: int, seeds: Sequence[int], device: str
    ) -> None:
        super().__init__(config, observation_size, action_size, seeds, device)
        self.generative = "ema_actor" if config.act_with == "average" else "actor"
        self.backup_candidates = config.backup_candidates if config.max_q_backup else 1
        self.actor = self.make_actor()
        self.critic = CriticEnsemble(observation_size, action_size, self.generators, config).to(self.device)
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

    @abstractmethod
    def make_actor(self) -> GenerativePolicy:
        """The policy's network, initialised from `self.generators`, on the agent's device."""

    @abstractmethod
    def actor_noise(self, batch: Batch, generator: torch.Generator) -> ActorNoise:
        """Draw all that is random in `actor_loss` for a batch (S, B, ...)."""

    @abstractmethod
    def actor_loss(self, batch: Batch, noise: ActorNoise) -> tuple[Tensor, Metrics]:
        """L_d + eta L_q (eq. 3): (S,); its parts as metrics bc_loss and q_loss. noise: of `actor_noise`."""

    @torch.no_grad()
    def target(self, batch: Batch, noise: Tensor) -> Tensor:
        """y = r + gamma (1 - terminal) min_i Q_phi'_i(s', a0'): (S, B).

        noise: the policy's `sampling_noise`, for K = `backup_candidates` actions of each next observation.
        With max_q_backup each critic takes its best of K next actions, before the minimum (or `q_agg`) over critics.
        """
        K = self.backup_candidates
        actions = self.ema_actor.sample(batch.next_observations, noise)
        q: Tensor = self.target_critic(batch.next_observations.repeat_interleave(K, dim=1), actions)
        q = q.view(*q.shape[:2], -1, K).amax(-1)
        value = aggregate(q, self.config.q_agg, self.config.q_spread)
        return td_target(batch, value, self.config.discount)

    def critic_loss(self, batch: Batch, noise: Tensor) -> tuple[Tensor, Metrics]:
        """The temporal-difference loss (eq. 5), summed over the critics: (S,). noise: as in `target`."""
        y = self.target(batch, noise)
        q = self.critic(batch.observations, batch.actions)
        loss = td_error(q, y)
        return loss, {"critic_loss": loss.detach(), "q": q.detach().mean((1, 2))}

    def weighted(self, bc_loss: Tensor, observations: Tensor, actions: Tensor, coin: Tensor) -> tuple[Tensor, Metrics]:
        """L_d + eta L_q (eq. 3): (S,), and its parts as metrics, from L_d, `bc_loss` (S,), and the policy's actions.

        actions: (S, B, A), through which the gradient runs. coin: (S, 1), uniform on [0, 1): which critic is climbed.
        The next critic scales it, or with `actor_q` random_own the same one. With min, mean or lcb one value of all
        critics is climbed, and scaled by itself.
        """
        q: Tensor = self.frozen_critic(observations, actions)
        if self.config.actor_q == "random" or self.config.actor_q == "random_own":
            n = self.critic.n_critics
            numbers = torch.arange(n, device=q.device)
            climbed = numbers == (n * coin).floor()  # (S, n)
            scaling = climbed.roll(1, 1) if self.config.actor_q == "random" else climbed
            q_i, q_j = ((chosen.unsqueeze(-1) * q).sum(1) for chosen in (climbed, scaling))
        else:
            q_i = q_j = aggregate(q, self.config.actor_q, self.config.q_spread)
        q_loss = -q_i.mean(-1) / q_j.detach().abs().mean(-1)
        loss = bc_loss + self.config.q_weight * q_loss
        return loss, {"bc_loss": bc_loss.detach(), "q_loss": q_loss.detach()}

    def coin(self, generator: torch.Generator) -> Tensor:
        """Draw the coin that chooses, in `weighted`, the critic to climb: (S, 1), uniform on [0, 1)."""
        return torch.rand((self.n_seeds, 1), generator=generator, device=self.device)

    def update(self, batch: Batch, generator: torch.Generator, phase: int = 0) -> Metrics:
        """One step of the critics, one of the actor, then the moving averages of both."""
        target_noise = self.actor.sampling_noise(batch.next_observations, generator, self.backup_candidates)
        critic_loss, critic_metrics = self.critic_loss(batch, target_noise)
        critic_norm = self.optimisers["critic"].step(critic_loss)

        actor_loss, actor_metrics = self.actor_loss(batch, self.actor_noise(batch, generator))
        actor_norm = self.optimisers["actor"].step(actor_loss)

        # A rate of 0 between the updates of the averaged actor, as a tensor: no step branches on a counter.
        due = (self.step >= self.config.ema_start) & (self.step % self.config.ema_every == 0)
        average_(self.ema_actor, self.actor, self.config.ema_rate * due.float())
        average_(self.target_critic, self.critic, self.config.target_rate)
        self.step += 1
        return critic_metrics | actor_metrics | {"critic_grad_norm": critic_norm, "actor_grad_norm": actor_norm}

    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """Sample K actions a state from the policy and choose one by a softmax over min_i Q_phi'_i (section 3).

        `act_critics` says whether the target critics choose, as in this equation, or the online ones.
        """
        K = self.config.act_candidates
        noise = self.policy.sampling_noise(observations, generator, K)
        gumbel = gumbel_noise((*observations.shape[:-1], K), generator)
        return self.act_from(observations, CandidateNoise(noise, gumbel))

    def act_from(self, observations: Tensor, noise: CandidateNoise) -> Tensor:
        """The actions (S, B, A) of `act`, as a plain function of tensors: of observations (S, B, O) and its noise."""
        actions = self.policy.sample(observations, noise.sampling)
        K = noise.gumbel.shape[-1]
        if K == 1:
            return actions
        critic = self.target_critic if self.config.act_critics == "target" else self.critic
        q: Tensor = critic(observations.repeat_interleave(K, dim=1), actions)
        value = aggregate(q, self.config.q_agg, self.config.q_spread)
        return choose(actions, value, noise.gumbel, self.config.act_temperature)


class DiffusionQLNoise(NamedTuple):
    """All that is random in `DiffusionQLAgent.actor_loss`."""

    cloning: DiffusionNoise
    """What is random in the policy's `bc_loss`."""
    sampling: Tensor
    """(T + 1, S, B, A) noise of the policy's `sample`."""
    coin: Tensor
    """(S, 1), drawn by `QWeightedAgent.coin`."""


class DiffusionQLAgent(QWeightedAgent[DiffusionQLNoise]):
    """Diffusion-QL. Shapes: S seeds, B batch, K candidates, O observation size, A action size."""

    config: DiffusionQL
    actor: DiffusionPolicy

    @override
    def make_actor(self) -> DiffusionPolicy:
        return build_policy(self, self.config)

    @override
    def actor_noise(self, batch: Batch, generator: torch.Generator) -> DiffusionQLNoise:
        cloning = self.actor.bc_noise(batch.actions, generator)
        sampling = self.actor.sampling_noise(batch.observations, generator)
        return DiffusionQLNoise(cloning, sampling, self.coin(generator))

    @override
    def actor_loss(self, batch: Batch, noise: DiffusionQLNoise) -> tuple[Tensor, Metrics]:
        bc_loss = self.actor.bc_loss(batch.actions, batch.observations, noise.cloning)
        actions = self.actor.sample(batch.observations, noise.sampling)
        return self.weighted(bc_loss, batch.observations, actions, noise.coin)
