"""`diffrl augment ...`: enlarge an offline data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from diffrl.augment.config import Request, refuse_address
from diffrl.augment.flow_to_better.config import (
    BlockConfig,
    DiffuserConfig,
    FlowConfig,
    PreferenceConfig,
    RewardConfig,
)
from diffrl.augment.label.config import LabelConfig
from diffrl.augment.methods import Method
from diffrl.augment.synther.config import Sampling, SynthERConfig
from diffrl.support.folder import steps
from diffrl.support.machine import explaining_memory
from diffrl.support.schema import NotNegative
from diffrl.support.stopping import going_on


@contextmanager
def _kept(request: Request, verb: str, what: str, less: str) -> Iterator[None]:
    """Around a verb's `run`: where memory runs out, or it is stopped, says what is kept, and how to go on.

    what, less: of `explaining_memory`.
    """

    def trained() -> bool:
        folder = request.model_folder(verb)
        # Of step 0 there is nothing to keep; Flow-to-Better's reward model is trained before.
        return any(steps(folder)) or (folder / "reward_model.safetensors").is_file()

    def saved() -> str:
        begins = "What is saved is kept: the same command goes on" if trained() else "The same command begins again"
        return f"{begins}, where more memory is free"

    def stopped() -> str:
        if not trained():
            return "Stopped before anything was trained: the same command begins again."
        return "Stopped. What is trained and generated is kept: the same command goes on."

    with explaining_memory(what, less, saved), going_on(stopped):
        yield


_LESS = "a smaller --batch-size, --width or --rows (a model of other settings needs another --folder)"
"""What makes diffrl's own methods need less memory."""


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
    train. (With --out minari:ID they are in runs/ID-synther, with - for each / of the id.)

    The model is the paper's, for a GPU; on a CPU take --width 256 --steps 20000. For a first look, of half a
    minute: --rows 10000 --samples 10000 --width 128 --steps 2000. --rows are those read, --samples those written.
    """

    dataset: Annotated[Positional[str], tyro.conf.arg(metavar="DATASET")]
    """A D4RL id, a Minari id, or a path (HDF5, npz, a Minari folder)."""
    model: Annotated[SynthERConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=SynthERConfig)
    sampling: Annotated[Sampling, tyro.conf.OmitArgPrefixes] = field(default_factory=Sampling)

    def run(self) -> int:
        """Do it."""
        with _kept(self, "synther", "SynthER's training or sampling", _LESS):
            self._run()
        return 0

    def _run(self) -> None:
        self.refuse("synther", dataclasses.asdict(self.model))
        from envs.datasets import require

        require(self.dataset)
        from diffrl.augment.synther.augmenter import synther

        asked = {f.name: getattr(self, f.name) for f in dataclasses.fields(Request)}
        synther(model=self.model, sampling=self.sampling, **asked)


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

    dataset: Annotated[Positional[str], tyro.conf.arg(metavar="DATASET")]
    """A D4RL id, a Minari id, or a path (HDF5, npz, a Minari folder)."""

    def run(self) -> int:
        """Do it."""
        from envs.datasets import require

        require(self.dataset)
        from diffrl.augment.label.job import label

        label(self)
        return 0


@dataclass(frozen=True)
class FlowToBetter(Request):
    """Improve a data set's best trajectories by preferences (Flow-to-Better), and write them as a new data set.

    A reward is learned from pairs of segments of which one is preferred. The data's windows are put into blocks by it,
    and a diffusion model learns to make a trajectory of each block from one of the block below. The data's
    windows flow on from there, as long as their predicted return rises. For example,
      diffrl augment flow-to-better rollouts.hdf5 --env Hopper-v4 --preferences 500 --out better.hdf5
      diffrl augment label maze2d-umaze-v1 --out labels.json
      diffrl augment flow-to-better maze2d-umaze-v1 --preferences labels.json --out better.hdf5 --relabel
      diffrl train --agent bc --dataset better.hdf5

    The same command again goes on where it was cut. Beside the data set, in OUT-flow-to-better: the reward model, the
    diffuser, their curves (TensorBoard), and fidelity.html, with how far the rows are from what the simulator does.
    """

    dataset: Annotated[Positional[str], tyro.conf.arg(metavar="DATASET")]
    """A D4RL id, a Minari id, or a path (HDF5, npz, a Minari folder)."""
    out: str
    """A path ending in .hdf5, or minari:ID."""
    samples: int | None = None
    """Rows to generate, before those are left out whose trajectory was not improved; by default 300 trajectories. Whole
    trajectories are, so that there may be more: one of --horizon 16 has 15 rows, each with the row that follows."""
    preference: Annotated[PreferenceConfig, tyro.conf.OmitArgPrefixes] = field(kw_only=True)
    diffuser: Annotated[DiffuserConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=DiffuserConfig)
    flow: Annotated[FlowConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=FlowConfig)
    grouping: Annotated[BlockConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=BlockConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    max_dynamics_error: NotNegative | None = None
    """Leave out rows whose next observation misses the simulator's by more, RMS in standard deviations of the data; the
    episode is cut there. By default none is left out."""
    relabel: bool = False
    """Write the data set itself as well, with the learned reward in place of its own, for agents that learn values:
    OUT-flow-to-better/relabelled.hdf5. (Generated rows always have the learned reward, and with --mix append the real
    rows do too.)"""

    def run(self) -> int:
        """Do it."""
        with _kept(self, "flow-to-better", "Flow-to-Better's training or sampling", _LESS):
            self._run()
        return 0

    def _run(self) -> None:
        self.refuse("flow-to-better", dataclasses.asdict(self.diffuser) | dataclasses.asdict(self.grouping))
        from envs.datasets import require

        require(self.dataset)
        from diffrl.augment.flow_to_better.augmenter import flow_to_better

        asked = {f.name: getattr(self, f.name) for f in dataclasses.fields(Request)}
        flow_to_better(
            preferences=self.preference,
            diffuser=self.diffuser,
            flow=self.flow,
            reward=self.reward,
            blocks=self.grouping,
            max_dynamics_error=self.max_dynamics_error,
            relabel=self.relabel,
            **asked,
        )


@dataclass(frozen=True)
class Fidelity:
    """Compare synthetic rows with real ones: how faithful is a larger data set, whoever made it?

    For example,
      diffrl augment fidelity rollouts.hdf5 more.hdf5 --env Hopper-v4
      diffrl augment fidelity maze2d-umaze-v1 synthetic.hdf5 --rows 100000 --out report

    Writes the report of `augment synther`: fidelity.html, with pictures, and the same as PNG and JSON. Of a file with
    real rows and synthetic ones after them (--mix append) the synthetic ones are compared; of all synthetic rows the
    first 50,000.
    """

    real: Annotated[Positional[str], tyro.conf.arg(metavar="REAL")]
    """The real data: an id of D4RL's or OGBench's, a Minari id, or a path (HDF5, npz, a Minari folder)."""
    synthetic: Annotated[Positional[str], tyro.conf.arg(metavar="SYNTHETIC")]
    """The rows to be judged: as REAL."""
    out: Path | None = None
    """Folder of the report; by default beside the synthetic file, such as more-fidelity of more.hdf5, and for an id
    runs/ID-fidelity here."""
    env: str | None = None
    """Gymnasium id of the environment the data are from: bounds, and the simulator. By default the benchmark's, or what
    the real file names; none: without one."""
    rows: int | None = None
    """Read only so many of the real rows, the first; by default all."""
    held_out: float = 0.05
    """Share of the real rows that gives the floor; no fewer than 100 rows do, where half of them are more. With the
    --seed, --held-out and --rows of `augment synther` they are those that its model has not seen, where this version
    of diffrl trained it."""
    seed: int = 0
    """Seed of the rows that are held out and drawn."""
    steered: bool | None = None
    """The rows are meant to be like a part of the real ones alone, as of --condition: another distribution is no fault.
    By default what their file says; where it says nothing, it is one."""
    force: bool = False
    """Replace a report that is there."""

    def run(self) -> int:
        """Do it."""
        from envs.datasets import require

        refuse_address(self.out, "--out")
        require(self.real)
        require(self.synthetic)
        from diffrl.augment.fidelity.job import fidelity_of

        fidelity_of(**dataclasses.asdict(self))
        return 0


def of_package(verb: str, schema: type[Method]) -> type:
    """The verb of a method that another package brings: its options, with DATASET as an operand, and a `run()`."""

    @dataclass(frozen=True)
    class Verb(schema):  # type: ignore[misc, valid-type]
        dataset: Annotated[Positional[str], tyro.conf.arg(metavar="DATASET")]
        """A D4RL id, a Minari id, or a path (HDF5, npz, a Minari folder)."""

        def run(self) -> int:
            """Do it."""
            less = "a smaller model or batch, or --rows (a model of other settings needs another --folder)"
            with _kept(self, verb, "The method's training or sampling", less):
                self.refuse(verb, {field.name: getattr(self, field.name) for field in dataclasses.fields(schema)})
                from envs.datasets import require

                require(self.dataset)
                self.write()
            return 0

    Verb.__name__, Verb.__doc__ = schema.__name__, schema.__doc__
    return Verb


VERBS = {"synther": Synther, "flow-to-better": FlowToBetter, "label": Label, "fidelity": Fidelity}
"""What stands after `diffrl augment`."""
