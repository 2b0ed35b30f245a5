"""RLPD: Efficient Online Reinforcement Learning with Offline Data (Ball, Smith, Kostrikov & Levine, ICML 2023).

arXiv 2302.02948. Soft actor-critic (Haarnoja et al. 2018, arXiv 1812.05905) that learns in its environment from its
first step, half of every batch prior data (`diffrl.data.replay.MixedSource`; `diffrl online CONFIGURATION` starts it).
What lets it: many critics with layer normalisation, and many of their updates a step of the environment. With a' and
its log-probability drawn from the policy, M a random subset of the target critics, drawn anew for each update (REDQ,
arXiv 2101.05982), and tau the temperature,

    y      = r + gamma (min_{i in M} Q'_i(s', a') - tau log pi(a' | s'))
    L_Q    = E (y - Q_i(s, a))^2
    L_pi   = E (tau log pi(a | s) - mean_i Q_i(s, a)),    a ~ pi(s)
    L_tau  = tau (H - H_0),    H = -E log pi(a | s), H_0 = -A/2.

The policy is a Gaussian behind tanh (`gaussian_policy.py`). It explores by its draws and is evaluated by its mean. The
critics move at each update, policy and temperature at every `actor_every`-th: where that is the number of updates a
step, they move once a step, on its last batch, as the authors' do. `entropy_backup` off leaves tau log pi out of y (the
authors' AntMaze and Adroit).

What is different here: in the first steps, which only collect, the untrained policy acts (theirs: uniform actions).
Trained from data alone, by `diffrl train`, it is SAC, which nothing holds to the data: a baseline that fails.
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from typing_extensions import override

from agents.base import Agent, Metrics
from agents.config import RLPD
from agents.critic import CriticEnsemble, aggregate, td_error, td_target
from agents.gaussian_policy import SquashedGaussian
from diffrl.data.transitions import Batch
from diffrl.nets import Adam, average_, frozen, initialise_fan_average_


class Temperature(nn.Module):
    """tau = e^log, one a seed: () -> (S,)."""

    def __init__(self, n_seeds: int, start: float) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.full((n_seeds, 1), start).log())

    def forward(self) -> Tensor:
        """tau (S,)."""
        return self.log.exp().squeeze(-1)


class RLPDAgent(Agent):
    """RLPD. Shapes: S seeds, B batch, n critics, O observation size, A action size."""

    config: RLPD
    value_metrics = ("q",)
    compilable = ("critic_loss", "actor_loss")

    def __init__(
        self, config: RLPD, observation_size: int, action_size: int, seeds: Sequence[int], device: str
    ) -> None:
        super().__init__(config, observation_size, action_size, seeds, device)
        self.period = config.actor_every
        sizes = (observation_size, action_size, self.generators)
        self.actor = SquashedGaussian(*sizes, width=config.width, layers=config.layers, log_std=(-20.0, 2.0))
        self.critic = CriticEnsemble(*sizes, config, torch.relu)
        for network in (self.actor, self.critic):
            initialise_fan_average_(network, self.generators)
            network.to(self.device)
        self.temperature = Temperature(self.n_seeds, config.temperature).to(self.device)
        self.target_critic = deepcopy(self.critic).requires_grad_(False)
        self.frozen_critic = frozen(self.critic)
        self.target_entropy = -action_size / 2 if config.target_entropy is None else config.target_entropy
        self.networks = {
            "actor": self.actor,
            "critic": self.critic,
            "target_critic": self.target_critic,
            "temperature": self.temperature,
        }
        self.optimisers = {
            "actor": Adam(self.actor, config.actor_lr),
            "critic": Adam(self.critic, config.critic_lr),
            "temperature": Adam(self.temperature, config.temperature_lr),
        }
        self._nothing = torch.zeros(self.n_seeds, device=self.device)

    @torch.no_grad()
    def target(self, batch: Batch, z: Tensor, lots: Tensor) -> Tensor:
        """y = r + gamma (1 - terminal) (min_{i in M} Q'_i(s', a') - tau log pi(a' | s')): (S, B).

        z: (S, B, A), standard normal, the draw of a'. lots: (S, n), uniform: M is the critics of the largest ones.
        """
        actions, log_pi = self.actor.draw(batch.next_observations, z)
        q: Tensor = self.target_critic(batch.next_observations, actions)
        drawn = lots.topk(self.config.target_critics, dim=1).indices
        q = q.gather(1, drawn.unsqueeze(-1).expand(-1, -1, q.shape[-1]))
        value = aggregate(q, self.config.q_agg, self.config.q_spread)
        if self.config.entropy_backup:
            value = value - self.temperature().unsqueeze(-1) * log_pi
        return td_target(batch, value, self.config.discount)

    def critic_loss(self, batch: Batch, z: Tensor, lots: Tensor) -> tuple[Tensor, Metrics]:
        """L_Q, summed over the critics: (S,). z, lots: as in `target`."""
        y = self.target(batch, z, lots)
        q = self.critic(batch.observations, batch.actions)
        loss = td_error(q, y)
        return loss, {"critic_loss": loss.detach(), "q": q.detach().mean((1, 2))}

    def actor_loss(self, observations: Tensor, z: Tensor) -> tuple[Tensor, Metrics]:
        """L_pi: (S,), with the metrics q_loss and entropy, H. observations: (S, B, O); z: (S, B, A), the draw of a."""
        actions, log_pi = self.actor.draw(observations, z)
        q_loss = -self.frozen_critic(observations, actions).mean((1, 2))
        entropy = -log_pi.mean(-1)
        loss = q_loss - self.temperature().detach() * entropy
        return loss, {"q_loss": q_loss.detach(), "entropy": entropy.detach()}

    def temperature_loss(self, entropy: Tensor) -> Tensor:
        """L_tau: (S,). entropy: H (S,), a number."""
        loss: Tensor = self.temperature() * (entropy - self.target_entropy)
        return loss

    def update(self, batch: Batch, generator: torch.Generator, phase: int = 0) -> Metrics:
        """One step of the critics and their averages; in the period's last phase also of policy and temperature."""
        target_z, z = torch.randn((2, *batch.actions.shape), generator=generator, device=self.device)
        lots = torch.rand((self.n_seeds, self.config.n_critics), generator=generator, device=self.device)
        critic_loss, metrics = self.critic_loss(batch, target_z, lots)
        metrics = {**metrics, "critic_grad_norm": self.optimisers["critic"].step(critic_loss)}
        average_(self.target_critic, self.critic, self.config.target_rate)
        # What is logged is the mean over all steps: 0 where the actor rests, times the period where it moves.
        parts = dict.fromkeys(("q_loss", "entropy", "temperature", "actor_grad_norm"), self._nothing)
        if phase == self.period - 1:
            actor_loss, made = self.actor_loss(batch.observations, z)
            norm = self.optimisers["actor"].step(actor_loss)
            self.optimisers["temperature"].step(self.temperature_loss(made["entropy"]))
            made = {**made, "temperature": self.temperature().detach(), "actor_grad_norm": norm}
            parts = {name: self.period * value for name, value in made.items()}
        self.step += 1
        return metrics | parts

    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """The policy's mean, tanh(mu): (S, B, A) for observations (S, B, O)."""
        return self.actor.mean(observations)

    @override
    @torch.no_grad()
    def explore(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """A draw from the policy: (S, B, A) for observations (S, B, O)."""
        shape = (*observations.shape[:-1], self.action_size)
        return self.actor.sample(observations, torch.randn(shape, generator=generator, device=self.device))
