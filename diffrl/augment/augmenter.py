"""What a method that enlarges data sets brings: the steps that all of them share, in `job.py`, call it by this."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffrl.data.offline import OfflineDataset
from diffrl.data.transitions import Transitions
from diffrl.training.loop import Trainer
from envs.task import Task

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


class Augmenter(ABC):
    """A method that enlarges a data set: what `augment` asks of it. It is made of its settings alone, for one call.

    Its model has one seed. Generated rows are [s, a, s', r, terminal], in the environment's units.
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
    sampling_settings: dict[str, Any]
    """All else that generated rows depend on, as JSON holds it."""
    steered: bool = False
    """Whether the rows are meant to be like a part of the real ones alone, such as those of high reward."""

    # Set by `open`.
    train: Transitions
    """The real rows that the model learns from."""
    held_out: Transitions
    """The real rows that it does not see."""
    chunk: int
    """Rows that `sample` gives."""

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
        """Rows (chunk, D) of the trained model. Raises UserError where they are not finite."""

    def provenance(self) -> dict[str, Any]:
        """What the data set says of the model and its sampling."""
        return {"model": self.model_settings, "sampling": self.sampling_settings}

    def warning(self) -> str:
        """What to say before training starts on this device; empty where there is nothing to say."""
        return ""

    def remark(self) -> str:
        """What to say below the fidelity verdicts; empty where there is nothing to say."""
        return ""
