"""`diffrl augment ...`: enlarge an offline data set."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from diffrl.augment.synther.config import Sampling, SynthERConfig
from diffrl.support.errors import explaining_memory


@dataclass(frozen=True)
class Synther:
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

    dataset: Positional[str]
    """A D4RL id, a Minari id, or a path (HDF5, npz, a Minari folder)."""
    out: str
    """A path ending in .hdf5, or minari:ID, where every transition becomes an episode (14 KB and 2 ms each)."""
    samples: int | None = None
    """Synthetic rows; by default a million (the paper: 5 million)."""
    ratio: float | None = None
    """Instead of --samples: synthetic rows for each real row."""
    mix: Literal["replace", "append"] = "replace"
    """replace: the file holds synthetic rows alone, as in the paper; append: the real rows, then the synthetic."""
    model: Annotated[SynthERConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=SynthERConfig)
    sampling: Annotated[Sampling, tyro.conf.OmitArgPrefixes] = field(default_factory=Sampling)
    seed: int = 0
    """Seed of the model, its training and the samples."""
    device: str = "cpu"
    """cpu, cuda, cuda:N, or auto."""
    env: str | None = None
    """Gymnasium id of the environment the data are from: bounds, the simulator in the report; recorded in the file."""
    rows: int | None = None
    """Use only the first rows of the data set."""
    held_out: float = 0.05
    """Share of the real rows that the model does not see: the report compares with them."""
    folder: Path | None = None
    """Folder of the model and the report; by default beside the data set."""
    report: bool = True
    """Write the fidelity report."""
    force: bool = False
    """Replace the data set if it exists."""

    @explaining_memory(
        "SynthER's training or sampling",
        "a smaller --batch-size, --width or --rows (a model of other settings needs another --folder)",
        lambda: "What is saved is kept: the same command goes on, where more memory is free",
    )
    def run(self) -> int:
        """Do it."""
        from diffrl.augment.job import synther

        synther(
            self.dataset,
            self.out,
            samples=self.samples,
            ratio=self.ratio,
            mix=self.mix,
            model=self.model,
            sampling=self.sampling,
            seed=self.seed,
            device=self.device,
            env=self.env,
            rows=self.rows,
            held_out=self.held_out,
            folder=self.folder,
            report=self.report,
            force=self.force,
        )
        return 0
