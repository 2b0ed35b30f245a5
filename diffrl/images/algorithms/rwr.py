"""RWR: reward-weighted regression."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from diffrl.alignment.losses import rwr_weights
from diffrl.images.algorithms.base import Algorithm, Metrics, Term, WithinPrompts, summary
from diffrl.images.config import RWRConfig
from diffrl.images.samples import RunState, Samples, Setup, denoising_errors, rows, sample_round


class RWR(Algorithm[RWRConfig]):
    """The denoising loss on the model's own images x_0, each weighted by exp(beta A) / Z (arXiv 2305.13301, 4.2).

    A is the reward normalised per prompt, so that beta means the same for every reward and no prompt takes all weight.
    Weights are of the whole round and have mean 1.
    """

    samples: Samples
    """This process's samples of the round, after `collect`."""
    weights: Tensor
    """The weights of these samples (n,), after `collect`."""
    told_apart: bool
    """Whether any advantage of the round is other than 0: else all weights are alike, and it learns from itself."""

    def __init__(self, setup: Setup[RWRConfig], state: RunState) -> None:
        super().__init__(setup, state)
        self.units = setup.config.batch
        self.rule = WithinPrompts(setup)

    def collect(self, number: int) -> Metrics:
        """Sample and score the round, and weigh its samples."""
        setup = self.setup
        self.samples = samples = sample_round(setup, self.state, number)
        rewards = samples.whole(setup.scored(samples))
        if self.state.kl_weight == 0:
            samples.states = samples.states[-1:].clone()  # of the chain x_0 is all that is learnt from
        advantages = self.rule.advantages(number, rewards)
        self.told_apart = bool((advantages != 0).any())
        w = rwr_weights(advantages, setup.config.beta)
        self.weights = self.units * w[samples.index.to(w.device)]
        return {**summary(rewards), "effective_samples": float(1 / (w**2).sum())}

    @override
    def has_signal(self, units: Tensor) -> bool:
        return self.told_apart

    def losses(self, units: Tensor, number: int, turn: int) -> Iterator[Term]:
        """One term, with a time and a noise for each image; and, with --kl, the penalty's."""
        model, samples = self.setup.model, self.samples
        local = torch.searchsorted(samples.index, units)
        condition = rows(samples.condition, local)
        x0, (times, noise) = samples.states[-1, local], self.corruption(units, number, turn)
        errors = denoising_errors(model, condition, x0, times, noise, guidance=self.setup.loss_guidance)
        yield (self.weights[local] * errors).mean(), {"error": errors.detach().mean()}
        yield from self.penalties(condition, samples.states[:, local])

    def state_dict(self) -> dict[str, Any]:
        """The latest rewards of each prompt."""
        return {"statistics": self.rule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the rewards of each prompt."""
        self.rule.load_state_dict(state["statistics"])
