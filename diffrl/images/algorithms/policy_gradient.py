"""Policy gradients on the denoising chain: DDPO-IS, DDPO-SF, GRPO and DPOK differ in loss and advantage rule alone."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from diffrl.alignment.advantages import group_advantages
from diffrl.alignment.losses import ddpo_is_loss, ddpo_sf_loss, hard_clipped_loss, kl_loss
from diffrl.diffusion.chain import Transition, at_steps
from diffrl.images.algorithms.base import (
    AdvantageRule,
    Algorithm,
    Metrics,
    Term,
    WithinPrompts,
    require_decisions,
    summary,
)
from diffrl.images.config import DDPOISConfig, DDPOSFConfig, DPOKConfig, GRPOConfig
from diffrl.images.config.base import ChainConfig
from diffrl.images.samples import STEPS, RunState, Samples, Setup, denoiser, rows, sample_round

PolicyLoss = Callable[[Tensor, Tensor, Tensor], Term]
"""log pi and log pi_old of decisions (K, n), in nats, and advantages (n,) -> the loss to be minimised, and metrics."""


class PolicyGradient(Algorithm[ChainConfig]):
    """Sample, score, and push each step's log-probability by the advantage of the image it ends in.

    loss: of the log-probabilities of a step and the advantages.
    rule: how rewards become advantages.
    measure_kl: take the KL to the pretrained model, step by step in the states that were sampled, even where its weight
        is 0. With a weight, `--kl`, a penalty is added to the loss: the weight times KL/d.
    """

    samples: Samples
    """This process's samples of the round, after `collect`."""
    advantages: Tensor
    """The advantages of these samples (n,), after `collect`."""
    told_apart: Tensor
    """Whether the advantage is other than 0 of each sample of the round, in all processes (batch,), after `collect`."""

    def __init__(
        self,
        setup: Setup[ChainConfig],
        state: RunState,
        loss: PolicyLoss,
        rule: AdvantageRule,
        *,
        measure_kl: bool = False,
    ) -> None:
        super().__init__(setup, state)
        require_decisions(setup, setup.config.train_steps)
        self.units = setup.config.batch
        self.loss, self.rule, self.measure_kl = loss, rule, measure_kl

    def collect(self, number: int) -> Metrics:
        """Sample and score the round, and take advantages over all of it."""
        setup = self.setup
        self.samples = samples = sample_round(setup, self.state, number, self.rule.group)
        rewards = samples.whole(setup.scored(samples))
        advantages = self.rule.advantages(number, rewards)
        self.advantages = advantages[samples.index.to(advantages.device)]
        self.told_apart = (advantages != 0).cpu()
        return summary(rewards)

    @override
    def has_signal(self, units: Tensor) -> bool:
        return bool(self.told_apart[units].any())

    def losses(self, units: Tensor, number: int, turn: int) -> Iterator[Term]:
        """A term a denoising step: memory is one step's, whatever their number."""
        setup, samples = self.setup, self.samples
        local = torch.searchsorted(samples.index, units)
        condition = rows(samples.condition, local.to(setup.model.device))
        states, old = samples.states[:, local], samples.log_probs[:, local]
        steps = self._steps(units, number, turn)
        for step in steps:
            step = step[None]
            transition = setup.chain.transition(
                denoiser(setup.model, condition, guidance=setup.train_guidance), states, step
            )
            log_prob = transition.log_prob(setup.chain.next_states(states, step))
            loss, metrics = self.loss(log_prob, at_steps(old, step), self.advantages[local])
            if self.measure_kl or self.state.kl_weight > 0:
                penalty, more = kl_loss(self._kl(transition, condition, states, step), dims=setup.dims)
                loss, metrics = loss + self.state.kl_weight * penalty, metrics | more
            yield loss / len(steps), metrics

    def _kl(self, transition: Transition, condition: dict[str, Tensor], states: Tensor, step: Tensor) -> Tensor:
        setup = self.setup
        reference = denoiser(setup.model, condition, reference=True, guidance=setup.train_guidance)
        with torch.no_grad():
            anchor = setup.chain.transition(reference, states, step)
        return transition.kl(anchor)

    def _steps(self, units: Tensor, number: int, turn: int) -> Tensor:
        """The decisions to train on: all of them, (K,), or some for each image, (K, n)."""
        setup = self.setup
        k, of = setup.config.train_steps, setup.chain.n_decisions
        if k in (0, of):
            return torch.arange(of)
        return torch.stack(
            [setup.chain.draw_steps(k, setup.generator(STEPS, number, turn, i)) for i in units.tolist()], 1
        )

    def state_dict(self) -> dict[str, Any]:
        """What the advantage rule remembers."""
        return {"statistics": self.rule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what the advantage rule remembered."""
        self.rule.load_state_dict(state["statistics"])


class WithinGroups:
    """Advantages within groups of `group` images of one prompt, side by side in a round: GRPO's. They keep nothing."""

    def __init__(self, group: int) -> None:
        self.group = group

    def advantages(self, number: int, rewards: Tensor) -> Tensor:
        """Advantages (n,) of the rewards (n,) of whole groups, limited to +-5 as within prompts."""
        return group_advantages(rewards.reshape(-1, self.group), clip=5.0).flatten()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: such advantages depend on no earlier round."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: there is nothing to restore."""


def ddpo_is(setup: Setup[DDPOISConfig], state: RunState) -> PolicyGradient:
    """DDPO-IS (arXiv 2305.13301): PPO's clipped ratio on each step, advantages within prompts."""
    loss = functools.partial(ddpo_is_loss, clip_nats=setup.config.clip_nats, dims=setup.dims)
    return PolicyGradient(setup, state, loss, WithinPrompts(setup))


def ddpo_sf(setup: Setup[DDPOSFConfig], state: RunState) -> PolicyGradient:
    """DDPO-SF (arXiv 2305.13301): the score function, advantages within prompts."""

    def loss(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> Term:
        return ddpo_sf_loss(log_prob, advantages, dims=setup.dims)

    return PolicyGradient(setup, state, loss, WithinPrompts(setup))


def grpo(setup: Setup[GRPOConfig], state: RunState) -> PolicyGradient:
    """Flow-GRPO (arXiv 2505.05470): DDPO-IS's loss, advantages within the groups of a round."""
    loss = functools.partial(ddpo_is_loss, clip_nats=setup.config.clip_nats, dims=setup.dims)
    return PolicyGradient(setup, state, loss, WithinGroups(setup.config.group))


def dpok(setup: Setup[DPOKConfig], state: RunState) -> PolicyGradient:
    """DPOK (arXiv 2305.16381): the hard-clamped ratio, held to the pretrained model by the KL: together `dpok_loss`.

    DPOK's value function is here, as in DDPO, the mean of the prompt's rewards.
    """
    loss = functools.partial(hard_clipped_loss, clip_nats=setup.config.clip_nats, dims=setup.dims)
    return PolicyGradient(setup, state, loss, WithinPrompts(setup), measure_kl=True)
