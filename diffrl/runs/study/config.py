"""The settings of selection, by a bandit and by the data. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from diffrl.support.schema import (
    Batch,
    Depth,
    Natural,
    NotNegative,
    Positive,
    Range,
    Rate,
    Rows,
    Seed,
    Several,
    Width,
    check,
)

Which = Literal["last", "all"]
"""Which evaluated checkpoints of a run count as policies: each seed's last one, or all."""

By = Literal["data", "environment"]
"""What a task of a report is: a data set, in its environment; or an environment, whatever data agents learned from."""


@dataclass(frozen=True)
class BanditConfig:
    """How the bandit is played."""

    pulls: Annotated[int, Range(1, 100_000)] = 200
    """Online episodes, T."""
    arms: Several = 8
    """Policies a trial, drawn without replacement; all where there are fewer."""
    trials: Several = 1000
    """Times that it is played."""
    alpha: NotNegative = 2.0
    """Weight of the uncertainty in the bound, for scores x100."""
    seed: Seed = 0
    """What all draws come from."""

    def __post_init__(self) -> None:
        check(self, "bandit.")


@dataclass(frozen=True)
class FQEConfig:
    """How policies are evaluated by the data."""

    steps: Natural = 10_000
    """Training steps; 0: no evaluation by the data."""
    rows: Rows = 10_000
    """Transitions, drawn from the data once; each policy is asked for an action at each."""
    batch_size: Batch = 256
    """Transitions a step."""
    width: Width = 128
    """Width of the hidden layers."""
    layers: Depth = 2
    """Number of hidden layers."""
    learning_rate: Positive = 1e-3
    """Adam's learning rate, which falls to 0 along a cosine."""
    target_rate: Rate = 0.05
    """How far the averaged network moves to the network each step: large, since a value is to settle in `steps`. Of a
    discount above 0.99 it is larger in proportion to the horizon, 1 / (1 - discount), and at most 1."""
    seed: Seed = 0
    """What rows, batches and initial weights come from."""

    def __post_init__(self) -> None:
        check(self, "fqe.")
