"""What a data set that is to be enlarged says of generated rows in it."""

from collections.abc import Mapping
from typing import Any

from diffrl.data.fidelity import SYNTHETIC_ROWS, Verdict

UNTOLD = Verdict("", "")
"""Of generated rows of which their data set keeps no verdict."""


def said_of_generated(metadata: Mapping[str, Any]) -> Verdict | None:
    """What a data set's metadata say of the generated rows in it; None where they count none: its rows are real."""
    made = metadata.get(SYNTHETIC_ROWS)
    if not isinstance(made, int) or made < 1:
        return None
    return Verdict.of(metadata) or UNTOLD


def noise_of(metadata: Mapping[str, Any], fingerprint: str) -> int | None:
    """A number that tells the source, for the noise of rows that are generated from it; None where its rows are real.

    A model of generated rows that began with the noise that made them would make many of them again. fingerprint: the
    SHA-256 of the source's arrays, of which these are the first 60 bits.
    """
    return None if said_of_generated(metadata) is None else int(fingerprint[:15], 16)
