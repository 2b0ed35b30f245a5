"""Settings of the diffusion model of transitions, of its training and of sampling from it. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from diffrl.support.errors import UserError
from diffrl.support.schema import (
    Batch,
    Count,
    Depth,
    Fraction,
    Natural,
    NotNegative,
    Positive,
    Range,
    Rate,
    Rows,
    SamplingSteps,
    Share,
    Width,
    check,
)

Solver = Literal["heun", "dpmpp2m", "ddim", "dpm2", "dpm3"]
Condition = Literal["none", "reward", "return"]
Terminals = Literal["head", "modelled"]

ROWS_VERSION = 2
"""The version of how a seed becomes rows, held-out rows and batches included: raised where a command gives others.

1: SynthER had a hash of seeds of its own. 2: the hash is that of `diffrl.support.seeds`, which everything shares.
"""
FIRST_LOOK = "--rows 10000 --samples 10000 --width 128 --steps 2000"
"""Options of a small start, of half a minute on a CPU."""
MANY_ROWS = 800_000
"""Rows from which the published batch is the large one."""


@dataclass(frozen=True)
class SynthERConfig:
    """The model and its training, as published (Lu et al. 2023, arXiv 2303.06614)."""

    steps: Count = 100_000
    """Training steps; the learning rate falls to 0 over them along half a cosine."""
    width: Width = 1024
    """Width of the residual network (published: 2048, or 1024 for some data sets). On a CPU take 256."""
    blocks: Depth = 6
    """Residual blocks."""
    batch_size: Batch | None = None
    """Rows a step; by default as published, 256, and 1024 for data sets of 800,000 rows or more."""
    learning_rate: Positive = 3e-4
    """Adam's learning rate at the beginning (published as AdamW, without decay: the same)."""
    ema_rate: Rate = 0.005
    """Rate of the averaged weights, which generate: every 10 steps so much of the way to the online ones."""
    terminals: Terminals = "head"
    """Which rows are terminal: by the probability that a network gives the row's s, a (and s'), trained beside the
    model; or modelled as one more column, as published."""
    condition: Condition = "none"
    """Tell the model in which quantile bin a row's reward, or its episode's return, lies: classifier-free guidance."""
    bins: Annotated[int, Range(2, 10_000)] = 10
    """Quantile bins of the condition."""
    condition_dropout: Share = 0.25
    """Share of rows trained without their condition."""

    def __post_init__(self) -> None:
        check(self)

    def batch(self, rows: int) -> int:
        """Rows of a training step, on a data set of so many rows."""
        return self.batch_size or (1024 if rows >= MANY_ROWS else 256)


@dataclass(frozen=True)
class Sampling:
    """How rows are sampled from the model: `diffrl.diffusion.Sampler` on EDM's grid of noise levels.

    The one default that is not the paper's, which is `Sampling("heun", 128)`.
    """

    solver: Solver = "dpmpp2m"
    """dpmpp2m calls the network once a step; heun, the published one, twice (with --sampling-steps 128)."""
    sampling_steps: SamplingSteps = 32
    """Solver steps. What 32 of dpmpp2m lose against the published 255 calls: benchmarks/results/synther.md."""
    churn: NotNegative | None = None
    """EDM's S_churn, noise added on the way; by default 80 with heun, as published, and 0 with the others."""
    guidance: float = 1.0
    """Scale of classifier-free guidance towards the condition: 1 samples given the condition, 0 ignores it."""
    above: Share = 0.0
    """Condition on quantiles from this one up, in whole bins: 0.7 draws the top 30 % alone, 0 draws all. Each bin is
    drawn as often as its rows occur."""

    def __post_init__(self) -> None:
        check(self)
        if self.churn and self.solver == "dpmpp2m":
            raise UserError("--churn does not go with --solver dpmpp2m, which looks back to its last step: use heun.")

    @property
    def steers(self) -> bool:
        """Whether it asks for a condition, and so for a model that has one."""
        return self.above > 0 or self.guidance != 1

    @property
    def S_churn(self) -> float:
        """EDM's S_churn as the sampler uses it: the one given, or the solver's default."""
        return (80.0 if self.solver == "heun" else 0.0) if self.churn is None else self.churn

    @property
    def calls(self) -> int:
        """Calls of the network for one row; the last step, to noise 0, needs one."""
        each = {"heun": 2, "dpm2": 2, "dpm3": 3}.get(self.solver, 1)
        return each * (self.sampling_steps - 1) + 1


@dataclass(frozen=True)
class RefitConfig:
    """Synthetic experience online: a model fitted anew as the real rows grow, its rows mixed into every batch."""

    share: Fraction = 0.5
    """Share of each batch that is synthetic, from the first fit on (published: 1 : 1)."""
    refit_every: Count = 10_000
    """Environment steps between fits, each of a new model to all real rows."""
    first_fit: Natural | None = None
    """Environment steps before the first fit; by default as many as between fits."""
    samples: Rows = 1_000_000
    """Synthetic rows generated after each fit, in place of the last ones."""
    model: SynthERConfig = field(default_factory=SynthERConfig)
    """The model and its training."""
    sampling: Sampling = field(default_factory=Sampling)
    """How rows are sampled from the model."""

    def __post_init__(self) -> None:
        check(self, source="RefitConfig")
        if self.sampling.steers and self.model.condition == "none":
            raise UserError("`above` and `guidance` steer a conditional model: set the model's `condition`.")

    def fits(self, step: int) -> int:
        """How many fits are due within the first `step` environment steps."""
        first = self.refit_every if self.first_fit is None else self.first_fit
        return 0 if step < first or not self.share else 1 + (step - first) // self.refit_every
