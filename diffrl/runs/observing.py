"""Observations as somebody has them, made the vectors that an agent was trained on."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffrl.data.observations import Part
from diffrl.support.errors import first_line, listed, shown


def numbers(given: Any, expected: str) -> NDArray[Any]:
    """Any array of real numbers, such as a list or a tensor, as NumPy's.

    expected: what is said to be expected. Raises ValueError for what is none.
    """
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu()
        given = given.numpy() if given.is_complex() else given.to(torch.float64).numpy()
    try:
        found = np.asarray(given)
        if found.dtype == object:  # numbers of several types, as in a table's row
            found = found.astype(np.float64)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: PyTorch's, of tensors in a list
        raise ValueError(f"expected {expected}, got {shown(given)}: {first_line(error)}") from error
    if found.dtype.kind not in "biuf":
        raise ValueError(f"expected {expected}, of real numbers; got {shown(given)}, of type {found.dtype}")
    return found


def finite(given: NDArray[Any]) -> NDArray[np.float32]:
    """The numbers in float32. Raises ValueError where they are not finite there."""
    with np.errstate(over="ignore"):
        x = given.astype(np.float32)
    if not (bounded := np.isfinite(x)).all():
        raise ValueError(f"expected observations that are finite in float32, got {given[~bounded][0]:g}")
    return x


def vectors(given: Any, size: int) -> NDArray[np.float32]:
    """Observations (O,) or (B, O) from an array of that shape. Raises ValueError for another, and as `numbers`."""
    shapes = f"observations of shape ({size},) or (B, {size})"
    x = numbers(given, shapes)
    if x.ndim not in (1, 2) or x.shape[-1] != size:
        raise ValueError(f"expected {shapes}, got {x.shape}")
    return finite(x)


def has_parts(given: Any, size: int) -> bool:
    """Whether what an environment gives is no array: a dictionary, or a tuple that is no list of numbers or vectors."""
    if isinstance(given, Mapping):
        return True
    if not isinstance(given, tuple):
        return False
    return any(isinstance(part, Mapping | tuple) or _shape(part) not in ((), (size,)) for part in given)


def _shape(given: Any) -> tuple[int, ...] | None:
    """The shape of what `np.asarray` takes; None: it makes no array."""
    try:
        found: tuple[int, ...] = np.shape(given)
    except (TypeError, ValueError, RuntimeError):  # as in `numbers`
        return None
    return found


def refuse_info(given: Any, parts: Sequence[Part]) -> None:
    """Raise ValueError for what `env.reset()` gives, an observation and its info, where no such tuple is expected."""
    within = any(part.path[:1] == (1,) and len(part.path) > 1 for part in parts)
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Mapping) and not within:
        raise ValueError(
            "expected an observation, got a tuple of two, the second a dictionary: pass env.reset()[0], the "
            "observation without its info"
        )


def joined(given: Any, parts: Sequence[Part]) -> NDArray[np.float32]:
    """Observations (O,) or (B, O) from their parts, each an array of the part's shape, or of B of them.

    Raises ValueError where a part is missing or has another shape, and as `numbers`.
    """
    wanted = ", ".join(map(str, parts))
    arrays = []
    for part in parts:
        found = given
        for key in part.path:
            try:
                found = found[key]
            except (KeyError, IndexError, TypeError) as error:
                keys = f" the keys {listed([*map(str, given)])}" if isinstance(given, Mapping) else f" {shown(given)}"
                raise ValueError(f"expected an observation of the parts {wanted}, got{keys}") from error
        array = numbers(found, f"the part {part} of an observation")
        lead = array.ndim - len(part.shape)
        if lead not in (0, 1) or array.shape[lead:] != part.shape:
            raise ValueError(f"expected the part {part} of an observation, or rows of it, got {array.shape}")
        arrays.append(finite(array).reshape(*array.shape[:lead], math.prod(part.shape)))
    if len({array.shape[:-1] for array in arrays}) > 1:
        rows = ", ".join(f"{part} {array.shape[:-1]}" for part, array in zip(parts, arrays, strict=True))
        raise ValueError(f"expected as many rows of each part of the observations, got {rows}")
    return np.concatenate(arrays, axis=-1)
