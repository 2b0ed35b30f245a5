"""What became of generated trajectories: looked at part by part, so that memory holds one."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffrl.augment.fidelity.measures import UNIT
from diffrl.augment.flow_to_better import generate
from diffrl.data.offline import Floats
from diffrl.support.errors import counted

BLOCK = 2**16
"""Generated rows looked at once."""
MOST_ERRORS = 100_000
"""Dynamics errors that the median is taken of: the first ones, which stand for all."""


class Counts:
    """What became of the generated trajectories, counted part by part."""

    def __init__(self, together: int) -> None:
        self._together = together
        self.trajectories = self.improved = self.tried = self.kept = self.rows = self.left_out = 0
        self._returns = np.zeros(2)
        self._errors: list[NDArray[np.float32]] = []

    def add(self, told: generate.Columns, bound: float | None) -> None:
        """Take in what stands behind the rows of some trajectories."""
        each = generate.Columns(*(values[:: self._together] for values in told))
        better = each.kept > 0
        self.trajectories += len(better)
        self.improved += int(better.sum())
        self.tried += int(each.tried.sum())
        self.kept += int(each.kept.sum())
        for i, values in enumerate((each.start_return, each.predicted_return)):
            self._returns[i] += float(values[better].sum(dtype=np.float64))
        written, _ = generate.written(told, self._together, bound)
        self.rows += int(written.sum())
        self.left_out += int(((told.kept > 0) & ~written).sum())
        left = MOST_ERRORS - sum(map(len, self._errors))
        self._errors.append(told.dynamics_error[(told.kept > 0) & ~np.isnan(told.dynamics_error)][:left])

    @property
    def start_return(self) -> float:
        """The mean predicted return of what the improved trajectories started from."""
        return float(self._returns[0] / max(self.improved, 1))

    @property
    def predicted_return(self) -> float:
        """Their own mean predicted return."""
        return float(self._returns[1] / max(self.improved, 1))

    @property
    def median_error(self) -> float:
        """The median dynamics error of the improved trajectories' rows; NaN where none is known."""
        errors = np.concatenate(self._errors) if self._errors else np.zeros(0)
        return float(np.median(errors)) if len(errors) else float("nan")

    def lines(self, returns: NDArray[np.float64]) -> Iterator[str]:
        """What is printed; returns: those of the data's windows."""
        yield (
            f"Flow:        {self.improved:,} of {self.trajectories:,} trajectories improved; {self.kept:,} of "
            f"{self.tried:,} steps kept. Mean predicted return {self.start_return:.4g} -> {self.predicted_return:.4g} "
            f"(the data's windows: {returns.mean():.4g}, the best {returns.max():.4g})."
        )
        if not np.isnan(self.median_error):
            yield (
                f"Dynamics:    the median row misses the simulator's s' by {self.median_error:.2g} {UNIT}; "
                f"{counted(self.left_out, 'rows')} {'is' if self.left_out == 1 else 'are'} left out for it."
            )

    def fewer(self) -> str:
        """Why not all rows are written, a part of a sentence; empty where they are."""
        missed, all_of = self.trajectories - self.improved, f"of {self.trajectories:,} trajectories"
        reasons = [
            (missed, f"{all_of} {'was' if missed == 1 else 'were'} not improved"),
            (self.left_out, f"of their rows {'is' if self.left_out == 1 else 'are'} left out by --max-dynamics-error"),
        ]
        return "; ".join(f"{n:,} {what}" for n, what in reasons if n)

    def as_json(self, bound: float | None) -> dict[str, Any]:
        """The counts, as JSON holds them."""
        error = self.median_error
        return {
            "trajectories": self.trajectories,
            "improved": self.improved,
            "steps_tried": self.tried,
            "steps_kept": self.kept,
            "start_predicted_return": self.start_return,
            "predicted_return": self.predicted_return,
            "median_dynamics_error": error if np.isfinite(error) else None,
            "max_dynamics_error": bound,
            "rows_left_out": self.left_out,
        }


def parts(generated: Floats, together: int) -> Iterator[Floats]:
    """The generated rows, as many at once as memory is meant to hold, in whole trajectories."""
    size = max(BLOCK // together, 1) * together
    for start in range(0, len(generated), size):
        yield np.array(generated[start : start + size])
