"""The settings that fine-tuning runs of image models share: a frozen dataclass, from which each algorithm's derives.

`FinetuneConfig(algo="grpo", model="my/pipeline", queries=512)` makes the configuration of that algorithm, the same as
`diffrl finetune --algo grpo --model my/pipeline --queries 512`. Fields that are not given have the algorithm's defaults
for the model: those that stand in its class are for the built-in models, and `pipeline` says what a diffusers pipeline
changes of them. A run that is told neither a reward nor a model, nor another algorithm, is `FIRST_LOOK`'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from diffrl.images.config.defaults import implied, of_digits
from diffrl.images.config.pipelines import DIFFUSERS, PEFT, adapter_rank, sampled_as, unguided
from diffrl.images.distil_config import STUDENTS, run_of, sampled_by
from diffrl.images.rewards.registry import companion
from diffrl.support.errors import UserError, closest, counted, joined, nearest
from diffrl.support.files import read_yaml, typed
from diffrl.support.folder import ABOUT, IMAGES, IMAGES_DISTIL, read_json
from diffrl.support.schema import (
    Batch,
    Count,
    Fraction,
    Natural,
    NotNegative,
    Positive,
    PositiveLimit,
    Range,
    SamplingSteps,
    Seed,
    Several,
    check,
    checked,
)

CONFIG = "finetune.yaml"
"""The settings of a run, in its folder."""
TINY = ("tiny-emoji", "tiny-digits", "tiny-latents")
"""The names of the built-in models."""
VARIANTS = ("control", "reference", "video")
"""What "VARIANT:PIPELINE" may begin with."""
Algo = Literal["ddpo-is", "ddpo-sf", "grpo", "dpok", "nft", "rwr", "d3po", "draft", "refl", "dpo", "supervised"]
Precision = Literal["fp32", "bf16", "fp16"]
Optimiser = Literal["adamw", "adamw8bit"]


class _Presets(type):
    """Makes configurations: of the algorithm that is named, with the defaults that depend on what is given."""

    def __call__(cls, **given: Any) -> Any:
        """The configuration. A field that is None counts as not given.

        Raises UserError for a value that will not do, and for an option that the algorithm does not have.
        """
        given = {name: value for name, value in given.items() if value is not None}
        if cls is not FinetuneConfig:
            given = {"algo": getattr(cls, "algo", None), **given}
        given = {**implied(given, is_builtin), **given}
        schema = schema_of(given.get("algo", FinetuneConfig.algo))
        if cls not in schema.__mro__:
            raise UserError(f"--algo is {schema.algo!r}; {cls.__name__} has the settings of another algorithm.")
        for name in given:
            schema.require(name)
        given = checked(schema, given)
        if "model" not in given and any(of_digits(given.get(name)) for name in ("reward", "held_out")):
            given["model"] = "tiny-digits"
        adapter = None if "lora" in given else given.get("adapter")
        if adapter is not None and (rank := adapter_rank(adapter, given.get("model", schema.model))):
            given["lora"] = rank
        config = type.__call__(schema, **{**schema.defaults(given.get("model", schema.model)), **given})
        held_out = None if config.scored_by is None else companion(config.scored_by)
        late = {"held_out": held_out, "eval_every": max(1, round(config.rounds / 6))}
        late = {name: value for name, value in late.items() if name not in given and value != getattr(config, name)}
        return dataclasses.replace(config, **late) if late else config


NOTHING = "none"
"""What `held_out` says where no reward is held out, although there would be a companion."""


@dataclass(frozen=True)
class FinetuneConfig(metaclass=_Presets):
    """A fine-tuning run of an image model: what `diffrl finetune` makes of the same options.

    `FinetuneConfig(algo="nft", reward="jpeg")` is `diffrl finetune --algo nft --reward jpeg`: it is of the algorithm's
    own class, here `NFTConfig`, and fields that are not given have that algorithm's defaults for the model. As there,
    a run that is told neither a reward nor a model, nor another algorithm than draft, is one whose pictures show
    something after two minutes: draft on colour:blue + emoji, in eight small updates a round. None is as not given.

    Raises UserError for a value that will not do, and for a field that the algorithm does not have.
    """

    pipeline: ClassVar[Mapping[str, Any]] = {
        "lora": 4,
        "batch": 256,
        "updates": 2,
        "steps": 50,
        "guidance": 5.0,
        "eval_samples": 32,
    }
    """The defaults with a diffusers pipeline, where they are not those of the built-in models."""
    counts: ClassVar[Literal["queries", "rounds"]]
    """The option that says how long a run is: images scored in all, or rounds."""
    unit: ClassVar[str]
    """What that option counts, in words."""

    algo: Algo = "ddpo-is"
    """The algorithm: see the list above; where neither a reward nor a model is given, by default draft; nft with
    the reward human, and of students that are sampled without noise."""
    model: str = "tiny-emoji"
    """tiny-emoji, tiny-digits (the default with rewards on digits), tiny-latents (these two trained at first use), the
    folder of a run that fine-tuned or distilled one, or a diffusers pipeline: a folder or a hub id. control:ID,
    reference:ID: with a ControlNet, reference attention; video:ID, a video pipeline (docs/supervised.md)."""
    held_out: str | None = None
    """A reward that is only looked at, to see the other one hacked; by default its companion, where it has one (of a
    sum: where each part has one). none: no reward."""
    prompts: Path | None = None
    """A file of prompts, one a line, or of JSON lines with a "prompt" and metadata. By default those of the images or
    pairs, else a built-in model's own; a pipeline without these needs it, if it takes prompts."""
    lora: Annotated[int, Range(0, 2**16)] = 0
    """Rank of the adapters, 0 to train the network itself."""
    lora_alpha: Annotated[int, Range(1, 2**16)] | None = None
    """What adapters give is scaled by lora_alpha / rank; by default the rank (Flow-GRPO: 64, of rank 32)."""
    layers: tuple[str, ...] | None = None
    """Train only layers whose names end so, in whole parts between dots, with all that is in them, such as
    time_embedding time_emb_proj; with --lora, give these the adapters (all: all that can have one). By default the
    whole network; with --lora the projections of attention."""
    adapter: Path | None = None
    """A folder with a LoRA adapter (diffusers' or peft's) to start from, by default none; --lora is then its rank. Of
    control:ID the ControlNet to go on from."""
    batch: Batch = 64
    """Images a round."""
    updates: Batch = 4
    """Optimiser steps a round, each on its share of the images."""
    passes: Count = 1
    """Times that a round's images are gone through."""
    micro_batch: Batch = 64
    """Images that are in the network at once; changes memory, not the result."""
    steps: SamplingSteps = 10
    """Denoising steps; by default of a distilled student its own network calls, and two at least."""
    eta: Fraction = 1.0
    """Noise of each denoising step: 1 is DDPM's, 0 none, which algorithms that learn from the chain's decisions cannot
    do without; for flow models 0.495 is Flow-GRPO's."""
    guidance: float = 1.0
    """Scale of classifier-free guidance in sampling; 1: none, the default of pipelines that take none."""
    train_guidance: bool = True
    """--no-train-guidance: sample for training, and train, without guidance, at half the cost; evaluations keep it."""
    lr: Positive = 3e-4
    """AdamW's learning rate."""
    optimiser: Optimiser = "adamw"
    """adamw8bit keeps AdamW's two moments in 8 bits: 2 bytes a parameter in place of 8 (pip install
    'diffrl[adamw8bit]')."""
    warm_up: Natural = 5
    """Optimiser steps over which the learning rate rises."""
    weight_decay: NotNegative = 1e-4
    """AdamW's weight decay."""
    clip_norm: PositiveLimit = 1.0
    """Largest norm of a gradient."""
    stop_kl: PositiveLimit | None = None
    """Stop when the divergence of a whole chain, in nats an image, is larger at an evaluation; by default never."""
    eval_every: Count = 8
    """Rounds between evaluations; by default a sixth of all."""
    eval_samples: Annotated[int, Range(2, 10**7)] = 200
    """Images of an evaluation, always of the same prompts and noise."""
    seed: Seed = 0
    """Seed of all random numbers."""
    device: str = "cpu"
    """cpu, cuda, cuda:N, or auto."""
    precision: Precision = "fp32"
    """Precision of the network's inner computation; log-probabilities are always float32 and summed in float64."""
    checkpointing: bool = False
    """Gradient checkpointing: less memory, a third more time."""
    lean: bool = False
    """Pipelines with --lora: encode all prompts and drop the text encoders; the autoencoder works tile by tile."""
    size: Annotated[int, Range(8, 2**14)] | None = None
    """Pipelines: pixels of an image's side, by default what the pipeline was made for."""
    frames: Annotated[int, Range(1, 2**10)] | None = None
    """Pipelines of videos: frames of one; of Wan 1 + 4 n, by default 1, an image. A reward of images is asked about 4
    of them."""
    processes: Several = 1
    """Processes that share the images (accelerate); the result is the same to rounding."""
    shard: bool = False
    """Share the frozen weights among the processes (FSDP), each keeping a part; pipelines with --lora."""
    out: Path | None = None
    """The run's folder; by default runs/ALGO-MODEL-TIME."""

    if TYPE_CHECKING:  # of an algorithm that is named, all options are taken

        def __init__(self, **given: Any) -> None: ...

    def __post_init__(self) -> None:
        check(self)
        if self.builtin and (self.lean or self.size is not None):
            raise UserError(f"{'--lean' if self.lean else '--size'} is for pipelines: {self.model} has no use for it.")
        if self.builtin and self.frames is not None:
            raise UserError(f"--frames is for pipelines of videos: {self.model} makes images.")
        if self.layers is not None and not (self.layers and all(self.layers)):
            raise UserError("--layers needs names of layers, such as time_embedding; all are trained without it.")
        given = self.adapter is not None and not self.model.startswith("control:")  # whose is the branch
        if self.layers is not None and given:
            raise UserError("--layers has no use with --adapter, which says itself what it adapts.")
        if self.lora_alpha is not None and (given or not self.lora):
            raise UserError(
                f"--lora-alpha has no use {'with --adapter, which says its own' if given else 'without --lora'}."
            )
        if self.lean and not self.lora:
            raise UserError(
                "--lean needs --lora: a network trained whole is saved as a pipeline, text encoders and all."
            )
        if self.guidance != 1 and not self.builtin and (why := unguided(self.model)) is not None:
            raise UserError(f"--guidance is {self.guidance:g}, and {self.model} {why}: leave it out, or give 1.")
        if self.shard and (not self.lora or self.builtin):
            raise UserError("--shard is for pipelines with --lora: it shares out what is frozen.")
        if self.stop_kl is not None and self.eta == 0:
            raise UserError("--stop-kl needs --eta above 0: a deterministic chain has no divergence to stop at.")

    @classmethod
    def require(cls, name: str) -> None:
        """Raise UserError where the algorithm has no option of this name, naming those that have it."""
        if name in cls.options():
            return
        having = [algo for algo, schema in algorithms().items() if name in schema.options()]
        if having:
            raise UserError(f"{flag(name)} is for {', '.join(having)}: {cls.algo} has no use for it.")
        raise UserError(f"There is no option {flag(name)}: {nearest(name, cls.options())}")

    @classmethod
    def options(cls) -> list[str]:
        """The names of all fields."""
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def defaults(cls, model: str) -> Mapping[str, Any]:
        """What fields are by default with this model, where that is not what stands in the class."""
        if is_builtin(model):
            return sampled_by(model)
        return {**cls.pipeline, **sampled_as(model)}

    @property
    def builtin(self) -> bool:
        """Whether the model is one of ours, at a laptop's size."""
        return is_builtin(self.model)

    @property
    def rounds(self) -> int:
        """Rounds of the whole run."""
        raise NotImplementedError

    @property
    def plan(self) -> str:
        """What the run will do, in words: how many rounds of what."""
        raise NotImplementedError

    @property
    def scored_by(self) -> str | None:
        """The reward that is asked; None: the run scores no images."""
        return None

    def seen(self, rounds: int, queries: int) -> tuple[int, str]:
        """How far a run has come after so many rounds, with so many images scored: a number, and of what."""
        return queries, "images scored"

    @property
    def scored_before(self) -> int:
        """Images that are scored before the first round."""
        return 0

    @property
    def units(self) -> int:
        """How many parts there are, at the least, to share among processes: images, or groups of them."""
        return self.batch

    @property
    def kl_weight(self) -> float:
        """Weight of the divergence from the frozen reference at the start."""
        return 0.0

    @property
    def kl_target(self) -> float | None:
        """Nats an image to hold that divergence at, by changing its weight; None: the weight stays."""
        return None


@dataclass(frozen=True)
class OnlineConfig(FinetuneConfig):
    """The settings of algorithms that sample and ask the reward in every round."""

    counts, unit = "queries", "images scored"

    reward: str = "jpeg"
    """What to raise, such as jpeg, incompressible, digit:8, aesthetic:FOLDER, "clip:ID + 0.1*jpeg", remote:URL."""
    scale_rewards: bool = False
    """Divide each part of a sum by its running deviation among images of a prompt: weights alone balance them."""
    queries: Count = 3072
    """Images to be scored in all."""
    kl: NotNegative = 0.0
    """Weight of the divergence from the frozen reference, step by step."""
    kl_target: PositiveLimit | None = None
    """Nats an image to hold the divergence at, by raising and lowering its weight, with a moving window once a sweep of
    the chain; by default the weight stays."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta == 0 and (self.kl or self.kl_target is not None):
            raise UserError("--kl and --kl-target need --eta above 0: a deterministic chain has no divergence.")
        if self.updates > self.units:
            updates = self._shown("updates")
            raise UserError(f"--updates is {updates}, more than the {self.units} images or pairs of a round.")
        if self.queries < self.batch:
            short = f"--queries is {self._shown('queries')}, less than a round of --batch {self._shown('batch')}"
            raise UserError(f"{short}: give more, or a smaller --batch.")

    def _shown(self, name: str) -> str:
        """An option's value, and whether it is the default: a user may not have typed it."""
        value = getattr(self, name)
        default = self.defaults(self.model).get(name, getattr(type(self), name))
        return f"{value}{' (the default)' if value == default else ''}"

    @property
    def rounds(self) -> int:
        """Rounds of the whole run: as many whole ones as `queries` images make."""
        return self.queries // self.batch

    @property
    def plan(self) -> str:
        """Rounds and images; where these are fewer than were asked for, that too."""
        less = f" ({self.queries:,} asked for; rounds are whole)" if self.queries % self.batch else ""
        return f"{self.rounds:,} x {self.batch} images{less}"

    @property
    def scored_by(self) -> str | None:
        """The reward that is asked in every round."""
        return self.reward

    @property
    def kl_weight(self) -> float:
        """Weight of the divergence from the frozen reference at the start: with a target not 0, which stays 0."""
        return self.kl if self.kl_target is None else self.kl or 0.01


@dataclass(frozen=True)
class ChainConfig(OnlineConfig):
    """The settings of algorithms that learn from the decisions of the denoising chain, so from its noise."""

    train_steps: Annotated[int, Range(0, 10_000)] = 0
    """Of the denoising steps, so many (drawn anew for each image) are trained on; 0: all that have noise."""

    def __post_init__(self) -> None:
        if self.eta == 0:
            straight = "eta" in sampled_by(self.model)
            what = f"{self.model} is sampled without noise" if straight else "--eta 0 is a deterministic chain"
            raise UserError(f"{what}; {self.algo} cannot learn from it: give more --eta, or --algo nft.")
        super().__post_init__()


@dataclass(frozen=True)
class OfflineConfig(FinetuneConfig):
    """The settings of algorithms that learn from data: they score nothing as they go on."""

    counts = unit = "rounds"
    examples: ClassVar[str] = "images"
    """What it learns from, in words."""

    batch: Batch = 64
    """Examples an update."""
    updates: Batch = 4
    """Optimiser steps a round."""
    passes: Count = 1
    """Times that a round's examples are gone through."""
    eval_every: Count = 7
    """Rounds between evaluations; by default a sixth of all."""
    rounds: Count = 40
    """Rounds of the whole run, each of `updates` steps: this is what says how long it takes."""

    def seen(self, rounds: int, queries: int) -> tuple[int, str]:
        """Examples that were learned from, with repetitions."""
        return rounds * self.updates * self.batch * self.passes, f"{self.examples} seen"

    @property
    def plan(self) -> str:
        """Rounds, updates and examples."""
        each = f"{counted(self.updates, 'updates')} on {self.batch} {self.examples}"
        return f"{counted(self.rounds, 'rounds')} (--rounds) of {each}"


def flag(field: str) -> str:
    """A field as the command line spells it."""
    return "--" + field.replace("_", "-")


def is_builtin(model: str) -> bool:
    """Whether a model's name is that of one of ours, or the folder of a run that fine-tuned or distilled one."""
    return base_of(model) is not None


def base_of(model: str) -> str | None:
    """The built-in model that a name is, or that the run of a folder fine-tuned or distilled; None: neither.

    A built-in model's name is that model, whatever folder is called so: that is ./NAME.
    """
    if model in TINY or not Path(model).exists():
        return model if model.startswith("tiny-") else None
    path = run_of(model)
    about = read_json(path / ABOUT, say=False) if (path / ABOUT).is_file() else None
    if not isinstance(about, dict) or about.get("kind", IMAGES) not in (IMAGES, IMAGES_DISTIL):
        return None
    base = about.get("base")
    if base is None and (path / CONFIG).is_file():  # a run from before that was written
        base = read_yaml(path / CONFIG).get("model")
    return base if base in STUDENTS else None


NO_PIPELINE = (
    "{} holds no diffusers pipeline: it has no model_index.json. Expected a folder that `save_pretrained` wrote."
)
"""What is said of a folder without a pipeline."""
NO_FOLDER = "{} is no folder. Expected the folder of a diffusers pipeline, or a hub id of the form owner/name."
"""What is said of a name that is neither."""


def check_rank(config: FinetuneConfig) -> None:
    """Raise UserError where --lora is another rank than that of the adapters that a new run starts from."""
    if config.adapter is None:
        return
    rank = adapter_rank(config.adapter, config.model)
    if rank is not None and rank != config.lora:
        raise UserError(
            f"--lora is {config.lora}, and the adapters in {config.adapter} have rank {rank}: leave --lora out, or "
            f"give {rank}."
        )


def check_pipeline(name: str) -> None:
    """Raise UserError for what is neither the folder of a diffusers pipeline nor a hub id of the form OWNER/NAME."""
    folder = Path(name)
    if folder.is_dir():
        about = read_json(folder / ABOUT, say=False) if (folder / ABOUT).is_file() else None
        if isinstance(about, dict) and about.get("kind", IMAGES) not in (IMAGES, IMAGES_DISTIL):
            raise UserError(f"{name} is the run of a policy, and no image model: diffrl finetune policy {typed(name)}.")
        if (folder / "model_index.json").is_file() or about is not None:  # of a run: seen where it is loaded
            return
        if any((folder / file).is_file() for file in (DIFFUSERS, PEFT)):
            raise UserError(
                f"{name} holds adapters and no model: give the model that they were trained on, and --adapter "
                f"{typed(name)}."
            )
        raise UserError(NO_PIPELINE.format(name))
    if folder.exists() or folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise UserError(NO_FOLDER.format(name))


def divided(model: str) -> tuple[str, str]:
    """The variant that a model's name begins with, "" for none, and the rest."""
    variant, colon, pipeline = model.partition(":")
    return (variant, pipeline) if colon and variant in VARIANTS else ("", model)


def check_model(name: str) -> None:
    """Raise UserError for a name that is no built-in model, no variant of a pipeline, no folder and no hub id.

    Whether a hub has the model, and a folder a pipeline, is seen where it is loaded.
    """
    variant, pipeline = divided(name)
    special = bool(variant and pipeline)
    if not special and name not in TINY and "/" not in name and "\\" not in name and not Path(name).exists():
        near = closest(name, TINY)
        meant = "." if near is None else f": did you mean {near!r}?"
        raise UserError(
            f"There is no model {name!r}{meant} Built in are {joined(TINY)}. Else give the folder of a diffusers "
            "pipeline, or a hub id such as 'stable-diffusion-v1-5/stable-diffusion-v1-5'."
        )
    if name not in TINY:
        check_pipeline(pipeline if special else name)


def algorithms() -> Mapping[str, type[FinetuneConfig]]:
    """The configuration classes by algorithm."""
    from diffrl.images.config.algorithms import ALGORITHMS

    return ALGORITHMS


def schema_of(algo: object) -> type[FinetuneConfig]:
    """The configuration class of an algorithm. Raises UserError for one that is not known."""
    if algo not in algorithms():
        raise UserError(f"--algo is {algo!r}; {_meant(str(algo).lower())}known: {', '.join(get_args(Algo))}.")
    return algorithms()[str(algo)]


def _meant(algo: str) -> str:
    """The algorithms that a word for none probably means, in half a sentence: "ppo" and "ddpo" are families."""
    known = get_args(Algo)
    near = [name for name in known if algo and (name.startswith(f"{algo}-") or name == algo)]
    near = near or (["ddpo-is"] if algo == "ppo" else [name for name in [closest(algo, known)] if name])
    return f"did you mean {' or '.join(near)}? " if near else ""
