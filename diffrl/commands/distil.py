"""`diffrl distil`: distil a run's policy into one of few network calls."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional, Suppress

from diffrl.runs.config import RunOptions
from diffrl.support.errors import UserError
from diffrl.tuning.config import FORWARD
from diffrl.tuning.distil_config import DistilConfig

USAGE = """Distil a run's diffusion or flow policy into one that acts in one network call, or a few.

  diffrl distil runs/NAME --to consistency             a consistency policy, one call
  diffrl distil runs/NAME --to reflow --calls 2        a rectified flow on the teacher's pairs, two Euler steps
  diffrl distil runs/NAME --to consistency --loss scm  continuous-time consistency (of edp, ifql, bfn)
  diffrl resume runs/STUDENT [--steps N]

Makes a run of its own, of the agent consistency_ac or bfn, which `diffrl evaluate` and `load_policy` take like any
other. At its end stand a table and a picture: score, and distance to the teacher's actions, against network calls.
Teachers: {teachers}. The critics of a teacher go on choosing among the student's actions where the student's agent
chooses alike (consistency: of diffusion_ql, edp, idql; reflow: of ifql, bfn); else the policy acts alone."""


@dataclass(frozen=True)
class _Options(RunOptions):
    steps: int | None = None
    """Updates (10,000)."""
    eval_every: int | None = None
    """Updates between evaluations, each followed by a checkpoint; by default a tenth of the steps."""
    compile: Suppress[bool | None] = None


@dataclass(frozen=True)
class _Settings(DistilConfig):
    start_run: Suppress[Path] = Path()
    start_steps: Suppress[tuple[int, ...]] = ()


@dataclass(frozen=True)
class Distil:
    """Distil a run's policy."""

    run_folder: Annotated[Positional[Path], tyro.conf.arg(name="run", metavar="RUN")]
    """The folder of the run whose policy is the teacher."""
    run: OmitArgPrefixes[_Options] = _Options()
    learning: OmitArgPrefixes[_Settings] = _Settings()


def run(arguments: Sequence[str]) -> int:
    """Parse what stands after `diffrl distil` and do it."""
    words = list(arguments)
    if not words:
        raise UserError("Which run's policy shall be distilled? `diffrl distil --help` shows how to say.")
    description = USAGE.format(teachers=", ".join(FORWARD))
    given = tyro.cli(Distil, args=words, prog="diffrl distil", description=description)
    from diffrl.runs.distil import distil

    fields = {f.name: getattr(given.learning, f.name) for f in dataclasses.fields(DistilConfig)}
    options = {f.name: getattr(given.run, f.name) for f in dataclasses.fields(RunOptions)}
    distil(DistilConfig(**{**fields, "start_run": given.run_folder}), **options)
    return 0
