"""What a method that enlarges data sets brings: the steps that all of them share, in `job.py`, call it by this."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffrl.augment.columns import as_columns
from diffrl.data.offline import Floats, OfflineDataset
from diffrl.data.transitions import Transitions
from diffrl.training.loop import Trainer
from envs.task import Task

if TYPE_CHECKING:
    from envs.dynamics import Dynamics

Bounds = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Lowest and highest values of some columns."""


@dataclass(frozen=True)
class RealData:
    """The data set to enlarge, in the environment's units."""

    dataset: OfflineDataset
    task: Task
    transitions: Transitions
    """Its rows of known successor, on the CPU."""
    action_bounds: Bounds
    """Lowest and highest actions (A,)."""
    observation_bounds: Bounds
    """Lowest and highest observations (O,); infinite where no environment is known."""
    rows: int | None = None
    """How many first rows of a larger data set these are; None: all that it has."""

    def dynamics(self) -> "tuple[Dynamics | None, str]":
        """The simulator of the environment; None where there is none, and why, in a sentence ("": none is known)."""
        from envs.dynamics import dynamics_for, why_none  # MuJoCo

        env_id = self.task.env_id
        why = (why_none(env_id) or "") if env_id else ""
        if env_id and not why and self.task.wrappers:
            why = f"its wrappers are not simulated: {self.task.spec}."
        return (dynamics_for(env_id, **self.task.env_kwargs) if env_id and not why else None), why


class Augmenter(ABC):
    """A method that enlarges a data set: what `augment` asks of it. It is made of its settings alone, for one call.

    Its model has one seed. Generated rows are [s, a, s', r, terminal], in the environment's units, each an episode of
    its own, unless `columns`, `together` and `table` say otherwise.
    """

    name: ClassVar[str]
    """As users know the method, in titles."""
    verb: ClassVar[str]
    """`diffrl augment VERB`; the model's folder is OUT-VERB."""
    paper: ClassVar[str]
    """Where it was published, for the data set's provenance."""
    rows_version: ClassVar[int]
    """The version of how a seed becomes rows: raised with every change that gives other rows for the same command."""
    steps: int
    """Training steps."""
    model_settings: dict[str, Any]
    """Settings of the model and its training, as JSON holds them. A folder's model is used for the same ones alone."""
    later_settings: ClassVar[Mapping[str, Any]] = {}
    """Of the model's settings those that folders of older versions do not name, with the values that they had."""
    sampling_settings: dict[str, Any]
    """All else that generated rows depend on, as JSON holds it."""
    steered: bool = False
    """Whether the rows are meant to be like a part of the real ones alone, such as those of high reward."""
    samples: int = 1_000_000
    """Rows to generate where nobody says how many."""
    each: ClassVar[int | None] = None
    """Rows to generate for each real one where nobody says how many and --rows cuts the data, `samples` at most; None:
    `samples` there too."""
    first_look: ClassVar[str] = ""
    """Options of a small start, for a first look, where there are such."""
    together: int = 1
    """How many generated rows in turn belong together, as those of a trajectory: parts are never cut within them."""
    described: str = "each an episode of its own"
    """What synthetic transitions are, in words."""
    agent: str = "iql"
    """An agent that is trained on such data."""

    # Set by `open`.
    train: Transitions
    """The real rows that the model learns from."""
    held_out: Transitions
    """The real rows that it does not see."""
    chunk: int
    """Rows that `sample` gives: whole groups of `together`."""

    @abstractmethod
    def open(self, data: RealData, held_out: float, seed: int, device: str) -> None:
        """Take the data: hold out a share of the rows. Raises DataError where the method cannot learn from them."""

    @abstractmethod
    def trainer(self, folder: Path, begun: bool) -> Trainer:
        """Make the model, with its initial weights, and what trains it.

        What the model needs beside its checkpoints is written to `folder`, or where training has begun is read there.
        """

    @abstractmethod
    def held_out_loss(self) -> list[float]:
        """The model's loss on the held-out rows, one number a seed."""

    @abstractmethod
    def load(self, learner: Mapping[str, Tensor]) -> None:
        """Put a checkpoint's tensors into the model."""

    @abstractmethod
    def sample(self, generator: torch.Generator) -> NDArray[np.float32]:
        """Rows (chunk, columns) of the trained model. Raises UserError where they are not finite."""

    @property
    def columns(self) -> int:
        """W, the columns of a generated row: those of its transition, and what else the method keeps of it."""
        return self.train.rows.shape[1] - 2  # a real row has its episode and time besides

    def table(self, rows: Floats) -> dict[str, NDArray[Any]]:
        """The columns of a data set of generated rows (n, W), in whole groups of `together`: all, or what is kept."""
        return as_columns(rows, self.train.observation_size, self.train.action_size)

    def ends(self, generated: Floats) -> bool:
        """Whether any of the generated rows (n, W) is terminal."""
        return bool((generated[:, -1] > 0.5).any())

    def look(self, generated: Floats) -> int:
        """Look at all generated rows (n, W), a map of a file, before they are written: how many `table` will keep.

        Raises UserError where there are none.
        """
        return len(generated)

    def fewer(self) -> str:
        """Why `look` keeps fewer rows than were generated, a part of a sentence, where it does."""
        return "the others are left out"

    def real(self, data: RealData) -> RealData:
        """The real data as they stand beside generated rows, once the model is trained; the same rows."""
        return data

    def provenance(self) -> dict[str, Any]:
        """What the data set says of the model and its sampling."""
        return {"model": self.model_settings, "sampling": self.sampling_settings}

    def warning(self) -> str:
        """What to say before training starts on this device; empty where there is nothing to say."""
        return ""

    def remark(self) -> str:
        """How the fidelity verdicts are to be read, for their page too; empty where there is nothing to say."""
        return ""
