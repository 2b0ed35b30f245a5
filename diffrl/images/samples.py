"""What a run samples: of which prompts, with whose noise, by which chain."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from diffrl.diffusion import Denoise, denoising_loss
from diffrl.diffusion.chain import DenoisingChain
from diffrl.images.config import FinetuneConfig
from diffrl.images.emoji_words import PROMPTS as EMOJI
from diffrl.images.examples import extras_of
from diffrl.images.model import Condition, ImageModel, decoded, image_shape, loss_guidance
from diffrl.images.rewards.base import Reward, answer, answer_parts, grouped, parts_of
from diffrl.images.rewards.human import Human
from diffrl.images.rewards.scaled import ScaledSum
from diffrl.images.world import World
from diffrl.support.errors import UserError
from diffrl.support.seeds import generator_at

# What random numbers are for: the second entry of a generator's path, after the run's seed. Paths of one purpose must
# differ by more than zeros at their end, which numpy's SeedSequence does not see.
EVALUATION, PROMPTS, ROLL_OUT, ORDER, STEPS, LOSS, NOISE, PAIRS, PROBE_TIMES, PROBE_NOISE = range(10)

Config = TypeVar("Config", bound=FinetuneConfig, covariant=True)
"""The settings of the run's algorithm."""


# --- Of which prompts ----------------------------------------------------------------------------------------------


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


def prompts_of(base: str | None) -> Sequence[str]:
    """The prompts of a built-in model: one a class."""
    return EMOJI if base == "tiny-emoji" else [str(digit) for digit in range(10)]


# --- By what and how -----------------------------------------------------------------------------------------------


@dataclass
class RunState:
    """What changes in the course of a run, besides the network and its optimiser."""

    round: int = 0
    """Rounds finished."""
    updates: int = 0
    """Updates made, counting those that fp16's scaler skips."""
    queries: int = 0
    """Images scored."""
    silent: int = 0
    """Rounds in which no update was made, as the rewards said nothing."""
    kl_weight: float = 0.0
    """Weight of the divergence from the frozen model; with --kl-target it is adapted."""
    kls: list[float] = field(default_factory=list)
    """Nats a decision of the rounds since it was adapted."""
    images: int = 0
    """Images sampled or trained on so far in the task that `on_progress` follows."""
    on_progress: Callable[[int], None] = lambda images: None
    """Called with `images` whenever the count rises."""
    say: Callable[[str], None] = lambda text: None
    """Hears a sentence for the user."""

    def passed(self, n: int) -> None:
        """Count n more images."""
        self.images += n
        self.on_progress(self.images)


@dataclass(frozen=True)
class Setup(Generic[Config]):
    """What a run works with: all that does not change in its course."""

    config: Config
    model: ImageModel
    chain: DenoisingChain
    prompts: Prompts
    reward: Reward | None
    """The reward that is learned from; None: the run scores no images."""
    world: World = field(default_factory=World)

    @property
    def dims(self) -> int:
        """d, the dimensions of a state: log-ratios are divided by it, as published, but for their clip."""
        return math.prod(self.model.shape)

    @property
    def train_guidance(self) -> float:
        """The scale of guidance in training."""
        return self.config.guidance if self.config.train_guidance else 1.0

    @property
    def loss_guidance(self) -> float:
        """The scale of guidance in a denoising loss: 1, but where the network is told what it is sampled with."""
        return loss_guidance(self.model, self.train_guidance)

    def generator(self, *path: int) -> torch.Generator:
        """A generator on the CPU, for what `path` numbers."""
        return generator_at(self.config.seed, *path)

    def noise_path(self, *path: int) -> tuple[int, ...]:
        """The path of the noise of samples, to which `noise_of` appends the sample's number."""
        return (self.config.seed, *path)

    def ask(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """The reward of images (n,), with a graph where it has one. Raises ValueError for a run without a reward."""
        return answer(self._asked(), images, prompts, metadata)

    def scored(self, samples: "Samples") -> Tensor:
        """The reward of this process's samples (n,), on the model's device. Raises ValueError as `ask` does."""
        reward = self._asked()
        total, each = score(reward, samples, self.config.micro_batch)
        if isinstance(reward, ScaledSum):
            numbers = {text: number for number, text in enumerate(self.prompts.texts)}
            prompts = samples.whole(torch.tensor([numbers[text] for text in samples.prompts], device=total.device))
            reward.observe({name: samples.whole(values) for name, values in each.items()}, prompts)
            total = reward.scaled(each)
        return total.to(self.model.device)

    def _asked(self) -> Reward:
        if self.reward is None:
            raise ValueError(f"{self.config.algo} has been set up without a reward, and asks for one")
        return self.reward


@dataclass
class Samples:
    """The n samples of a round that one process has made: the states x_T ... x_0, and what is known of each."""

    index: Tensor
    """The samples' numbers in the round (n,)."""
    prompts: list[str]
    metadata: list[Mapping[str, Any]]
    condition: Condition
    states: Tensor
    """x_T ... x_0: (T + 1, n, *shape)."""
    log_probs: Tensor
    """log pi of each decision when it was made: (n_decisions, n), in nats."""
    images: Tensor
    """x_0 decoded: (n, C, H, W) in [0, 1]."""
    total: int
    """Samples of the round, in all processes."""
    world: World

    def __len__(self) -> int:
        return len(self.index)

    def whole(self, values: Tensor) -> Tensor:
        """Values (total, ...) of all samples of the round, from those of each process's own (n, ...)."""
        return self.world.merge(values, self.index, self.total)


@torch.no_grad()
def score(reward: Reward, samples: Samples, micro_batch: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The reward of a process's samples (n,), asked in parts, and, of a sum, of each of its parts by name (n,).

    A reward that is `grouped` is asked about all samples of a prompt together, one prompt after the other; a person
    looks at all of them first.
    """
    n = len(samples)
    for person in (part for part in parts_of(reward) if isinstance(part, Human)):
        person.look(samples.images, samples.prompts)
    index = by_prompt(samples.prompts) if grouped(reward) else [list(range(n))[part] for part in parts(n, micro_batch)]
    prompts, metadata = samples.prompts, samples.metadata
    each = [
        answer_parts(reward, samples.images[rows], [prompts[i] for i in rows], [metadata[i] for i in rows])
        for rows in index
    ]
    order = torch.tensor([i for rows in index for i in rows]).argsort()
    total = torch.cat([total for total, _ in each])
    order = order.to(total.device)
    return total[order], {name: torch.cat([of[name] for _, of in each])[order] for name in each[0][1]}


def by_prompt(prompts: Sequence[str]) -> list[list[int]]:
    """The places of each prompt, in the order of their first ones."""
    places: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(i)
    return list(places.values())


def chain_of(model: ImageModel, config: FinetuneConfig) -> DenoisingChain:
    """The chain of `steps` denoising steps. Raises UserError where steps and eta make none."""
    try:
        return _chain(model, config)
    except ValueError as error:
        raise UserError(f"--steps {config.steps} with --eta {config.eta:g} make no chain: {error}.") from error


def windowed(model: ImageModel, config: FinetuneConfig, first: int, length: int) -> DenoisingChain:
    """The same chain with noise in `length` steps from `first` on alone, which are its decisions."""
    return _chain(model, config, window=(first, length))


def _chain(model: ImageModel, config: FinetuneConfig, **options: Any) -> DenoisingChain:
    process, times = model.prediction.process, model.times(config.steps)
    return DenoisingChain(process, times, config.eta, clip=model.clip, event_dims=len(model.shape), **options)


def noise_of(
    shape: Sequence[int], draws: int, path: Sequence[int], index: Tensor, device: torch.device | str
) -> Tensor:
    """Standard normal noise (draws, n, *shape): each sample has its own, by its number in `index` (n,).

    path: what the noise is for. So neither the size of the parts that go through the network, nor which process samples
    what, changes any image.
    """
    each = [
        torch.randn(draws, *shape, generator=generator_at(*path, i, device=device), device=device)
        for i in index.tolist()
    ]
    return torch.stack(each, 1)


def parts(n: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover 0 ... n - 1."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def rows(condition: Condition, index: Tensor | slice) -> Condition:
    """The rows at `index` of a condition: that of some of the samples.

    Each entry is indexed where it is: some are on the host while the others are on a GPU.
    """
    if isinstance(index, slice):
        return {name: value[index] for name, value in condition.items()}
    return {name: value[index.to(value.device)] for name, value in condition.items()}


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


def times_of(setup: Setup, draws: int, index: Tensor, *path: int) -> Tensor:
    """Random times (draws, n) as the model was trained with: each sample has its own, by its number in `index` (n,).

    path: what the times are for.
    """
    each = [setup.model.training_times(draws, setup.generator(*path, i)) for i in index.tolist()]
    return torch.stack(each, 1)


def denoising_errors(
    model: ImageModel,
    condition: Condition,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    reference: bool = False,
    guidance: float = 1.0,
) -> Tensor:
    """The denoising loss (n,) of states x_0 (n, *shape) at times t (n,) with noise (n, *shape).

    guidance: what `loss_guidance` says.
    """
    network = model.network(condition, reference=reference, guidance=guidance)
    return denoising_loss(model.prediction, network, x0, t, noise, event_dims=len(model.shape))


def pure(model: ImageModel, chain: DenoisingChain, noise: Tensor) -> Tensor:
    """x_T made of standard normal noise: the noise itself, or, on processes whose deviation exceeds 1 (VE), scaled."""
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
    chain: DenoisingChain | None = None,
) -> Samples:
    """Sample the chain for this process's share of the prompts `chosen` (total,), in parts of `micro_batch`.

    path: whose noise, see `noise_of`. unit: so many samples in turn stay in one process. chain: another than the
    setup's. Control and reference images are read where the prompts' metadata name them.

    Raises NotFinite as `decoded`.
    """
    model, world = setup.model, setup.world
    chain = setup.chain if chain is None else chain
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
        images.append(decoded(model, rollout.x, state.round, state.updates))
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
    chain: DenoisingChain | None = None,
) -> Samples:
    """Sample this process's share of round `number`: n images (by default a batch), prompts in groups of `group`.

    unit: so many images in turn stay in one process. reference: by the frozen model. chain: another than the setup's.
    """
    n = setup.config.batch if n is None else n
    chosen = setup.prompts.draw(n, group, setup.generator(PROMPTS, number))
    path = setup.noise_path(ROLL_OUT, number)
    options: dict[str, Any] = {"unit": unit, "reference": reference, "chain": chain}
    return roll_out(setup, state, chosen, path, guidance=setup.train_guidance, **options)
