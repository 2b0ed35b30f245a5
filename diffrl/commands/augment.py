"""`diffrl augment ...`: enlarge an offline data set."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated

import tyro
from tyro.conf import Positional

from diffrl.augment.config import Request
from diffrl.augment.synther.config import Sampling, SynthERConfig
from diffrl.support.errors import explaining_memory
from diffrl.support.stopping import going_on


@dataclass(frozen=True)
class Synther(Request):
    """Train a diffusion model of a data set's transitions (SynthER) and write what it generates as a new data set.

    For example,
      diffrl augment synther maze2d-umaze-v1 --out synthetic.hdf5 --samples 1000000
      diffrl augment synther rollouts.hdf5 --env Hopper-v4 --out more.hdf5 --mix append --ratio 5
      diffrl augment synther mujoco/hopper/medium-v0 --out minari:hopper/synthetic-v0 --samples 10000
      diffrl train --agent iql --dataset synthetic.hdf5

    The same command again goes on where it was cut. Beside the data set, in OUT-synther: the model, its curves
    (TensorBoard), and fidelity.html, which says how far the synthetic rows are from real ones: look at it before you
    train. The model is the paper's, for a GPU; on a CPU take --width 256 --steps 20000.
    """

    dataset: Annotated[Positional[str], tyro.conf.arg(metavar="DATASET")]
    """A D4RL id, a Minari id, or a path (HDF5, npz, a Minari folder)."""
    model: Annotated[SynthERConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=SynthERConfig)
    sampling: Annotated[Sampling, tyro.conf.OmitArgPrefixes] = field(default_factory=Sampling)

    @explaining_memory(
        "SynthER's training or sampling",
        "a smaller --batch-size, --width or --rows (a model of other settings needs another --folder)",
        lambda: "What is saved is kept: the same command goes on, where more memory is free",
    )
    @going_on(lambda: "Stopped. What is trained and generated is kept: the same command goes on.")
    def run(self) -> int:
        """Do it."""
        from diffrl.augment.synther.augmenter import synther

        asked = {f.name: getattr(self, f.name) for f in dataclasses.fields(Request)}
        synther(model=self.model, sampling=self.sampling, **asked)
        return 0
