"""What `diffrl augment label` can be asked for. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from diffrl.augment.config import refuse_address
from diffrl.augment.flow_to_better.config import RewardConfig
from diffrl.data.config import ActionUnits, TimeLimitTerminals
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
    """Gymnasium id of the environment the data are from, which says how to draw them, and by whose limit of steps
    episodes are counted where none are marked; none: plots of the columns. By default the benchmark's, or what the file
    names."""
    env_kwargs: tuple[str, ...] = ()
    """Arguments of that environment, by default its own: KEY=VALUE each, such as g=2.0 (values as JSON, else text)."""
    rows: Rows | None = None
    """Use only so many rows, the first of the data set; by default all."""
    time_limit_terminals: TimeLimitTerminals | None = None
    """timeouts: terminal rows at exactly the environment's limit of steps, or marked as timeouts too, are timeouts;
    terminals: they are true ends. By default they are taken as true ends, and what looks odd is said."""
    actions: ActionUnits | None = None
    """normalised: the data's actions are scaled to [-1, 1], where its environment has other bounds; environment: they
    are in its units. By default they are taken to be in its units, and what looks odd is said."""
    cut_contradictions: bool = False
    """Cut an episode where a stored next observation contradicts the next row."""
    port: Annotated[int, Range(0, 65535)] = 0
    """Port of the page on this machine; 0: any that is free."""
    browser: bool = True
    """Open the page in your browser."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """The model that measures what the labels are worth."""
    max_episode_steps: ClassVar[None] = None
    """Nothing is evaluated here: episodes are counted by the environment's own limit."""

    def __post_init__(self) -> None:
        check(self)
        refuse_address(self.out, "--out")
