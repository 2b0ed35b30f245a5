"""DPPO: PPO over the denoising chain of a policy that acts in an environment (Ren et al. 2024, arXiv 2409.00588).

A decision is a denoising step (`diffrl.diffusion.chain`); all K' tuned steps of the chain that made the action a_t
share the advantage of that action, discounted by how far before the last step they are (section 4.3):

    L = -E_t E_k min(r A, clip(r) A),    A = denoising_discount^(K' - 1 - k) A_t,    r = pi(a^k+1 | a^k, s) / pi_old,

with A_t the GAE of a state-value critic, normalised in a minibatch, and r clipped in nats (`ddpo_is_loss`). Where this
differs from the authors' code: a minibatch holds environment steps with all their denoising steps, not single pairs of
the two; the ratio is the true one, of sums over the action's dimensions, not of means; noise and log-probabilities are
not clipped; an episode that is cut is bootstrapped from the state that it reached; one clip for all denoising steps (as
their Gym settings have it); actions are single ones, not chunks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from agents.base import Agent
from agents.diffusion_policy import DiffusionPolicy
from diffrl.alignment.losses import ddpo_is_loss, kl_loss
from diffrl.data.preprocessing import Preprocessing
from diffrl.diffusion.chain import Transition
from diffrl.training.stack import Evaluate
from diffrl.tuning.acting import EnvironmentTrainer, differ
from diffrl.tuning.config import DPPOConfig
from diffrl.tuning.environments import Environments
from diffrl.tuning.target import chain_policy

MEASURED = 1000
"""Environment steps of an iteration on which the divergence from the pretrained policy is measured."""


class Experience(NamedTuple):
    """What S policies met in M environment steps each."""

    observations: Tensor
    """(S, M, O), normalised."""
    states: Tensor
    """(T + 1, S, M, A), the chains that made the actions."""
    log_probs: Tensor
    """(K', S, M), of the tuned steps, by the policy that acted."""
    advantages: Tensor
    """(S, M)"""
    returns: Tensor
    """(S, M): the critic's targets."""

    def rows(self, index: Tensor) -> "Experience":
        """The environment steps at `index` (S, B) of each seed."""
        s = torch.arange(len(index), device=index.device)[:, None]
        return Experience(
            self.observations[s, index],
            self.states[:, s, index],
            self.log_probs[:, s, index],
            self.advantages[s, index],
            self.returns[s, index],
        )


class DPPOTrainer(EnvironmentTrainer[Experience, DiffusionPolicy, DPPOConfig]):
    """DPPO of a stack of S seeds, each in environments of its own: see `EnvironmentTrainer` for what it is given."""

    def __init__(
        self,
        agent: Agent,
        config: DPPOConfig,
        environments: Environments,
        preprocessing: Preprocessing,
        critic_generators: Sequence[torch.Generator],
        generator: torch.Generator,
        evaluate: Evaluate,
        *,
        on_close: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        policy = chain_policy(agent).requires_grad_(True)
        if policy.early is not None:
            policy.early.requires_grad_(False)
        given = environments, preprocessing, critic_generators, generator, evaluate
        super().__init__(agent, config, policy, *given, on_close=on_close, say=say)
        self.first = policy.n_early
        self.chain = policy.chain(config.min_std)
        self.steps = range(self.first, policy.steps)

    @override
    def act(self, observations: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        shape = (self.policy.steps + 1, *observations.shape[:-1], self.policy.action_size)
        noise = torch.randn(shape, generator=self._generator, device=observations.device)
        rollout = self.chain.rollout(self.policy.step_denoiser(observations), noise[0], noise=noise[1:])
        return rollout.x, (rollout.states, rollout.log_probs[self.first :])

    @override
    def experience(
        self, observations: Tensor, kept: Sequence[Tensor], advantages: Tensor, returns: Tensor
    ) -> Experience:
        states, log_probs = kept
        return Experience(observations, states, log_probs, advantages, returns)

    def transition(self, policy: DiffusionPolicy, batch: Experience) -> Transition:
        """A policy's Gaussians at the tuned steps of the batch's chains."""
        return self.chain.transition(policy.step_denoiser(batch.observations, self.first), batch.states, self.steps)

    @override
    def policy_loss(self, batch: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """The module's loss L, plus the weighted divergence from the pretrained policy and imitation of it: (S,).

        Gives metrics (S,) of it besides.
        """
        config = self.config
        now = self.transition(self.policy, batch)
        log_prob = now.log_prob(self.chain.next_states(batch.states, self.steps))
        spread = batch.advantages.std(-1, correction=0, keepdim=True)
        normalised = (batch.advantages - batch.advantages.mean(-1, keepdim=True)) / (spread + 1e-8)
        normalised = torch.where(differ(batch.advantages)[:, None], normalised, 0.0)  # and not rounding over rounding
        after = torch.arange(len(log_prob) - 1, -1, -1, device=normalised.device)
        discounts: Tensor = config.denoising_discount**after
        advantages = discounts[:, None, None] * normalised
        # A step of a chain is to the loss a sample like any other, with an advantage of its own.
        loss, metrics = ddpo_is_loss(
            _joined(log_prob)[None], _joined(batch.log_probs)[None], _joined(advantages), config.clip_nats
        )
        if config.kl_weight:
            with torch.no_grad():
                anchor = self.transition(self._pretrained, batch)
            loss = loss + config.kl_weight * kl_loss(now.kl(anchor))[0]
        if config.bc_weight:
            loss = loss + config.bc_weight * self._bc_loss(batch.observations)
        return loss, metrics | {"policy_loss": loss.detach()}

    def _bc_loss(self, observations: Tensor) -> Tensor:
        """-log pi of chains that the pretrained policy makes in these states, the mean over steps and batch: (S,)."""
        shape = (self.policy.steps + 1, *observations.shape[:-1], self.policy.action_size)
        noise = torch.randn(shape, generator=self._generator, device=observations.device)
        with torch.no_grad():
            chains = self.chain.rollout(self._pretrained.step_denoiser(observations), noise[0], noise=noise[1:])
        denoise = self.policy.step_denoiser(observations, self.first)
        return -self.chain.log_prob(denoise, chains.states, self.steps).mean((0, -1))

    @override
    def too_far(self, metrics: Mapping[str, Tensor]) -> Tensor | None:
        return metrics["approx_kl"] > self.config.target_kl if self.config.target_kl else None

    @override
    def finish(self, experience: Experience) -> dict[str, Tensor]:
        return {"kl": self._divergence(experience)}

    @torch.no_grad()
    def _divergence(self, experience: Experience) -> Tensor:
        """KL(policy || pretrained policy) of a whole chain, in nats, in some of the states visited: (S,)."""
        S, M = experience.advantages.shape
        index = torch.linspace(0, M - 1, min(M, MEASURED), device=self.agent.device).long().expand(S, -1)
        batch = experience.rows(index)
        kl = self.transition(self.policy, batch).kl(self.transition(self._pretrained, batch))
        return kl.sum(0).mean(-1).float()


def _joined(values: Tensor) -> Tensor:
    """(K, S, B) as (S, K B)."""
    return values.transpose(0, 1).flatten(1)
