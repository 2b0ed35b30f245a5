"""Arrays from what a caller gives in their place."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffrl.support.errors import UserError, first_line


def as_numbers(name: str, values: Any, kind: type[np.generic]) -> NDArray[Any]:
    """Numbers of any real kind as an array of another, such as numpy.float32; numpy.bool_ takes 0 and 1 alone.

    name: what they are called in the UserError that is raised for what are no real numbers, and for ragged lists.
    """
    try:
        found = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} holds no array of numbers ({first_line(error)}).") from error
    if found.dtype.kind not in "biuf":
        raise UserError(f"{name} holds no array of numbers (its type is {found.dtype}); expected real ones.")
    if kind is np.bool_ and not np.isin(found, (0, 1)).all():
        raise UserError(f"{name} holds {found[~np.isin(found, (0, 1))][0]:g}; expected true or false (1 or 0).")
    with np.errstate(over="ignore"):  # what becomes infinite is refused as such
        return found.astype(kind, copy=False)
