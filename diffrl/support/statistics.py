"""Means with their standard errors, which say what they are taken over."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SINGLE = "one episode: no ±"
"""What is said of a mean without a standard error."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error."""

    mean: float
    error: float
    over: str
    """"seeds" or "episodes": what the error is taken over."""

    def __str__(self) -> str:
        """For example `43.1 ± 2.0`; of a single value `43.1`."""
        return f"{self.mean:z.1f}" if np.isnan(self.error) else self.explained

    @property
    def explained(self) -> str:
        """As text, of episodes: for example `43.1 ± 2.0`; of a single one `43.1`, and why it has no error."""
        return f"{self.mean:z.1f}{plus_minus(self.error)}"


def plus_minus(error: float | None) -> str:
    """What stands behind a mean: its standard error; or that there is none, of a single episode of a single seed."""
    return f" ({SINGLE})" if error is None or np.isnan(error) else f" ± {error:.1f}"


def estimate(values: NDArray[np.float64] | Sequence[Sequence[float]]) -> Estimate:
    """The mean of values (S, E), its error taken over the means of S > 1 seeds, or over the episodes of one seed.

    The error is nan for a single value.
    """
    array = np.asarray(values, dtype=np.float64)
    samples = array.mean(1) if len(array) > 1 else array[0]
    error = float(samples.std(ddof=1) / np.sqrt(len(samples))) if len(samples) > 1 else float("nan")
    return Estimate(float(samples.mean()), error, "seeds" if len(array) > 1 else "episodes")


def student_ends(mean: float, error: float, freedom: float, level: float = 0.95) -> tuple[float, float]:
    """The ends of Student's interval of a mean with its standard error; nan where `freedom`, in degrees, is not > 0."""
    from scipy.stats import t

    half = float(t.ppf((1 + level) / 2, freedom)) * error if freedom > 0 else float("nan")
    return mean - half, mean + half
