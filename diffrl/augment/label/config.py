"""What `diffrl augment label` can be asked for. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from diffrl.augment.flow_to_better.config import RewardConfig
from diffrl.support.schema import Many, Range, Rows, Seed, check


@dataclass(frozen=True)
class LabelConfig:
    """Pairs of a data set's segments to label, and where the labels go."""

    dataset: str
    """A D4RL id, a Minari id, or a path (HDF5, npz, a Minari folder)."""
    out: str = "preferences.json"
    """The JSON file of labels; where it exists, labelling goes on."""
    segment: Many = 100
    """Rows of a segment."""
    pairs: Annotated[int, Range(1, 100_000)] = 100
    """Labels that there shall be, with those in the file."""
    active: bool = False
    """From the 30th label on, choose the pairs that a reward model disagrees on most; else they are random."""
    seed: Seed = 0
    """Seed of the pairs: the same one gives the same pairs."""
    env: str | None = None
    """Gymnasium id of the environment the data are from, which says how to draw them; none: plots of the columns.
    By default the benchmark's, or what the file names."""
    rows: Rows | None = None
    """Use only so many rows, the first of the data set; by default all."""
    port: Annotated[int, Range(0, 65535)] = 0
    """Port of the page on this machine; 0: any that is free."""
    browser: bool = True
    """Open the page in your browser."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """The model that measures what the labels are worth."""

    def __post_init__(self) -> None:
        check(self)
