"""Policy gradients on the denoising chain: DDPO-SF, DDPO-IS, GRPO and DPOK differ in advantage and loss alone."""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffrl.alignment.advantages import group_advantages
from diffrl.alignment.losses import ddpo_is_loss, ddpo_sf_loss, dpok_loss, kl_loss
from diffrl.diffusion.chain import Transition, at_steps
from diffrl.images.algorithms.base import STEPS, Metrics, Setup, Term, sample, summary
from diffrl.images.algorithms.shared import OfSamples
from diffrl.images.model import rows
from diffrl.images.samples import denoiser


class PolicyGradient(OfSamples):
    """Sample, score, and push each step's log-probability by the advantage of the image it ends in.

    Advantages are normalised per prompt over the last rewards (`PromptStatistics`), for GRPO within the groups of a
    round. The reference of DPOK, and of `--kl` for all, is the pretrained model: its KL is taken step by step in the
    states that were sampled. DPOK's value function is here, as in DDPO, the mean of the prompt's rewards.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        config = setup.config
        self.group = config.group or 1 if config.algo == "grpo" else 1
        self.advantages = torch.empty(0)

    def collect(self, number: int) -> Metrics:
        """Sample and score; advantages are of the whole round."""
        setup = self.setup
        self.samples = samples = sample(setup, number, self.group)
        rewards = setup.world.merge(setup.scored(samples), samples.index, self.units)
        if self.group > 1:
            advantages = group_advantages(rewards.reshape(-1, self.group), clip=5.0).flatten()
        else:
            advantages = self.normalised(number, rewards)
        self.advantages = advantages[samples.index.to(advantages.device)]
        return summary(rewards)

    def losses(self, units: Tensor, number: int, turn: int) -> Iterator[Term]:
        """A term a denoising step: memory is one step's, whatever their number."""
        setup, samples = self.setup, self.samples
        assert samples is not None
        config = setup.config
        local = torch.searchsorted(samples.index, units)
        condition = rows(samples.condition, local.to(setup.model.device))
        states, old = samples.states[:, local], samples.log_probs[:, local]
        steps = self._steps(units, number, turn)
        penalised = config.algo == "dpok" or setup.kl_weight > 0
        for step in steps:
            step = step[None]
            transition = setup.chain.transition(
                denoiser(setup.model, condition, guidance=setup.train_guidance), states, step
            )
            log_prob = transition.log_prob(setup.chain.next_states(states, step))
            kl = self._kl(transition, condition, states, step) if penalised else None
            loss, metrics = self._loss(log_prob, at_steps(old, step), self.advantages[local], kl)
            yield loss / len(steps), metrics

    def _loss(self, log_prob: Tensor, old: Tensor, advantages: Tensor, kl: Tensor | None) -> Term:
        setup, clip, d = self.setup, self.setup.config.clip_nats, self.setup.dims
        if setup.config.algo == "dpok":
            assert kl is not None
            assert clip is not None
            return dpok_loss(log_prob, old, advantages, kl, clip, kl_weight=setup.kl_weight, dims=d)
        if setup.config.algo == "ddpo-sf":
            loss, metrics = ddpo_sf_loss(log_prob, advantages, dims=d)
        else:
            assert clip is not None
            loss, metrics = ddpo_is_loss(log_prob, old, advantages, clip, dims=d)
        if kl is None:
            return loss, metrics
        penalty, more = kl_loss(kl, dims=d)
        return loss + setup.kl_weight * penalty, metrics | more

    def _kl(self, transition: Transition, condition: dict[str, Tensor], states: Tensor, step: Tensor) -> Tensor:
        setup = self.setup
        reference = denoiser(setup.model, condition, reference=True, guidance=setup.train_guidance)
        with torch.no_grad():
            anchor = setup.chain.transition(reference, states, step)
        return transition.kl(anchor)

    def _steps(self, units: Tensor, number: int, turn: int) -> Tensor:
        """The decisions to train on: (K,), all of them, or (K, n), some, each image's own."""
        setup = self.setup
        k, of = setup.config.train_steps, setup.chain.n_decisions
        if k is None or k == of:
            return torch.arange(of)
        return torch.stack(
            [setup.chain.draw_steps(k, setup.generator(STEPS, number, turn, i)) for i in units.tolist()], 1
        )
