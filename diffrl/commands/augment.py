"""`diffrl augment ...`: enlarge an offline data set, and label what it is enlarged by."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated

import tyro
from tyro.conf import Positional

from diffrl.augment.config import Request
from diffrl.augment.label.config import LabelConfig
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


@dataclass(frozen=True)
class Label(LabelConfig):
    """Compare pairs of a data set's segments on a page in your browser; the labels are saved as you give them.

    For example,
      diffrl augment label maze2d-umaze-v1 --pairs 100 --out preferences.json
      diffrl augment label rollouts.hdf5 --env Hopper-v4 --segment 50 --active
      diffrl augment flow-to-better maze2d-umaze-v1 --preferences preferences.json --out better.hdf5

    Left and right arrow choose the better segment, down or space calls both equal, up or Backspace takes the last
    label back. Each ten labels it measures how many labels a reward model foretells that it has not seen. Ctrl-C, or
    Finish on the page, ends it; the same command goes on. The page is for this machine alone; from another one:
    ssh -L PORT:127.0.0.1:PORT, with --port PORT --no-browser here.
    """

    dataset: Positional[str]
    """A D4RL id, a Minari id, or a path (HDF5, npz, a Minari folder)."""

    def run(self) -> int:
        """Do it."""
        from diffrl.augment.label.job import label

        label(self)
        return 0
