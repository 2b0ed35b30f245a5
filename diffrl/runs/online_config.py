"""What an online run is made of: how it collects and learns. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffrl.augment.synther.config import RefitConfig, Sampling, Solver, SynthERConfig
from diffrl.support.errors import UserError
from diffrl.support.schema import Count, Natural, NotNegative, Rows, SamplingSteps, Share, Width, check, read

ONLINE_STEPS = 100_000
"""Environment steps of an online run."""
ONLINE_EVAL_EVERY = 5_000
"""Environment steps between an online run's evaluations."""


@dataclass(frozen=True)
class OnlineConfig:
    """How an online run collects and learns: its folder's `settings.yaml`."""

    offline_run: Path
    """The folder of the offline run that the online run started from, which is not needed any more; or the
    configuration whose agents started untrained."""
    start_checkpoint: str = "last"
    """The offline run's checkpoint to start from: last, best (each seed's), or a step."""
    keep_offline: Share = 0.5
    """Share of each batch drawn from the offline data. Half (RLPD, arXiv 2302.02948) holds the critics to what was
    learned while there is little else; 0, online data alone, is what the Consistency-AC paper does."""
    capacity: Count = 1_000_000
    """Online transitions kept for each seed, the newest."""
    updates_per_step: Count = 1
    """Training steps for each environment step: the update-to-data ratio, 20 in RLPD."""
    warm_up: Natural = 5_000
    """First environment steps, without training: a batch is not to repeat one episode (RLPD and WSRL have 5,000)."""
    exploration: NotNegative = 0.0
    """Deviation of Gaussian noise on the actions taken, in units of half their range. Agents that draw their actions
    need none; those whose actions are fixed by the state (td3_bc, rebrac, iql) need some, say 0.1."""
    synthetic_share: Share = 0.0
    """Share of each batch that SynthER generates (arXiv 2303.06614: half); 0: none. The rest is real, of which
    keep_offline says how much is offline; the models are fitted to that mixture."""
    refit_every: Count = 10_000
    """Environment steps between fits of a new SynthER model."""
    first_fit: Natural | None = None
    """Environment steps before the first fit; by default as many as between fits. Never within the warm-up."""
    synthetic_samples: Rows | None = None
    """Synthetic transitions of a fit, for each seed; by default what is drawn till the next, at most 1,000,000."""
    synthetic_steps: Count = SynthERConfig.steps
    """Training steps of each SynthER model."""
    synthetic_width: Width = SynthERConfig.width
    """Width of the SynthER network. On a CPU take 256."""
    synthetic_solver: Solver = Sampling.solver
    """dpmpp2m calls the network once a step; heun, the published one, twice (with 128 steps)."""
    synthetic_sampling_steps: SamplingSteps = Sampling.sampling_steps
    """Solver steps in sampling from SynthER."""
    start_steps: tuple[int, ...] = ()
    """Filled in: the step of each seed's start checkpoint."""
    reward_shift: float = 0.0
    """Filled in: training rewards are (reward - shift) / scale, for online rewards as for the offline data's."""
    reward_scale: float = 1.0
    """Filled in: the scale in (reward - shift) / scale, see reward_shift."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "start_checkpoint", str(self.start_checkpoint))  # from Python, a step
        check(self)

    def refuse_steps(self, steps: int) -> None:
        """Raise UserError where all of a run's steps would only collect, or end before SynthER's first fit."""
        if steps <= self.warm_up:
            raise UserError(
                f"--steps is {steps}, and the first {self.warm_up} only collect (--warm-up): expected more steps, or a "
                "shorter warm-up."
            )
        if self.synthetic_share and not self.refit.fits(steps - 1):
            first = self.refit_every if self.first_fit is None else self.first_fit
            raise UserError(
                f"--steps is {steps}, and SynthER is first fitted after {first} (--first-fit): expected more steps, an "
                "earlier fit, or no --synthetic-share."
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values for YAML."""
        return {
            **dataclasses.asdict(self),
            "offline_run": str(self.offline_run),
            "start_steps": list(self.start_steps),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> OnlineConfig:
        """The settings from what YAML holds. Raises UserError, naming `source`, for anything it should not hold."""
        return read(cls, values, source)

    @property
    def refit(self) -> RefitConfig:
        """How synthetic experience is made: the `synthetic_` fields and those of the fits, as SynthER takes them."""
        return RefitConfig(
            self.synthetic_share,
            self.refit_every,
            self.first_fit,
            self.synthetic_samples or RefitConfig.samples,
            SynthERConfig(steps=self.synthetic_steps, width=self.synthetic_width),
            Sampling(self.synthetic_solver, self.synthetic_sampling_steps),
        )
