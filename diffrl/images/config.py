"""What a fine-tuning run is made of: one frozen dataclass, and the defaults of each algorithm. No torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from diffrl.support.errors import UserError

Algo = Literal["ddpo-is", "ddpo-sf", "grpo", "dpok", "rwr", "d3po", "draft", "refl", "dpo", "supervised"]
Precision = Literal["fp32", "bf16", "fp16"]

ONLINE: tuple[Algo, ...] = ("ddpo-is", "ddpo-sf", "grpo", "dpok", "rwr", "d3po", "draft", "refl")
"""Those that sample and ask the reward in every round."""
GROUPED: tuple[Algo, ...] = ("grpo", "d3po")
"""Those that compare samples of one prompt."""
OF_CHAINS: tuple[Algo, ...] = ("ddpo-is", "ddpo-sf", "grpo", "dpok")
"""Policy gradients."""

READ_BY: dict[str, tuple[Algo, ...]] = {
    "reward": (*ONLINE, "dpo"),
    "queries": (*ONLINE, "dpo"),
    "rounds": ("dpo", "supervised"),
    "train_steps": (*OF_CHAINS, "d3po"),
    "clip_nats": ("ddpo-is", "grpo", "dpok", "d3po"),
    "kl": ONLINE,
    "group": (*GROUPED, "dpo"),
    "beta": ("rwr", "d3po", "dpo"),
    "preference": ("dpo",),
    "pairs": ("dpo",),
    "data": ("refl", "supervised"),
    "drop_prompts": ("supervised",),
    "draft_steps": ("draft",),
    "refl_margin": ("refl",),
    "refl_weight": ("refl",),
}
"""Options that some algorithms alone have a use for: given to another they are a mistake."""

ABOUT: dict[Algo, str] = {
    "ddpo-is": "PPO on each denoising step (DDPO-IS, arXiv 2305.13301)",
    "ddpo-sf": "the score-function gradient, one update a round (DDPO-SF, arXiv 2305.13301)",
    "grpo": "PPO on each step, advantages within groups of one prompt (Flow-GRPO, arXiv 2505.05470)",
    "dpok": "hard-clamped ratio and KL to the pretrained model (DPOK, arXiv 2305.16381)",
    "rwr": "denoising loss on its own samples, weighted by reward (RWR, arXiv 2302.12192)",
    "d3po": "DPO on each step of pairs of chains, ranked by the reward (D3PO, arXiv 2311.13231)",
    "draft": "the reward's gradient through the last K steps (DRaFT-K, AlignProp; arXiv 2309.17400)",
    "refl": "the reward's gradient through one late step (ReFL, arXiv 2304.05977)",
    "dpo": "Diffusion-DPO on pairs, made once or read (arXiv 2311.12908)",
    "supervised": "the denoising loss on images of yours",
}


@dataclass(frozen=True)
class FinetuneConfig:
    """A fine-tuning run of an image model. None: the algorithm's default, which `resolved` fills in."""

    algo: Algo = "ddpo-is"
    """ddpo-is, ddpo-sf, grpo, dpok, rwr, d3po, draft, refl, dpo (offline), or supervised."""
    model: str = "tiny-digits"
    """tiny-digits, tiny-latents (both trained at first use), or a diffusers pipeline: a folder or a hub id. control:ID,
    reference:ID: with a ControlNet, reference attention; video:ID, a video pipeline (docs/supervised.md)."""
    reward: str = "jpeg"
    """What to raise, such as jpeg, incompressible, digit:8, aesthetic:FOLDER, "clip:ID + 0.1*jpeg", remote:URL."""
    held_out: str | None = None
    """A reward that is only looked at, to see the other one hacked; by default its companion, where it has one."""
    prompts: Path | None = None
    """A file of prompts, one a line, or of JSON lines with a "prompt" and metadata; built-in models have their own."""
    lora: int | None = None
    """Rank of the adapters, 0 to train the whole network; by default 4, and 0 for built-in models."""
    adapter: Path | None = None
    """A folder with a LoRA adapter (diffusers' or peft's) to start from; of control:ID the ControlNet to go on from."""
    queries: int = 3072
    """Images to be scored in all."""
    batch: int | None = None
    """Images a round."""
    updates: int | None = None
    """Optimiser steps a round, each on its share of the images (ddpo-sf: one)."""
    passes: int = 1
    """Times that a round's images are gone through."""
    rounds: int | None = None
    """Rounds of dpo and supervised, of `updates` steps each; the others stop with their queries."""
    micro_batch: int = 64
    """Images that are in the network at once; changes memory, not the result."""
    steps: int | None = None
    """Denoising steps."""
    eta: float = 1.0
    """Noise of each step: 1 is DDPM's, 0 deterministic (only draft and refl); flow models: 0.495 is Flow-GRPO's."""
    guidance: float | None = None
    """Classifier-free guidance in sampling; by default 1 (none) for built-in models, else 5."""
    train_guidance: bool = True
    """--no-train-guidance: sample for training, and train, without guidance, at half the cost; evaluations keep it."""
    train_steps: int | None = None
    """Of the denoising steps, so many (drawn anew for each image) are trained on; by default all."""
    lr: float | None = None
    """AdamW's learning rate."""
    warm_up: int = 5
    """Optimiser steps over which the learning rate rises."""
    weight_decay: float = 1e-4
    """AdamW's."""
    clip_norm: float = 1.0
    """Largest norm of a gradient."""
    clip_nats: float | None = None
    """Trust region of ddpo-is, grpo, dpok, d3po on each step's log-ratio, in nats, the same at every image size. The
    published clip of 1e-4 on the mean over Stable Diffusion's 16,384 dimensions is 1.64; d3po's is .1 d."""
    kl: float | None = None
    """Weight of the divergence from the frozen reference, step by step; dpo has it in its loss (beta)."""
    kl_target: float | None = None
    """Nats an image to hold the divergence at, by raising and lowering its weight (adaptive)."""
    stop_kl: float | None = None
    """Stop when the divergence of a whole chain, in nats an image, is larger at an evaluation."""
    group: int | None = None
    """Images of one prompt that are compared (grpo; d3po: its best and its worst; dpo: when it makes its pairs)."""
    beta: float | None = None
    """rwr: inverse temperature on normalised rewards; d3po, dpo: strength of the reference."""
    preference: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """Loss of dpo."""
    pairs: Path | None = None
    """Folder of preferred and rejected images for dpo; by default pairs are sampled and ranked by the reward."""
    data: str | None = None
    """Images for supervised and refl: a folder with metadata.jsonl; built-in models have the digits."""
    drop_prompts: float = 0.0
    """supervised: share of the prompts that are left out, for models that are sampled with guidance (0.1)."""
    draft_steps: int = 2
    """K of draft: the last steps that carry the gradient."""
    refl_margin: float = 2.0
    """refl: m of relu(m - reward); the published 2 is ImageReward's, in deviations."""
    refl_weight: float = 1e-3
    """refl: weight of the reward beside the denoising loss."""
    eval_every: int | None = None
    """Rounds between evaluations; by default a sixth of all."""
    eval_samples: int | None = None
    """Images of an evaluation, always of the same prompts and noise; by default 200 for built-in models, else 32."""
    seed: int = 0
    """Of everything random."""
    device: str = "cpu"
    """cpu, cuda, cuda:N, or auto."""
    precision: Precision = "fp32"
    """Of the network's inner computation; log-probabilities are always float32 and summed in float64."""
    checkpointing: bool = False
    """Gradient checkpointing: less memory, a third more time."""
    processes: int = 1
    """Processes that share the images (accelerate); the result is the same to rounding."""
    out: Path | None = None
    """The run's folder; by default runs/ALGO-MODEL-TIME."""

    def __post_init__(self) -> None:
        if self.algo not in get_args(Algo):
            raise UserError(f"--algo is {self.algo!r}; known: {', '.join(get_args(Algo))}.")
        least = {
            "queries": 1,
            "batch": 1,
            "updates": 1,
            "passes": 1,
            "rounds": 1,
            "micro_batch": 1,
            "steps": 1,
            "train_steps": 1,
            "warm_up": 0,
            "group": 2,
            "draft_steps": 1,
            "eval_every": 1,
            "eval_samples": 2,
            "processes": 1,
            "lora": 0,
            "seed": 0,
            "eta": 0,
            "weight_decay": 0,
            "kl": 0,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:
                raise UserError(f"--{name.replace('_', '-')} is {value}; expected at least {bound}.")
        for name in ("lr", "clip_norm", "clip_nats", "kl_target", "stop_kl", "beta"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} is {value}; expected more than 0.")
        if not 0 <= self.drop_prompts < 1:
            raise UserError(f"--drop-prompts is {self.drop_prompts}; expected at least 0 and less than 1.")
        if self.eta > 1:
            raise UserError(f"--eta is {self.eta}; expected from 0 to 1.")
        if self.eta == 0 and self.algo not in ("draft", "refl", "dpo", "supervised", "rwr"):
            raise UserError(f"--eta 0 is a deterministic chain, which {self.algo} cannot learn from: give more than 0.")
        if self.kl_target is not None and self.algo not in ONLINE:
            raise UserError(f"--kl-target is for {', '.join(ONLINE)}; {self.algo} samples no chains to measure it on.")
        if self.eta == 0 and (self.kl or self.kl_target is not None):
            raise UserError("--kl and --kl-target need --eta above 0: a deterministic chain has no divergence.")
        if self.stop_kl is not None and self.eta == 0:
            raise UserError("--stop-kl needs --eta above 0: a deterministic chain has no divergence to stop at.")

    @property
    def builtin(self) -> bool:
        """Whether the model is one of ours, at a laptop's size."""
        return self.model.startswith("tiny-") and not Path(self.model).exists()

    def resolved(self) -> FinetuneConfig:
        """With every None that has a default filled in. Raises UserError for what does not go together."""
        defaults: dict[str, Any] = {**_SHARED, **(_TINY if self.builtin else _LARGE), **_OF_ALGO.get(self.algo, {})}
        if self.builtin:
            defaults |= _OF_ALGO_TINY.get(self.algo, {})
        config = dataclasses.replace(self, **{n: v for n, v in defaults.items() if getattr(self, n) is None})
        assert config.batch is not None
        assert config.updates is not None
        assert config.group is not None
        if config.algo == "ddpo-sf" and (config.updates, config.passes) != (1, 1):
            raise UserError("ddpo-sf learns once from each image: --updates 1 and --passes 1, or --algo ddpo-is.")
        if config.algo in GROUPED and config.batch % config.group:
            raise UserError(f"--batch is {config.batch}; expected a multiple of --group, {config.group}.")
        if config.algo == "dpo" and config.pairs is None and config.queries < config.group:
            raise UserError(f"--queries is {config.queries}, less than one --group of {config.group} to make pairs of.")
        units = config.batch // (config.group if config.algo == "d3po" else 1)
        if config.algo in ONLINE and config.updates > units:
            raise UserError(f"--updates is {config.updates}, more than the {units} images or pairs of a round.")
        if config.algo in ONLINE:
            if config.queries < config.batch:
                default = "" if self.batch is not None else " (the default)"
                raise UserError(f"--queries is {config.queries}, less than a round of --batch {config.batch}{default}.")
            config = dataclasses.replace(config, rounds=config.queries // config.batch)
        assert config.rounds is not None
        if config.eval_every is None:
            config = dataclasses.replace(config, eval_every=max(1, round(config.rounds / 6)))
        self._refuse_unread(defaults | {"rounds": config.rounds if config.algo in ONLINE else None})
        return config

    def _refuse_unread(self, defaults: dict[str, Any]) -> None:
        """Raise UserError for an option that was given, and that this algorithm does not read."""
        for name, algos in READ_BY.items():
            value = getattr(self, name)
            plain = (type(self).__dataclass_fields__[name].default, defaults.get(name))
            unread = self.algo not in algos or (self.pairs is not None and name in ("queries", "reward", "group"))
            if unread and value not in plain:
                raise UserError(
                    f"--{name.replace('_', '-')} is for {', '.join(algos)}: {self.algo} "
                    f"{'on --pairs ' if self.algo in algos else ''}has no use for it."
                )


_SHARED: dict[str, Any] = {"batch": 256, "updates": 2, "rounds": 40, "kl": 0.0, "group": 8}
_LARGE: dict[str, Any] = {"lora": 4, "steps": 50, "guidance": 5.0, "lr": 3e-4, "eval_samples": 32}
_TINY: dict[str, Any] = {"lora": 0, "steps": 10, "guidance": 1.0, "lr": 3e-4, "batch": 64, "updates": 4}
_TINY |= {"eval_samples": 200}
_CLIP = {"clip_nats": 1.64}
# What an algorithm changes of these, with any model, and with a built-in one.
_OF_ALGO: dict[Algo, dict[str, Any]] = {
    "ddpo-is": _CLIP,
    "ddpo-sf": {"updates": 1},
    "grpo": _CLIP,
    "dpok": {"kl": 0.1, **_CLIP},
    "rwr": {"beta": 1.0},
    "d3po": {"beta": 0.1, "group": 4},
    "dpo": {"beta": 5000.0},
    "draft": {"batch": 64, "updates": 1},
    "refl": {"batch": 64, "updates": 1},
    "supervised": {"batch": 64, "updates": 10},
}
_OF_ALGO_TINY: dict[Algo, dict[str, Any]] = {
    "ddpo-is": {"kl": 0.2},
    "grpo": {"kl": 0.2},
    "dpok": {"kl": 0.2},
    "ddpo-sf": {"kl": 0.2, "lr": 6e-4},
    "rwr": {"lr": 3e-5, "beta": 2.0},
    "d3po": {"lr": 5e-5},
}
