"""Settings of the reward model that is learned from preferences, and of the blocks of trajectories. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from diffrl.support.schema import (
    Batch,
    Count,
    Depth,
    Many,
    NotNegative,
    Positive,
    Range,
    Several,
    Width,
    check,
)


@dataclass(frozen=True)
class RewardConfig:
    """An ensemble of score networks, and how it learns from preferences.

    It is trained for a fixed number of steps. Each member holds out another share of the pairs, which it never sees:
    with 5 members and a fifth each, every pair is judged by the one member that has not seen it, and none is lost.
    """

    members: Several = 5
    """Networks of the ensemble, which differ in their initial weights and in the pairs that they hold out."""
    width: Width = 256
    """Units of a layer, as published."""
    layers: Depth = 2
    """Hidden layers, as published, ReLU."""
    steps: Count = 300
    """Training steps."""
    batch_size: Batch = 32
    """Pairs a step, of each member."""
    rows: Many = 20
    """Rows a step of each segment, drawn from it: their mean score stands for the segment's (its expectation). Segments
    are no longer than that, or they are whole: then nothing is drawn."""
    learning_rate: Positive = 1e-3
    """Adam's learning rate at the beginning; it falls to 0 along half a cosine."""
    weight_decay: NotNegative = 1e-3
    """What the squares of the weights (without biases) are multiplied by in the loss, halved."""
    held_out: Annotated[float, Range(0, 0.5)] = 0.2
    """Share of the pairs that each member does not see, at least one; 0: it sees all, and nothing is measured."""

    def __post_init__(self) -> None:
        check(self, "reward.")


@dataclass(frozen=True)
class BlockConfig:
    """How trajectories are put into blocks of similar predicted return."""

    blocks: Annotated[int, Range(2, 10_000)] = 20
    """Blocks, as published for locomotion (5 on Meta-World)."""
    restarts: Several = 10
    """How often k-means begins anew, of which the best is taken."""

    def __post_init__(self) -> None:
        check(self, "blocks.")
