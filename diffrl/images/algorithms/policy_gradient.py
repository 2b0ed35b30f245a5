"""Policy gradients on the denoising chain: DDPO-IS, DDPO-SF, GRPO and DPOK differ in loss and advantage rule alone."""

import functools
from collections.abc import Callable, Iterator, Sequence
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
from diffrl.images.samples import (
    ROLL_OUT,
    STEPS,
    RunState,
    Samples,
    Setup,
    denoiser,
    noise_of,
    rows,
    sample_round,
    windowed,
)

PolicyLoss = Callable[[Tensor, Tensor, Tensor], Term]
"""log pi and log pi_old of decisions (K, n), in nats, and advantages (n,) -> the loss to be minimised, and metrics."""


class PolicyGradient(Algorithm[ChainConfig]):
    """Sample, score, and push each step's log-probability by the advantage of the image it ends in.

    loss: of the log-probabilities of a step and the advantages.
    rule: how rewards become advantages.
    window: so many steps of each round's chain have noise and are learned from, a window that moves on by one step
        every `window_rounds` rounds, from pure noise on, and begins again at the end; 0: all steps.
    guard: take log-ratios as GRPO-Guard does, see `_guarded`.
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
        window: int = 0,
        window_rounds: int = 1,
        guard: bool = False,
    ) -> None:
        super().__init__(setup, state)
        require_decisions(setup, setup.config.train_steps)
        require_decisions(setup, window, "--window")
        self.units = setup.config.batch
        self.loss, self.rule, self.measure_kl = loss, rule, measure_kl
        self.window, self.window_rounds, self.guard = window, window_rounds, guard
        self.chain = setup.chain

    def collect(self, number: int) -> Metrics:
        """Sample and score the round, and take advantages over all of it."""
        setup = self.setup
        if self.window:
            config = setup.config
            if number == 0 and config.kl_target is not None and self.sweep > config.rounds:
                self.state.say(
                    f"[yellow]--kl-target changes nothing here: it goes by a sweep of the window, of {self.sweep} "
                    f"rounds, and the run has {config.rounds}.[/]"
                )
            first = (number // self.window_rounds) % (setup.chain.n_decisions - self.window + 1)
            self.chain = windowed(setup.model, setup.config, first, self.window)
        self.samples = samples = sample_round(setup, self.state, number, self.rule.group, chain=self.chain)
        rewards = samples.whole(setup.scored(samples))
        advantages = self.rule.advantages(number, rewards)
        self.advantages = advantages[samples.index.to(advantages.device)]
        self.told_apart = (advantages != 0).cpu()
        return summary(rewards)

    @property
    @override
    def times(self) -> Sequence[float]:
        return self.setup.chain.times[: self.setup.chain.n_decisions]

    @property
    @override
    def sweep(self) -> int:
        places = self.setup.chain.n_decisions - self.window + 1 if self.window else 1
        return self.window_rounds * places if places > 1 else 1

    @override
    def has_signal(self, units: Tensor) -> bool:
        return bool(self.told_apart[units].any())

    def losses(self, units: Tensor, number: int, turn: int) -> Iterator[Term]:
        """A term a denoising step: memory is one step's, whatever their number."""
        setup, samples = self.setup, self.samples
        local = torch.searchsorted(samples.index, units)
        condition = rows(samples.condition, local)
        states, old = samples.states[:, local], samples.log_probs[:, local]
        steps = self._steps(units, number, turn)
        for step in steps:
            step = step[None]
            transition = self.chain.transition(
                denoiser(setup.model, condition, guidance=setup.train_guidance), states, step
            )
            actions = self.chain.next_states(states, step)
            if self.guard:
                z = at_steps(self._noise(units, number), step)
                ratio, weight = self._guarded(transition, actions, z, step)
                loss, metrics = self.loss(ratio, torch.zeros_like(ratio), self.advantages[local])
                loss = weight * loss
            else:
                log_prob = transition.log_prob(actions)
                loss, metrics = self.loss(log_prob, at_steps(old, step), self.advantages[local])
            if self.measure_kl or self.state.kl_weight > 0:
                penalty, more = kl_loss(self._kl(transition, condition, states, step), dims=setup.dims)
                loss, metrics = loss + self.state.kl_weight * penalty, metrics | more
            yield loss / len(steps), metrics

    def _kl(self, transition: Transition, condition: dict[str, Tensor], states: Tensor, step: Tensor) -> Tensor:
        setup = self.setup
        reference = denoiser(setup.model, condition, reference=True, guidance=setup.train_guidance)
        with torch.no_grad():
            anchor = self.chain.transition(reference, states, step)
        return transition.kl(anchor)

    def _noise(self, units: Tensor, number: int) -> Tensor:
        """The noise z of the round's decisions (n_decisions, n, *shape), as it was drawn."""
        setup, chain = self.setup, self.chain
        path = setup.noise_path(ROLL_OUT, number)
        first = 1 + chain.first_decision  # the first draw is x_T
        noise = noise_of(setup.model.shape, chain.n_steps + 1, path, units, setup.model.device)
        return noise[first : first + chain.n_decisions]

    def _guarded(self, transition: Transition, actions: Tensor, z: Tensor, step: Tensor) -> tuple[Tensor, float]:
        """GRPO-Guard's log-ratio of a decision (1, n), and the weight of its loss (Wang et al. 2025, arXiv 2510.22319).

        The log-ratio of two Gaussians is L = -|dm|^2 / 2 n^2 + dm z / n, dm = m - m_old: its mean is below 0, and it is
        larger where the noise n is small, so that one clip is not one bound. Here it is (L + |dm|^2 / 2 n^2) n / N =
        dm z / N, N the root mean square of n over the decisions. The weight makes up for how far a step's mean moves
        with the network's answer, |f c_out|, so that all steps push alike; it has mean 1 (the authors': 1 / dt).
        """
        n = torch.tensor(self.chain.stds[self.chain.first_decision :][: self.chain.n_decisions], dtype=torch.float64)
        old = actions - transition.std * z
        ratio = ((transition.mean - old) * z).flatten(2).sum(-1, dtype=z.dtype) / float((n**2).mean().sqrt())
        weights = 1 / self.chain.pushes(self.setup.model.prediction)
        return ratio, float(weights[int(step)] / weights.mean())

    def _steps(self, units: Tensor, number: int, turn: int) -> Tensor:
        """The decisions to train on: all of them, (K,), or some for each image, (K, n)."""
        setup = self.setup
        k, of = setup.config.train_steps, self.chain.n_decisions
        if k == 0 or k >= of:
            return torch.arange(of)
        return torch.stack(
            [self.chain.draw_steps(k, setup.generator(STEPS, number, turn, i)) for i in units.tolist()], 1
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
    """Flow-GRPO (arXiv 2505.05470): DDPO-IS's loss, advantages within the groups of a round.

    With a window of steps that have noise it is MixGRPO (arXiv 2507.21802), with guarded ratios GRPO-Guard (arXiv
    2510.22319).
    """
    config = setup.config
    loss = functools.partial(ddpo_is_loss, clip_nats=config.clip_nats, dims=setup.dims)
    options: dict[str, Any] = {"window": config.window, "window_rounds": config.window_rounds, "guard": config.guard}
    return PolicyGradient(setup, state, loss, WithinGroups(config.group), **options)


def dpok(setup: Setup[DPOKConfig], state: RunState) -> PolicyGradient:
    """DPOK (arXiv 2305.16381): the hard-clamped ratio, held to the pretrained model by the KL: together `dpok_loss`.

    DPOK's value function is here, as in DDPO, the mean of the prompt's rewards.
    """
    loss = functools.partial(hard_clipped_loss, clip_nats=setup.config.clip_nats, dims=setup.dims)
    return PolicyGradient(setup, state, loss, WithinPrompts(setup), measure_kl=True)
