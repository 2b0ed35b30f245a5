"""The settings of each algorithm that fine-tunes image models: one frozen dataclass each. Imports no torch.

The first line of a class's docstring is what `diffrl finetune --help` says of the algorithm.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from diffrl.images.config.base import (
    Algo,
    ChainConfig,
    FinetuneConfig,
    OfflineConfig,
    OnlineConfig,
    base_of,
    flag,
)
from diffrl.images.distil_config import sampled_by
from diffrl.support.errors import UserError, counted
from diffrl.support.schema import (
    Batch,
    Count,
    Limit,
    Many,
    NotNegative,
    Positive,
    PositiveLimit,
    Range,
    SamplingSteps,
    Share,
    refusal,
)

CLIP_NATS = 1.64
"""DDPO's published clip, 1e-4 on the mean over Stable Diffusion's 16,384 dimensions, in nats."""


@dataclass(frozen=True)
class ClippedConfig(ChainConfig):
    """The settings of algorithms that clip the likelihood ratio of each denoising step."""

    pipeline: ClassVar[Mapping[str, Any]] = {**FinetuneConfig.pipeline, "kl": 0.0}

    kl: NotNegative = 0.2
    """Weight of the divergence from the frozen reference, step by step."""
    clip_nats: PositiveLimit = CLIP_NATS
    """Trust region on each step's log-ratio, in nats, the same at every image size. The published clip of 1e-4 on the
    mean over Stable Diffusion's 16,384 dimensions is 1.64."""


@dataclass(frozen=True)
class DDPOISConfig(ClippedConfig):
    """PPO on each denoising step (DDPO-IS, arXiv 2305.13301)."""

    algo: Algo = "ddpo-is"


@dataclass(frozen=True)
class DDPOSFConfig(ChainConfig):
    """The score-function gradient, one update a round (DDPO-SF, arXiv 2305.13301)."""

    pipeline: ClassVar[Mapping[str, Any]] = {**FinetuneConfig.pipeline, "updates": 1, "lr": 3e-4, "kl": 0.0}

    algo: Algo = "ddpo-sf"
    updates: Batch = 1
    """Optimiser steps a round: one, for the gradient is that of the policy that sampled."""
    passes: Count = 1
    """Times that a round's images are gone through: once."""
    lr: Positive = 6e-4
    """AdamW's learning rate."""
    kl: NotNegative = 0.2
    """Weight of the divergence from the frozen reference, step by step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.updates, self.passes) != (1, 1):
            raise UserError("ddpo-sf learns once from each image: --updates 1 and --passes 1, or --algo ddpo-is.")


@dataclass(frozen=True)
class GRPOConfig(ClippedConfig):
    """PPO on each step, advantages within groups of one prompt (Flow-GRPO, arXiv 2505.05470)."""

    algo: Algo = "grpo"
    group: Annotated[int, Range(2, 10**7)] = 8
    """Images of one prompt that are compared."""
    window: Annotated[int, Range(0, 10_000)] = 0
    """Steps of the chain that have noise and are trained on, the others being deterministic; the window moves along the
    chain (MixGRPO, arXiv 2507.21802; Flow-GRPO-Fast: 1 to 4). 0: all."""
    window_rounds: Count = 1
    """Rounds after which the window moves on by one step. Within a sweep of the chain reward and agreement swing,
    since the KL penalty is weak where a step has much noise: compare whole sweeps."""
    guard: bool = False
    """Centre the log-ratios and weigh the steps, so that the clip is one bound over the chain (GRPO-Guard, arXiv
    2510.22319)."""

    def __post_init__(self) -> None:
        _whole_groups(self, self.group)
        if self.train_steps and (self.window or self.guard):
            raise UserError("--window and --guard are for whole chains or windows: leave out --train-steps.")
        super().__post_init__()


@dataclass(frozen=True)
class DPOKConfig(ClippedConfig):
    """Hard-clamped ratio and KL to the pretrained model (DPOK, arXiv 2305.16381)."""

    pipeline: ClassVar[Mapping[str, Any]] = {**FinetuneConfig.pipeline, "kl": 0.1}

    algo: Algo = "dpok"


@dataclass(frozen=True)
class NFTConfig(OnlineConfig):
    """Denoising losses of a better and a worse mixture, no log-probabilities (DiffusionNFT, arXiv 2509.16117)."""

    pipeline: ClassVar[Mapping[str, Any]] = {**FinetuneConfig.pipeline, "queries": 3072, "lr": 3e-4, "beta": 1.0}

    algo: Algo = "nft"
    queries: Count = 256
    """Images to be scored in all."""
    eval_every: Count = 1
    """Rounds between evaluations; by default a sixth of all."""
    lr: Positive = 1e-4
    """AdamW's learning rate."""
    group: Count = 8
    """Images of one prompt that are compared (published: 24); 1: each with what its prompt has earned of late, which
    does harm until a prompt has been seen 16 times (docs/finetune.md)."""
    beta: Positive = 0.1
    """How far the mixtures reach from the sampling model: 1 or .1 (both published). A round's optimum is 1 / (beta
    adv_clip) of the way that advantages point; with 1 a few updates reach it, and further ones gain little."""
    noise_levels: Count = 8
    """Times at which each image is learned from in a pass, drawn anew."""
    adv_clip: PositiveLimit = 5.0
    """Largest advantage: rewards become r = 1/2 + advantage / (2 adv_clip), in [0, 1]."""
    anchor: NotNegative = 1e-4
    """Weight of the squared difference of predictions from the frozen reference."""
    sampling_decay: Share = 0.5
    """Largest weight that the model that samples keeps of itself, after a round; the rest is the trained model's."""
    sampling_decay_rate: NotNegative = 0.001
    """How fast that weight rises with the rounds, from 0, where the trained model samples."""

    def __post_init__(self) -> None:
        if self.group > 1:
            _whole_groups(self, self.group)
        super().__post_init__()


@dataclass(frozen=True)
class RWRConfig(OnlineConfig):
    """Denoising loss on its own samples, weighted by reward (RWR, arXiv 2302.12192)."""

    pipeline: ClassVar[Mapping[str, Any]] = {**FinetuneConfig.pipeline, "lr": 3e-4, "beta": 1.0}

    algo: Algo = "rwr"
    lr: Positive = 3e-5
    """AdamW's learning rate."""
    beta: Positive = 2.0
    """Inverse temperature of the weights, on normalised rewards."""


@dataclass(frozen=True)
class D3POConfig(ChainConfig):
    """DPO on each step of pairs of chains, ranked by the reward (D3PO, arXiv 2311.13231)."""

    pipeline: ClassVar[Mapping[str, Any]] = {**FinetuneConfig.pipeline, "lr": 3e-4}

    algo: Algo = "d3po"
    lr: Positive = 5e-5
    """AdamW's learning rate."""
    group: Annotated[int, Range(2, 10**7)] = 4
    """Images of one prompt, of which the best and the worst are compared."""
    beta: Positive = 0.1
    """Strength of the reference."""
    clip_nats: Limit = 0.0
    """Clamp of each step's log-ratios, in nats; 0: the authors', .1 nats for each dimension of a sample."""

    def __post_init__(self) -> None:
        _whole_groups(self, self.group)
        super().__post_init__()

    @property
    def units(self) -> int:
        """How many groups a round has."""
        return self.batch // self.group


DIFFERENTIABLE = {
    "tiny-emoji": "colour:blue + emoji",
    "tiny-digits": "digit:8",
    "tiny-latents": "digit:8",
    None: "symmetry",
}
"""By the built-in model, None for a pipeline: the default reward of algorithms that need a gradient."""


@dataclass(frozen=True)
class BackpropagationConfig(OnlineConfig):
    """The settings of algorithms that need a reward with a gradient."""

    pipeline: ClassVar[Mapping[str, Any]] = {**FinetuneConfig.pipeline, "batch": 64, "updates": 1}

    reward: str = "colour:blue + emoji"
    """What to raise, of rewards with a gradient; by default on digits digit:8, with a pipeline symmetry."""
    updates: Batch = 1
    """Optimiser steps a round, each on its share of the images."""

    @classmethod
    def defaults(cls, model: str) -> Mapping[str, Any]:
        """With a pipeline those of `pipeline`; and a reward with a gradient that the model's images can have."""
        base = base_of(model)
        return {**super().defaults(model), "reward": DIFFERENTIABLE.get(base, DIFFERENTIABLE[None])}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale_rewards:
            raise UserError(f"--scale-rewards is not for {self.algo}, which never sees a whole round's rewards.")


@dataclass(frozen=True)
class DRaFTConfig(BackpropagationConfig):
    """The reward's gradient through the last K steps (DRaFT-K, AlignProp; arXiv 2309.17400)."""

    algo: Algo = "draft"
    draft_steps: SamplingSteps = 2
    """K, the last steps, which carry the gradient."""


@dataclass(frozen=True)
class ReFLConfig(BackpropagationConfig):
    """The reward's gradient through one late step (ReFL, arXiv 2304.05977)."""

    pipeline: ClassVar[Mapping[str, Any]] = {**BackpropagationConfig.pipeline, "data": None}

    algo: Algo = "refl"
    model: str = "tiny-digits"
    """As of the other algorithms; by default tiny-digits, whose data are at hand."""
    reward: str = "digit:8"
    """What to raise, of rewards with a gradient; by default on tiny-emoji colour:blue + emoji, with a pipeline
    symmetry."""
    data: str | None = "digits"
    """Images for the denoising loss: a folder with a metadata.jsonl; tiny-digits and tiny-latents have the digits."""
    refl_margin: float = 2.0
    """m of relu(m - reward); the published 2 is ImageReward's, in deviations."""
    refl_weight: float = 1e-3
    """Weight of the reward beside the denoising loss."""


OF_SAMPLED = ("reward", "queries", "group")
"""The fields of dpo by which it samples its pairs."""


@dataclass(frozen=True)
class DPOConfig(OfflineConfig):
    """Diffusion-DPO on pairs, made once or read (arXiv 2311.12908)."""

    examples = "pairs"

    algo: Algo = "dpo"
    reward: str = "jpeg"
    """What ranks the images that pairs are made of, such as jpeg, digit:8, "clip:ID + 0.1*jpeg", remote:URL."""
    queries: Many = 3072
    """Images to be scored, once, to make pairs of them; how long the run then is, --rounds says."""
    group: Annotated[int, Range(2, 10**7)] = 8
    """Images of one prompt of which pairs are made: the best with the worst, and so on."""
    pairs: Path | None = None
    """A folder of preferred and rejected images; by default pairs are sampled and ranked by the reward."""
    beta: Positive = 5000.0
    """Strength of the reference."""
    preference: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """The loss on a pair: DPO's, SLiC's or IPO's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs is None and self.queries < self.group:
            raise UserError(f"--queries is {self.queries}, less than one --group of {self.group} to make pairs of.")
        if self.pairs is not None and ((self.frames or 1) > 1 or self.model.startswith("video:")):
            what = self.model if self.model.startswith("video:") else f"--frames {self.frames}"
            raise UserError(f"{what} makes videos, and --pairs holds images: without --pairs dpo samples its own.")
        if self.pairs is not None:
            self.refuse_of_sampled([name for name in OF_SAMPLED if getattr(self, name) != getattr(type(self), name)])

    @staticmethod
    def refuse_of_sampled(given: Collection[str]) -> None:
        """Raise UserError where one of the fields `given` has no use for a run on pairs that are read."""
        name = next((name for name in OF_SAMPLED if name in given), None)
        if name is not None:
            raise UserError(f"{flag(name)} is for pairs that are sampled: dpo on --pairs has no use for it.")

    @property
    def plan(self) -> str:
        """How many pairs are made of how many images, at most, and the rounds on them."""
        made = self.scored_before // self.group * (self.group // 2)
        pairs = f"at most {counted(made, 'pairs')} of {counted(self.scored_before, 'images')}, "
        return (pairs if self.pairs is None else "") + super().plan

    @property
    def scored_by(self) -> str | None:
        """The reward, where it ranks pairs."""
        return self.reward if self.pairs is None else None

    @property
    def scored_before(self) -> int:
        """How many images are scored to make pairs: those of all whole groups."""
        return self.queries // self.group * self.group if self.pairs is None else 0

    @property
    def units(self) -> int:
        """What processes share at the least: the pairs of an update, or the groups that make pairs, if fewer."""
        return self.batch if self.pairs is not None else min(self.batch, self.queries // self.group)


@dataclass(frozen=True)
class SupervisedConfig(OfflineConfig):
    """The denoising loss on images of yours."""

    pipeline: ClassVar[Mapping[str, Any]] = {**FinetuneConfig.pipeline, "batch": 64, "updates": 10, "data": None}

    algo: Algo = "supervised"
    model: str = "tiny-digits"
    """As of the other algorithms; by default tiny-digits, whose data are at hand."""
    updates: Batch = 10
    """Optimiser steps a round."""
    data: str | None = "digits"
    """The images: a folder with a metadata.jsonl; tiny-digits and tiny-latents have the digits."""
    drop_prompts: Share = 0.0
    """Share of the prompts that are left out, for models that are sampled with guidance (0.1)."""


def _whole_groups(config: FinetuneConfig, group: int) -> None:
    """Raise UserError where a round's images are not whole groups."""
    if group >= 2 and config.batch % group:
        chosen = config.algo == "nft" and sampled_by(config.model).get("eta") == 0
        why = f" (of nft, which is chosen where a model, as {config.model}, is sampled without noise)" * chosen
        raise refusal("--batch", config.batch, f"a multiple of --group, {group}{why}")


ALGORITHMS: dict[str, type[FinetuneConfig]] = {
    schema.algo: schema
    for schema in (
        DDPOISConfig,
        DDPOSFConfig,
        GRPOConfig,
        DPOKConfig,
        NFTConfig,
        RWRConfig,
        D3POConfig,
        DRaFTConfig,
        ReFLConfig,
        DPOConfig,
        SupervisedConfig,
    )
}
"""The configuration class of each `--algo`."""
