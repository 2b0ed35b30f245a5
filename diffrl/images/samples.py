"""What a run samples: of which prompts, with whose noise, by which chain; and what every part of it works with."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from diffrl.diffusion import Denoise, denoising_loss
from diffrl.diffusion.chain import DenoisingChain
from diffrl.images.config import FinetuneConfig
from diffrl.images.examples import extras_of
from diffrl.images.model import Condition, ImageModel, image_shape
from diffrl.images.rewards.base import Reward, ask
from diffrl.images.world import World
from diffrl.support.errors import UserError
from diffrl.support.seeds import generator_at

# What random numbers are for: the second entry of a generator's path, after the run's seed. Paths of one purpose must
# differ by more than zeros at their end, which numpy's SeedSequence does not see.
EVALUATION, PROMPTS, ROLL_OUT, ORDER, STEPS, LOSS, NOISE, PAIRS, PROBE_TIMES, PROBE_NOISE = range(10)

Config = TypeVar("Config", bound=FinetuneConfig, covariant=True)
"""The settings of the run's algorithm."""


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run: texts, and what is known of each beside it, for rewards that ask for it."""

    texts: tuple[str, ...]
    metadata: tuple[Mapping[str, Any], ...]

    def __len__(self) -> int:
        return len(self.texts)

    def draw(self, n: int, group: int, generator: torch.Generator) -> Tensor:
        """Indices (n,) of prompts: groups of one prompt, the groups in random order, every prompt about as often.

        Prompts come in random permutations, one after the other, so that each is asked for once before one is again.
        """
        groups = -(-n // group)
        turns = [torch.randperm(len(self), generator=generator) for _ in range(-(-groups // len(self)))]
        return torch.cat(turns)[:groups].repeat_interleave(group)[:n]

    def of(self, index: Tensor) -> tuple[list[str], list[Mapping[str, Any]]]:
        """The texts and the metadata of the prompts at an index (n,)."""
        chosen = index.tolist()
        return [self.texts[i] for i in chosen], [self.metadata[i] for i in chosen]


def plain(texts: Sequence[str]) -> Prompts:
    """Prompts without metadata."""
    return Prompts(tuple(texts), ({},) * len(texts))


@dataclass
class RunState:
    """What changes in the course of a run, besides the network and its optimiser."""

    round: int = 0
    """Rounds made."""
    updates: int = 0
    """Steps of the optimiser asked for."""
    queries: int = 0
    """Images scored."""
    kl_weight: float = 0.0
    """Weight of the divergence from the frozen model: the adaptive one changes it."""
    images: int = 0
    """Images that have been sampled or trained on, in what `on_progress` follows."""
    on_progress: Callable[[int], None] = lambda images: None
    """Hears how many `images` there have been."""

    @classmethod
    def of(cls, config: FinetuneConfig) -> "RunState":
        """The state of a run before its first round."""
        return cls(queries=config.scored_before, kl_weight=config.kl_weight)

    def passed(self, n: int) -> None:
        """Count n more images."""
        self.images += n
        self.on_progress(self.images)


@dataclass(frozen=True)
class Setup(Generic[Config]):
    """What a run works with, and what does not change in its course."""

    config: Config
    model: ImageModel
    chain: DenoisingChain
    prompts: Prompts
    reward: Reward | None
    """None: the run scores no images."""
    world: World = field(default_factory=World)

    @property
    def dims(self) -> int:
        """d, the dimensions of a state: log-ratios are divided by it, as published, but for their clip."""
        return math.prod(self.model.shape)

    @property
    def train_guidance(self) -> float:
        """The scale of guidance in training."""
        return self.config.guidance if self.config.train_guidance else 1.0

    def generator(self, *path: int) -> torch.Generator:
        """A generator on the CPU, for what `path` numbers."""
        return generator_at(self.config.seed, *path)

    def noise_path(self, *path: int) -> tuple[int, ...]:
        """The path of the noise of samples, to which `noise_of` appends the sample's number."""
        return (self.config.seed, *path)

    def ask(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """The reward of images (n,), with a graph where it has one. Raises ValueError for a run without a reward."""
        if self.reward is None:
            raise ValueError(f"{self.config.algo} has been set up without a reward, and asks for one")
        return ask(self.reward, images, prompts, metadata)

    def scored(self, samples: "Samples") -> Tensor:
        """The reward of this process's samples (n,), asked in parts; on the model's device."""
        with torch.no_grad():
            values = [
                self.ask(samples.images[part], samples.prompts[part], samples.metadata[part])
                for part in parts(len(samples), self.config.micro_batch)
            ]
        return torch.cat(values).to(self.model.device)


@dataclass
class Samples:
    """What a process has sampled of a round, n samples: x_T ... x_0, and what is known of each."""

    index: Tensor
    """Their numbers in the round (n,)."""
    prompts: list[str]
    metadata: list[Mapping[str, Any]]
    condition: Condition
    states: Tensor
    """(T + 1, n, *shape)."""
    log_probs: Tensor
    """(n_decisions, n), in nats."""
    images: Tensor
    """(n, C, H, W) in [0, 1]."""
    total: int
    """Samples of the round, in all processes."""
    world: World

    def __len__(self) -> int:
        return len(self.index)

    def whole(self, values: Tensor) -> Tensor:
        """Values (total, ...) of all samples of the round, from those of each process's own (n, ...)."""
        return self.world.merge(values, self.index, self.total)


def chain_of(model: ImageModel, config: FinetuneConfig) -> DenoisingChain:
    """The chain of `steps` denoising steps. Raises UserError where steps and eta make none."""
    try:
        times = model.times(config.steps)
        return DenoisingChain(model.prediction.process, times, config.eta, clip=model.clip, event_dims=len(model.shape))
    except ValueError as error:
        raise UserError(f"--steps {config.steps} with --eta {config.eta:g} make no chain: {error}.") from error


def noise_of(
    shape: Sequence[int], draws: int, path: Sequence[int], index: Tensor, device: torch.device | str
) -> Tensor:
    """Standard normal noise (draws, n, *shape), each sample's its own, by its number in `index`; `path`: what for.

    So neither the size of the parts that go through the network, nor who samples what, changes any image.
    """
    each = [
        torch.randn(draws, *shape, generator=generator_at(*path, i, device=device), device=device)
        for i in index.tolist()
    ]
    return torch.stack(each, 1)


def parts(n: int, size: int) -> Iterator[slice]:
    """0 ... n - 1 in slices of at most `size`."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def rows(condition: Condition, index: Tensor | slice) -> Condition:
    """The condition of some of the samples."""
    return {name: value[index] for name, value in condition.items()}


def conditions(model: ImageModel, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Condition:
    """The model's condition of prompts, and of the images that their metadata name beside them."""
    if not model.extras:
        return model.conditions(prompts, None)
    *_, c, h, w = image_shape(model)
    extras = extras_of(metadata, model.extras, (h, w), c)
    return model.conditions(prompts, {name: images.to(model.device) for name, images in extras.items()} or None)


def denoiser(model: ImageModel, condition: Condition, *, reference: bool = False, guidance: float = 1.0) -> Denoise:
    """D(x, t) of a model under a condition."""
    return model.prediction.denoiser(model.network(condition, reference=reference, guidance=guidance))


def denoising_errors(
    model: ImageModel, condition: Condition, x0: Tensor, t: Tensor, noise: Tensor, *, reference: bool = False
) -> Tensor:
    """The denoising loss (n,) of states x_0 (n, *shape) at times t (n,) with noise (n, *shape), without guidance."""
    network = model.network(condition, reference=reference)
    return denoising_loss(model.prediction, network, x0, t, noise, event_dims=len(model.shape))


def pure(model: ImageModel, chain: DenoisingChain, noise: Tensor) -> Tensor:
    """x_T of standard normal noise: the noise itself, but on processes whose deviation goes beyond 1, VE's."""
    return max(1.0, float(model.prediction.process.sigma(torch.tensor(chain.times[0])))) * noise


@torch.no_grad()
def roll_out(
    setup: Setup,
    state: RunState,
    chosen: Tensor,
    path: Sequence[int],
    *,
    unit: int = 1,
    guidance: float = 1.0,
    reference: bool = False,
) -> Samples:
    """Sample the chain for this process's share of the prompts `chosen` (total,), in parts of `micro_batch`.

    path: whose noise, see `noise_of`. unit: so many samples in turn stay in one process. Control and reference images
    are read where the prompts' metadata name them.
    """
    model, chain, world = setup.model, setup.chain, setup.world
    total = len(chosen)
    index = (world.share(total // unit)[:, None] * unit + torch.arange(unit)).flatten()
    prompts, metadata = setup.prompts.of(chosen[index])
    condition = conditions(model, prompts, metadata)
    states, log_probs, images = [], [], []
    for part in parts(len(index), setup.config.micro_batch):
        noise = noise_of(model.shape, chain.n_steps + 1, path, index[part], model.device)
        denoise = denoiser(model, rows(condition, part), reference=reference, guidance=guidance)
        rollout = chain.rollout(denoise, pure(model, chain, noise[0]), noise=noise[1:])
        states.append(rollout.states)
        log_probs.append(rollout.log_probs)
        images.append(model.decode(rollout.x))
        state.passed(len(noise[0]))
    return Samples(
        index,
        prompts,
        metadata,
        condition,
        torch.cat(states, 1),
        torch.cat(log_probs, 1),
        torch.cat(images),
        total,
        world,
    )


def sample_round(
    setup: Setup,
    state: RunState,
    number: int,
    group: int = 1,
    unit: int = 1,
    *,
    n: int | None = None,
    reference: bool = False,
) -> Samples:
    """Sample this process's share of round `number`: n images (by default a batch), prompts in groups of `group`.

    unit: so many images in turn stay in one process. reference: by the frozen model.
    """
    n = setup.config.batch if n is None else n
    chosen = setup.prompts.draw(n, group, setup.generator(PROMPTS, number))
    path = setup.noise_path(ROLL_OUT, number)
    return roll_out(setup, state, chosen, path, unit=unit, guidance=setup.train_guidance, reference=reference)
