"""What stands behind the colon of rewards that take few arguments, held to what it may be. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from diffrl.support.errors import UserError, nearest

HUES = {
    "red": 0,
    "orange": 30,
    "yellow": 60,
    "green": 120,
    "cyan": 180,
    "blue": 240,
    "purple": 270,
    "magenta": 300,
    "pink": 330,
}
"""Hues by name, in degrees on the circle of red, green and blue."""


def degrees_of(hue: str) -> int:
    """The degrees of a name of HUES, or of degrees such as "210". Raises UserError for another."""
    if re.fullmatch(r"\d{1,3}", hue, re.ASCII):
        return int(hue)
    if hue not in HUES:
        raise UserError(f"expected a colour or a hue in degrees, not {hue!r}; {nearest(hue, HUES)}")
    return HUES[hue]


def jpeg_quality(quality: str) -> int:
    """JPEG's quality. Raises UserError for what is no whole number from 1 to 100."""
    if not (quality.isdecimal() and 1 <= int(quality) <= 100):
        raise UserError("the argument is JPEG's quality, a whole number from 1 to 100")
    return int(quality)


def digit_of(digit: str) -> int:
    """The digit. Raises UserError for what is none."""
    if digit not in list("0123456789"):
        raise UserError("the argument is one digit, 0 to 9")
    return int(digit)


CHECKS: Mapping[str, Callable[[str], object]] = {
    "colour": degrees_of,
    "jpeg": jpeg_quality,
    "jpeg-file": jpeg_quality,
    "incompressible": jpeg_quality,
    "digit": digit_of,
    "digit-held-out": digit_of,
}
"""By the name of a reward of ours: what raises UserError for an argument that it cannot use."""


def check_argument(name: str, argument: str) -> None:
    """Raise UserError for an argument that the reward of ours with this name cannot use, as far as CHECKS can tell."""
    if argument and name in CHECKS:
        try:
            CHECKS[name](argument)
        except UserError as error:
            raise UserError(f"{name}:{argument}: {error}") from error
