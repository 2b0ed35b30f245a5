"""`diffrl online`."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from diffrl.augment.synther.config import Solver
from diffrl.commands.train import flag_values
from diffrl.runs.config import ONLINE_EVAL_EVERY, ONLINE_STEPS, OnlineConfig
from diffrl.support.errors import UserError

USAGE = """Go on from an offline run in its environment: act, keep what happens, learn from it.

  diffrl online runs/NAME                            100,000 environment steps, half of each batch offline data
  diffrl online runs/NAME --keep-offline 0           from online data alone, as the Consistency-AC paper does
  diffrl online runs/NAME --start-checkpoint best --steps 250000
  diffrl online runs/NAME --synthetic-share 0.5 --updates-per-step 20    half of each batch generated (SynthER)
  diffrl online --resume runs/ONLINE [--steps N]     go on with an online run; so does diffrl train --resume

Makes a run of its own, which `diffrl evaluate` and `load_policy` take like any other. Its steps are the environment's;
step 0 is the offline agent. Resuming, each environment begins a new episode; all else goes on bit for bit."""


@dataclass(frozen=True)
class Online:
    """Start an online run from an offline one."""

    run_folder: Positional[Path]
    """The offline run's folder."""
    steps: int = ONLINE_STEPS
    """Environment steps of each seed."""
    out: Path | None = None
    """The new run's folder; by default runs/AGENT-online-DATASET-TIME."""
    seeds: tuple[int, ...] | None = None
    """Those of the offline run's seeds to go on with, each from its own networks; by default all."""
    start_checkpoint: str = OnlineConfig.start_checkpoint
    """The offline run's checkpoint to start from: last, best (each seed's), or a step."""
    keep_offline: float = OnlineConfig.keep_offline
    """Share of each batch drawn from the offline data, at least 0 and less than 1."""
    capacity: int = OnlineConfig.capacity
    """Online transitions kept for each seed, the newest."""
    updates_per_step: int = OnlineConfig.updates_per_step
    """Training steps for each environment step."""
    warm_up: int = OnlineConfig.warm_up
    """First environment steps, without training: they fill the buffer."""
    exploration: float = OnlineConfig.exploration
    """Deviation of noise added to the actions, for agents whose actions are fixed by the state (td3_bc: 0.1)."""
    synthetic_share: float = OnlineConfig.synthetic_share
    """Share of each batch that SynthER generates, fitted anew as the data grow; 0: none; the paper: 0.5. The model's
    size is the paper's, for a GPU; on a CPU add --synthetic-width 256 --synthetic-steps 10000 and, to generate fewer
    rows, --synthetic-samples 100000."""
    refit_every: int = OnlineConfig.refit_every
    """Environment steps between fits of a new SynthER model."""
    first_fit: int | None = OnlineConfig.first_fit
    """Environment steps before the first fit; by default as many as between fits. Never within the warm-up."""
    synthetic_samples: int = OnlineConfig.synthetic_samples
    """Synthetic transitions generated for each seed after every fit."""
    synthetic_steps: int = OnlineConfig.synthetic_steps
    """Training steps of each SynthER model."""
    synthetic_width: int = OnlineConfig.synthetic_width
    """Its network's width."""
    synthetic_solver: Solver = OnlineConfig.synthetic_solver
    """dpmpp2m calls the network once a step; heun, the published one, twice (with 128 steps)."""
    synthetic_sampling_steps: int = OnlineConfig.synthetic_sampling_steps
    """Solver steps."""
    eval_every: int = ONLINE_EVAL_EVERY
    """Environment steps between evaluations, each followed by a checkpoint."""
    eval_episodes: int | None = None
    """Episodes an evaluation, for each seed; by default the offline run's."""
    log_every: int | None = None
    """Environment steps between rows of metrics.csv; by default the offline run's."""
    device: str | None = None
    """cpu, cuda, cuda:N, or auto; by default the offline run's."""
    compile: bool | None = None
    """--compile, --no-compile: as for `diffrl train`, by default from 10,000 steps up."""


@dataclass(frozen=True)
class Resume:
    """Go on with an online run from its newest checkpoint; each environment begins a new episode."""

    resume: Annotated[Path, tyro.conf.arg(metavar="RUN")]
    """The online run's folder."""
    steps: int | None = None
    """Environment steps in all; by default what the run was made for."""
    device: str | None = None
    """Another device than the run's."""


def run(arguments: Sequence[str]) -> int:
    """Parse what stands after `diffrl online` and do it."""
    words = list(arguments)
    if any(word.split("=")[0] == "--resume" for word in words):
        return _resume(tyro.cli(Resume, args=words, prog="diffrl online"))
    given = tyro.cli(Online, args=flag_values(words), prog="diffrl online", description=USAGE)
    from diffrl.runs.train import online

    options = dataclasses.asdict(given)
    online(options.pop("run_folder"), **options)
    return 0


def _resume(given: Resume) -> int:
    from diffrl.runs.run import Run
    from diffrl.runs.train import resume

    if Run.read(given.resume).online is None:
        raise UserError(
            f"{given.resume} is an offline run: `diffrl train --resume {given.resume}` goes on with it offline, "
            f"`diffrl online {given.resume}` in its environment."
        )
    resume(given.resume, steps=given.steps, device=given.device)
    return 0
