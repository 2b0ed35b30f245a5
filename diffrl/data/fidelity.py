"""What a data set says of the synthetic rows in it: the verdict on their fidelity, from when they were made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
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


REAL_ROWS, SYNTHETIC_ROWS = "real_rows", "synthetic_rows"
"""The entries that count a file's rows: the real ones come first."""

_OF_MODEL = (KEY, SAYS, "algorithm", "model", "sampling", "seed", "rows_version")
"""The entries that say how synthetic rows were made."""


def of_first(metadata: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The metadata of the first `rows` rows, fewer than all, of a data set: what they say of its rows holds of those.

    Without a synthetic row left nothing is said of how the others were made, nor how faithful they were.
    """
    kept = dict(metadata)
    real, made = metadata.get(REAL_ROWS), metadata.get(SYNTHETIC_ROWS)
    if not isinstance(real, int) or not isinstance(made, int):
        return kept
    kept[REAL_ROWS], kept[SYNTHETIC_ROWS] = min(real, rows), max(rows - real, 0)
    if "description" in kept:
        kept["description"] = f"the first {rows} rows of: {kept['description']}"
    if rows <= real:
        kept = {key: value for key, value in kept.items() if key not in _OF_MODEL}
    return kept


def with_episodes(dataset: OfflineDataset) -> OfflineDataset | None:
    """The rows whose episodes have lengths and returns to tell: the real ones, where the others are one episode each.

    None: every row is an episode of its own.
    """
    real, rows = dataset.metadata.get(REAL_ROWS), len(dataset)
    if rows > 1 and dataset.n_episodes == rows:
        return None
    ends = dataset.terminals | dataset.timeouts
    if isinstance(real, int) and 0 < real < rows - 1 and ends[real - 1 : -1].all():
        return dataset.head(real)
    return dataset
