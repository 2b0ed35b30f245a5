"""RWR: reward-weighted regression."""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffrl.alignment.losses import rwr_weights
from diffrl.diffusion import denoising_loss
from diffrl.images.algorithms.base import Metrics, Setup, Term, sample, summary
from diffrl.images.algorithms.shared import OfSamples
from diffrl.images.model import rows


class RWR(OfSamples):
    """The denoising loss on the model's own images x_0, each weighted by exp(beta A) / Z (arXiv 2305.13301, 4.2).

    A is the reward normalised per prompt, so that beta means the same for every reward and no prompt takes all weight.
    Weights are of the whole round and have mean 1.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.weights = torch.empty(0)

    def collect(self, number: int) -> Metrics:
        """Sample, score, weigh."""
        setup, config = self.setup, self.setup.config
        assert config.beta is not None
        self.samples = samples = sample(setup, number)
        rewards = setup.world.merge(setup.scored(samples), samples.index, self.units)
        if setup.kl_weight == 0:
            samples.states = samples.states[-1:].clone()  # of the chain x_0 is all that is learnt from
        w = rwr_weights(self.normalised(number, rewards), config.beta)
        self.weights = self.units * w[samples.index.to(w.device)]
        return {**summary(rewards), "effective_samples": float(1 / (w**2).sum())}

    def losses(self, units: Tensor, number: int, turn: int) -> Iterator[Term]:
        """One term: a time and a noise for each image."""
        setup, samples = self.setup, self.samples
        assert samples is not None
        model = setup.model
        local = torch.searchsorted(samples.index, units)
        condition = rows(samples.condition, local.to(model.device))
        t, noise = self.corruption(units, number, turn)
        errors = denoising_loss(
            model.prediction, model.network(condition), samples.states[-1, local], t, noise, event_dims=len(model.shape)
        )
        yield (self.weights[local] * errors).mean(), {"error": errors.detach().mean()}
        yield from self.penalties(condition, samples.states[:, local])
