"""How the rows of a data set are taken where its marks or its units mislead. No NumPy, no torch: for command lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

TimeLimitTerminals = Literal["terminals", "timeouts"]
"""What terminal rows at an environment's limit of steps are."""
ActionUnits = Literal["environment", "normalised"]
"""What units actions are in: their environment's, or scaled to [-1, 1]."""


@dataclass(frozen=True)
class Taken:
    """How the rows of a data set are taken. None: as they stand, and what looks odd is said."""

    time_limit_terminals: TimeLimitTerminals | None = None
    """timeouts: terminal rows at exactly the limit of steps, or marked as timeouts too, are timeouts alone."""
    actions: ActionUnits | None = None
    """normalised: actions lie in [-1, 1], and are scaled to the bounds of the environment."""
    cut_contradictions: bool = False
    """Whether an episode is cut where a stored next observation contradicts the next row."""
    counted: int | None = None
    """The limit of steps by which episodes are counted, in data that mark no timeout; None: they are not counted."""

    @classmethod
    def by(cls, options: Any, counted: int | None = None) -> Taken:
        """What an object with fields of these names says, such as a run's configuration."""
        return cls(options.time_limit_terminals, options.actions, options.cut_contradictions, counted)
