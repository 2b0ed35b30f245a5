"""How a value of a setting is written: with all its digits in names, with as few as tell it from others in tables."""

from collections.abc import Sequence
from typing import Any

_DIGITS = 4
"""Significant digits that a table shows of a number at least, where these are not all it has."""


def exact(value: Any) -> str:
    """A value as names of runs and files have it: nothing is lost, 1e9 is 1e+09, True is true, None is none."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(exact, value))}]"
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def short(values: Sequence[Any]) -> list[str]:
    """The values of one setting as tables show them, in their order: 3.0652762117628294 as 3.065.

    What six digits say whole stays so. Of other floats as many significant digits are shown, four at least, as tell
    all values apart that differ.
    """
    wanted = len({exact(value) for value in values})
    for digits in range(_DIGITS, 17):
        texts = [_rounded(value, digits) for value in values]
        if len(set(texts)) == wanted:
            return texts
    return [exact(value) for value in values]


def _rounded(value: Any, digits: int) -> str:
    text = exact(value)
    return f"{value:.{digits}g}" if isinstance(value, float) and len(text) > len(f"{value:g}") else text
