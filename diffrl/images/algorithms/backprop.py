"""A differentiable reward's own gradient, carried back through the end of the chain: DRaFT-K, AlignProp, ReFL."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diffrl.alignment.losses import refl_loss
from diffrl.images.algorithms.base import PAIRS, PROMPTS, ROLL_OUT, STEPS, Algorithm, Metrics, Setup, Term
from diffrl.images.algorithms.shared import denoising_term
from diffrl.images.examples import Source
from diffrl.images.rewards.base import ask
from diffrl.images.samples import conditions, denoiser, noise_of, pure
from diffrl.support.errors import UserError


def require_gradient(setup: Setup) -> None:
    """Raise UserError where the reward has no gradient."""
    reward = setup.reward
    if reward is None or not reward.differentiable:
        name = "none" if reward is None else reward.name
        raise UserError(
            f"{setup.config.algo} needs a reward with a gradient, and {name} has none: choose a classifier, aesthetic, "
            "clip and the like, or --algo ddpo-is."
        )


class Backpropagation(Algorithm):
    """What both share: prompts are drawn, and images are made and scored where the loss is."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        config = setup.config
        assert config.batch is not None
        self.units = config.batch
        self.chosen = torch.empty(0, dtype=torch.int64)
        require_gradient(setup)

    @property
    def queries(self) -> int:
        """Every pass makes its images anew."""
        return self.units * self.setup.config.passes

    def collect(self, number: int) -> Metrics:
        """Draw the round's prompts."""
        setup = self.setup
        self.chosen = setup.prompts.draw(self.units, 1, setup.generator(PROMPTS, number))
        return {}

    def _score(self, images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> Tensor:
        assert self.setup.reward is not None
        return ask(self.setup.reward, images, prompts, metadata)


class DRaFT(Backpropagation):
    """-E[r(x_0)], differentiated through the last K steps (Clark et al. 2023, arXiv 2309.17400; AlignProp, 2310.03739).

    The steps before are constants. Rewards are not normalised: Adam takes no notice of their scale.
    """

    def losses(self, units: Tensor, number: int, turn: int) -> Iterator[Term]:
        """One term, whose graph holds K calls of the network."""
        setup = self.setup
        model, chain = setup.model, setup.chain
        prompts, metadata = setup.prompts.of(self.chosen[units])
        noise = noise_of(model.shape, chain.n_steps + 1, setup.noise_path(ROLL_OUT, number, turn), units, model.device)
        condition = conditions(model, prompts, metadata)
        denoise = denoiser(model, condition, guidance=setup.train_guidance)
        k = min(setup.config.draft_steps, chain.n_steps)
        rollout = chain.rollout(denoise, pure(model, chain, noise[0]), noise=noise[1:], differentiable_steps=k)
        values = self._score(model.decode(rollout.x), prompts, metadata)
        yield -values.mean(), {"reward": values.detach().mean()}
        yield from self.penalties(condition, rollout.states.detach())


class ReFL(Backpropagation):
    """ReFL (Xu et al. 2023, arXiv 2304.05977): the reward of D(x_t, t) at one step of the last quarter, by its gradient

        w relu(m - r(D(x_t, t))) + L_denoising(images of --data),

    m = 2 and w = 1e-3 there. The second term is the paper's, and what keeps images what they were; the authors' code
    lacks it. Its images come from `source`.
    """

    def __init__(self, setup: Setup, source: Source) -> None:
        super().__init__(setup)
        self.source = source

    def losses(self, units: Tensor, number: int, turn: int) -> Iterator[Term]:
        """Two terms: the reward's, and the denoising loss on as many images."""
        setup, config = self.setup, self.setup.config
        model, chain = setup.model, setup.chain
        prompts, metadata = setup.prompts.of(self.chosen[units])
        path = setup.noise_path(ROLL_OUT, number, turn)
        noise = noise_of(model.shape, chain.n_steps + 1, path, units, model.device)
        last_quarter = max(1, chain.n_steps // 4)
        # One step for the whole round: to stop at another in every image would take a roll-out each.
        drawn = torch.randint(last_quarter, (), generator=setup.generator(STEPS, number, turn))
        step = chain.n_steps - 1 - int(drawn)
        condition = conditions(model, prompts, metadata)
        denoise = denoiser(model, condition, guidance=setup.train_guidance)
        with torch.no_grad():
            states = chain.rollout(denoise, pure(model, chain, noise[0]), noise=noise[1:]).states
        x_t = states[step]
        t = x_t.new_full((), chain.times[step])
        values = self._score(model.decode(denoise(x_t, t)), prompts, metadata)
        loss, metrics = refl_loss(values, config.refl_margin)
        yield config.refl_weight * loss, metrics
        yield from self.penalties(condition, states)

        index = torch.randint(len(self.source), (self.units,), generator=setup.generator(PAIRS, number, turn))[units]
        batch = self.source.batch(index)
        yield denoising_term(self, batch, batch.prompts, units, number, turn)
