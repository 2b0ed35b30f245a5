"""What a data set says of the synthetic rows in it: the verdict on their fidelity, from when they were made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diffrl.data.offline import OfflineDataset

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
"""Nobody asked for a report; where it could not be made, the sentence says why."""


REAL_ROWS, SYNTHETIC_ROWS = "real_rows", "synthetic_rows"
"""The entries that count a file's rows: the real ones come first."""
SOURCE_ROWS = "source_rows"
"""How many rows it was made from. Where there are real rows these come first, some perhaps synthetic themselves."""

_OF_MODEL = (KEY, SAYS, "algorithm", "model", "sampling", "seed", "rows_version", "blocks", "flow")
"""The entries that say how synthetic rows were made."""


def of_first(metadata: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The metadata of the first `rows` rows, fewer than all, of a data set: what they say of its rows holds of those.

    Without a row left that the model made nothing is said of how it made them, nor how faithful they were.
    """
    kept = dict(metadata)
    real, made = metadata.get(REAL_ROWS), metadata.get(SYNTHETIC_ROWS)
    if not isinstance(real, int) or not isinstance(made, int):
        return kept
    kept[REAL_ROWS], kept[SYNTHETIC_ROWS] = min(real, rows), max(rows - real, 0)
    if "description" in kept:
        kept["description"] = f"the first {rows} rows of: {kept['description']}"
    source = metadata.get(SOURCE_ROWS)
    if rows <= max(real, source if real and isinstance(source, int) else 0):
        kept = {key: value for key, value in kept.items() if key not in _OF_MODEL}
    return kept


def real_among(metadata: Mapping[str, Any], kept: NDArray[np.bool_]) -> int:
    """How many of a data set's rows, of those `kept` (N,), are real: all where its metadata count none."""
    real = metadata.get(REAL_ROWS)
    counts = isinstance(real, int) and isinstance(metadata.get(SYNTHETIC_ROWS), int)
    return int(kept[: real if counts else None].sum())


def with_episodes(dataset: OfflineDataset) -> OfflineDataset | None:
    """The rows whose episodes have lengths and returns to tell: the real ones, where the others are one episode each.

    None: there are synthetic rows alone, each an episode of its own.
    """
    real, made = dataset.metadata.get(REAL_ROWS), dataset.metadata.get(SYNTHETIC_ROWS)
    if not isinstance(made, int) or made < 1:
        return dataset
    real, rows = real if isinstance(real, int) else 0, len(dataset)
    if 0 < real < rows and (dataset.terminals | dataset.timeouts)[real - 1 : -1].all():
        return dataset.head(real)
    return None if not real and dataset.n_episodes == rows else dataset
