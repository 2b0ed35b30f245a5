"""Arrays from what a caller gives in their place."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffrl.support.errors import DataError, first_line


def as_numbers(name: str, values: Any, kind: type[np.generic]) -> NDArray[Any]:
    """Numbers of any real kind as an array of another, such as numpy.float32; numpy.bool_ takes 0 and 1 alone.

    values: an array, a list or a tensor. name: what they are called in the DataError that is raised for what are no
    real numbers, and for ragged lists.
    """
    try:
        found = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # the last of a tensor with a graph
        raise DataError(f"{name} holds no array of numbers ({first_line(error)}).") from error
    if found.dtype.kind not in "biuf":
        raise DataError(f"{name} holds no array of numbers (its type is {found.dtype}); expected real ones.")
    if kind is np.bool_ and not np.isin(found, (0, 1)).all():
        raise DataError(f"{name} holds {found[~np.isin(found, (0, 1))][0]:g}; expected true or false (1 or 0).")
    with np.errstate(over="ignore"):  # what becomes infinite is refused as such
        return found.astype(kind, copy=False)


DISCRETE = (
    "discrete actions are not supported. If they are real-valued, write them as float32, in their environment's units."
)
"""What is said of actions that are not real numbers."""


def listed_numbers(numbers: NDArray[Any]) -> str:
    """The first five numbers as text, and how many more there are."""
    rest = f" and {len(numbers) - 5:,} more" if len(numbers) > 5 else ""
    return ", ".join(f"{number:g}" if numbers.dtype.kind == "f" else str(number) for number in numbers[:5]) + rest


_FEW = 16
"""Whole-valued actions of no more values than this look discrete."""


def discrete_values(actions: NDArray[Any]) -> NDArray[Any] | None:
    """The values of actions that are few and whole, as those of a discrete space; None for all others.

    Not discrete are a single value, and the two or three of a controller that only switches: -u, u, and perhaps 0.
    """
    for part in (actions[:1000], actions):
        if not (np.isfinite(part).all() and (part == np.rint(part)).all()):
            return None
        values = np.unique(part)
        if len(values) > _FEW:
            return None
    switching = len(values) <= 3 and values[0] == -values[-1] and (len(values) < 3 or values[1] == 0)
    return None if len(values) < 2 or switching else values
