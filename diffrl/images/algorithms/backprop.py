"""A differentiable reward's own gradient, carried back through the end of the chain: DRaFT-K, AlignProp, ReFL."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from diffrl.alignment.losses import refl_loss
from diffrl.images.algorithms.base import Algorithm, Metrics, Term
from diffrl.images.config import DRaFTConfig, ReFLConfig
from diffrl.images.examples import examples_of
from diffrl.images.model import decoded
from diffrl.images.rewards import grouped
from diffrl.images.rewards.base import without_gradient
from diffrl.images.samples import (
    PAIRS,
    PROMPTS,
    ROLL_OUT,
    STEPS,
    Config,
    RunState,
    Setup,
    conditions,
    denoiser,
    noise_of,
    pure,
)
from diffrl.support.errors import UserError


class Backpropagation(Algorithm[Config]):
    """What DRaFT and ReFL share: a round is drawn prompts; their images are made and scored where the loss is."""

    def __init__(self, setup: Setup[Config], state: RunState) -> None:
        super().__init__(setup, state)
        self.units = setup.config.batch
        self.chosen = torch.empty(0, dtype=torch.int64)
        reward = setup.reward
        if reward is None or not reward.differentiable:
            raise without_gradient("none" if reward is None else reward.name, setup.config.algo)
        if grouped(reward):
            raise UserError(
                f"{setup.config.algo} asks about a few images at a time, and {reward.name} compares all of a prompt: "
                "--algo grpo."
            )

    @property
    def queries(self) -> int:
        """How many images are scored in a round: every pass makes its images anew."""
        return self.units * self.setup.config.passes

    @property
    def sampled(self) -> int:
        """0: no image is sampled before the loss."""
        return 0

    def collect(self, number: int) -> Metrics:
        """Draw the round's prompts."""
        setup = self.setup
        self.chosen = setup.prompts.draw(self.units, 1, setup.generator(PROMPTS, number))
        return {}


class DRaFT(Backpropagation[DRaFTConfig]):
    """-E[r(x_0)], differentiated through the last K steps (Clark et al. 2023, arXiv 2309.17400; AlignProp, 2310.03739).

    The steps before are constants. Rewards are not normalised: Adam takes no notice of their scale.
    """

    @property
    @override
    def times(self) -> Sequence[float]:
        return self.setup.chain.times[-self._graphed :]

    @property
    def _graphed(self) -> int:
        """K: how many of the last steps have a graph."""
        return min(self.setup.config.draft_steps, self.setup.chain.n_steps)

    def losses(self, units: Tensor, number: int, turn: int) -> Iterator[Term]:
        """One term, whose graph holds K calls of the network; and, with --kl, the penalty's."""
        setup = self.setup
        model, chain = setup.model, setup.chain
        prompts, metadata = setup.prompts.of(self.chosen[units])
        noise = noise_of(model.shape, chain.n_steps + 1, setup.noise_path(ROLL_OUT, number, turn), units, model.device)
        condition = conditions(model, prompts, metadata)
        denoise = denoiser(model, condition, guidance=setup.train_guidance)
        start = pure(model, chain, noise[0])
        rollout = chain.rollout(denoise, start, noise=noise[1:], differentiable_steps=self._graphed)
        values = setup.ask(decoded(model, rollout.x, number, self.state.updates), prompts, metadata)
        yield -values.mean(), {"reward": values.detach().mean()}
        yield from self.penalties(condition, rollout.states.detach())


class ReFL(Backpropagation[ReFLConfig]):
    """ReFL (Xu et al. 2023, arXiv 2304.05977): the reward of D(x_t, t) at one step of the last quarter, by its gradient

        w relu(m - r(D(x_t, t))) + L_denoising(images of --data),

    m = 2 and w = 1e-3 there. The second term is the paper's, and what keeps images what they were; the authors' code
    lacks it.
    """

    def __init__(self, setup: Setup[ReFLConfig], state: RunState) -> None:
        super().__init__(setup, state)
        self.source = examples_of(setup.config.data, setup.model)

    def losses(self, units: Tensor, number: int, turn: int) -> Iterator[Term]:
        """Two terms: the reward's, and the denoising loss on as many images; and, with --kl, the penalty's."""
        setup, config = self.setup, self.setup.config
        model, chain = setup.model, setup.chain
        prompts, metadata = setup.prompts.of(self.chosen[units])
        noise = noise_of(model.shape, chain.n_steps + 1, setup.noise_path(ROLL_OUT, number, turn), units, model.device)
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
        values = setup.ask(decoded(model, denoise(x_t, t), number, self.state.updates), prompts, metadata)
        loss, metrics = refl_loss(values, config.refl_margin)
        yield config.refl_weight * loss, metrics
        yield from self.penalties(condition, states)

        index = torch.randint(len(self.source), (self.units,), generator=setup.generator(PAIRS, number, turn))[units]
        batch = self.source.batch(index)
        yield self.denoising_term(batch, batch.prompts, units, number, turn)
