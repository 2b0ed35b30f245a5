"""What an algorithm of fine-tuning is to the trainer, and what it is given."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffrl.alignment.losses import kl_loss
from diffrl.diffusion.chain import DenoisingChain
from diffrl.images.config import FinetuneConfig
from diffrl.images.model import Condition, ImageModel
from diffrl.images.prompts import Prompts
from diffrl.images.rewards.base import Reward, ask
from diffrl.images.samples import Samples, denoiser, noise_of, parts, roll_out
from diffrl.images.world import World
from diffrl.support.seeds import generator_at

# What random numbers are for: the second entry of a generator's path, after the run's seed. Paths of one purpose must
# differ by more than zeros at their end, which numpy's SeedSequence does not see.
EVALUATION, PROMPTS, ROLL_OUT, ORDER, STEPS, LOSS, NOISE, PAIRS, PROBE_TIMES, PROBE_NOISE = range(10)

Metrics = dict[str, float]
Term = tuple[Tensor, dict[str, Tensor]]
"""A part of a loss, to be added to the other parts, and metrics, to be averaged; both means over the rows asked for."""


@dataclass
class Setup:
    """What every algorithm works with."""

    config: FinetuneConfig
    """Resolved."""
    model: ImageModel
    chain: DenoisingChain
    prompts: Prompts
    reward: Reward | None
    world: World = field(default_factory=World)
    on_progress: Callable[[int], None] = lambda n: None
    """Hears of images sampled, or trained on."""
    kl_weight: float = 0.0
    """Of the penalty now: the adaptive one changes it."""

    @property
    def dims(self) -> int:
        """d, the dimensions of a state: log-ratios are divided by it, as published, but for their clip."""
        return math.prod(self.model.shape)

    @property
    def train_guidance(self) -> float:
        """The scale of guidance in training."""
        config = self.config
        assert config.guidance is not None
        return config.guidance if config.train_guidance else 1.0

    def generator(self, *path: int) -> torch.Generator:
        """On the CPU, for what `path` numbers."""
        return generator_at(self.config.seed, *path)

    def noise_path(self, *path: int) -> tuple[int, ...]:
        """The path of the noise of samples, to which `noise_of` appends the sample's number."""
        return (self.config.seed, *path)

    def scored(self, samples: Samples) -> Tensor:
        """The reward of samples (n,), in parts; on the model's device."""
        assert self.reward is not None
        with torch.no_grad():
            values = [
                ask(self.reward, samples.images[part], samples.prompts[part], samples.metadata[part])
                for part in parts(len(samples), self.config.micro_batch)
            ]
        return torch.cat(values).to(self.model.device)


class Algorithm(ABC):
    """How a round is sampled, and the loss of some of it.

    A round has `units` that are shuffled, shared among updates, and shared among processes: samples, or what belongs
    together. `collect` prepares those of this process; `losses` is asked for parts of them.
    """

    units: int
    images: int = 1
    """Of a unit, that are in the network at once."""
    prepared: int = 0
    """Images that were scored before the first round."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    @abstractmethod
    def collect(self, number: int) -> Metrics:
        """Prepare round `number`; metrics of the whole round, the same on all processes."""

    @abstractmethod
    def losses(self, units: Tensor, number: int, turn: int) -> Iterator[Term]:
        """The loss of some of this process's units (numbers in the round), term by term, each freed before the next.

        turn: which of the round's passes. The terms add up to the mean over `units`.
        """

    @property
    def queries(self) -> int:
        """How many images a round has scored: by default one a unit."""
        return self.units

    def state(self) -> dict[str, Any]:
        """What a resumed run needs besides the network and the optimiser, as JSON."""
        return {}

    def load(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take up a `state`."""

    def penalties(self, condition: Condition, states: Tensor) -> Iterator[Term]:
        """With --kl, its weight times the mean over steps of KL/d to the frozen model, in the states of a roll-out.

        condition: of n images; states: (T + 1, n, *shape). A term a decision. For algorithms that do not go through the
        decisions themselves.
        """
        setup = self.setup
        if setup.kl_weight == 0:
            return
        current = denoiser(setup.model, condition, guidance=setup.train_guidance)
        reference = denoiser(setup.model, condition, reference=True, guidance=setup.train_guidance)
        for step in range(setup.chain.n_decisions):
            loss, metrics = kl_loss(setup.chain.kl(current, reference, states, [step]), dims=setup.dims)
            yield setup.kl_weight * loss / setup.chain.n_decisions, metrics

    def corruption(self, units: Tensor, *path: int) -> tuple[Tensor, Tensor]:
        """For denoising losses: a time (n,) and noise (n, *shape) for each of the units, its own."""
        setup, model = self.setup, self.setup.model
        t = torch.cat([model.training_times(1, setup.generator(LOSS, *path, i)) for i in units.tolist()])
        return t, noise_of(model.shape, 1, setup.noise_path(NOISE, *path), units, model.device)[0]


def sample(
    setup: Setup, number: int, group: int = 1, unit: int = 1, *, n: int | None = None, reference: bool = False
) -> Samples:
    """Sample this process's share of round `number`: n images (by default a batch), prompts in groups of `group`.

    unit: so many images in turn stay in one process. reference: by the frozen model.
    """
    config = setup.config
    assert config.batch is not None
    n = config.batch if n is None else n
    chosen = setup.prompts.draw(n, group, setup.generator(PROMPTS, number))
    own = setup.world.share(n // unit)
    index = (own[:, None] * unit + torch.arange(unit)).flatten()
    prompts, metadata = setup.prompts.of(chosen[index])
    return roll_out(
        setup.model,
        setup.chain,
        prompts,
        metadata,
        index,
        setup.noise_path(ROLL_OUT, number),
        guidance=setup.train_guidance,
        reference=reference,
        micro_batch=config.micro_batch,
        on_progress=setup.on_progress,
    )


def summary(rewards: Tensor) -> Metrics:
    """Of the rewards of a round (n,): mean and standard deviation."""
    return {"reward": float(rewards.mean()), "reward_std": float(rewards.std(correction=0))}
