"""What a data set says of the synthetic rows in it: the verdict on their fidelity, from when they were made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

USELESS, LOOK_FIRST, NO_FAULT = "do not train", "look first", "no fault found"
"""Words of a verdict on rows that were compared with real ones: see `diffrl.augment.fidelity`."""
KEY, SAYS = "fidelity", "fidelity_says"
"""Its entries in a data set's metadata."""


class Verdict(NamedTuple):
    """Whether synthetic rows are of any use."""

    word: str
    """One of `USELESS`, `LOOK_FIRST`, `NO_FAULT`, or "not measured"."""
    sentence: str
    """Why."""

    def metadata(self) -> dict[str, str]:
        """The entries of a data set's metadata that keep it."""
        return {KEY: self.word, SAYS: self.sentence}

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Verdict | None:
        """The verdict that a data set's metadata keep; None where they keep none."""
        word = metadata.get(KEY)
        return cls(word, str(metadata.get(SAYS, ""))) if isinstance(word, str) else None


NOT_MEASURED = Verdict("not measured", "The synthetic rows were not compared with real ones.")
