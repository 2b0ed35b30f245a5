"""Preferences of one trajectory segment over another: their file, and how to make them from a data set's rewards."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import safe_open

from diffrl.data.offline import OfflineDataset
from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path, reading, regular_file
from diffrl.tuning.values import segment_advantages, segment_returns

Floats = NDArray[np.float32]

FORMAT = "diffrl-preferences-1"
"""The entry `format` of a file's header."""
_COLUMNS = ("observations_w", "actions_w", "observations_l", "actions_l")
_KINDS = ("observations", "actions")
_ATTEMPTS = 100
"""How often pairs of equal worth are drawn again before all segments are taken to be equal."""


@dataclass(frozen=True, eq=False)
class Preferences:
    """N pairs of segments of H steps, the preferred one (w) and the other (l), in the environment's own units.

    As a file: safetensors with these four tensors, float32, and the header entries `format` = diffrl-preferences-1 and
    `about`, JSON of whatever says where they come from.
    """

    observations_w: Floats
    """(N, H, O)"""
    actions_w: Floats
    """(N, H, A)"""
    observations_l: Floats
    """(N, H, O)"""
    actions_l: Floats
    """(N, H, A)"""

    def __post_init__(self) -> None:
        for name in _COLUMNS:
            column = getattr(self, name)
            if column.ndim != 3 or 0 in column.shape:
                raise UserError(f"{name} has shape {column.shape}; expected (pairs, steps, size).")
            if not np.isfinite(column).all():
                raise UserError(f"{name} of pair {np.argwhere(~np.isfinite(column))[0, 0]} is not finite.")
        for kind in _KINDS:
            w, l = getattr(self, f"{kind}_w"), getattr(self, f"{kind}_l")  # noqa: E741
            if w.shape != l.shape or w.shape[:2] != self.observations_w.shape[:2]:
                raise UserError(
                    f"{kind}_w and {kind}_l have shapes {w.shape} and {l.shape}; expected the same of both, and as "
                    f"many pairs and steps as observations_w has, {self.observations_w.shape[:2]}."
                )

    def __len__(self) -> int:
        return len(self.observations_w)

    @property
    def horizon(self) -> int:
        """H, the steps of a segment."""
        return int(self.observations_w.shape[1])

    def flipped(self) -> "Preferences":
        """The same pairs with the opposite preferences."""
        return Preferences(self.observations_l, self.actions_l, self.observations_w, self.actions_w)

    def check_sizes(self, observation_size: int, action_size: int, source: str) -> None:
        """Raise UserError unless the columns are of these sizes. `source` is named in it."""
        sizes = self.observations_w.shape[2], self.actions_w.shape[2]
        if sizes != (observation_size, action_size):
            raise UserError(
                f"{source} holds observations of {sizes[0]} and actions of {sizes[1]} dimensions; the run's have "
                f"{observation_size} and {action_size}."
            )

    def check_preferred(self, source: str) -> None:
        """Raise UserError where both segments of every pair are the same: nothing is preferred. `source` is named."""
        if all(np.array_equal(getattr(self, f"{kind}_w"), getattr(self, f"{kind}_l")) for kind in _KINDS):
            raise UserError(
                f"In {source} the preferred segment of each of the {len(self)} pairs is the other one too, so there is "
                "nothing to learn; expected two segments that differ."
            )

    def write(self, path: Path | str, about: dict[str, object] | None = None) -> Path:
        """Write the pairs to a safetensors file and give its path. about: where they come from, kept in its header."""
        tensors = {name: np.ascontiguousarray(getattr(self, name), np.float32) for name in _COLUMNS}
        header = {"format": FORMAT, "about": json.dumps(about or {})}
        with atomic_path(path) as temporary:
            safetensors.numpy.save_file(tensors, temporary, metadata=header)
        return Path(path)

    @classmethod
    def read(cls, path: Path | str) -> "Preferences":
        """Read the pairs in a file that `write` made. Raises UserError where it is not one."""
        path = Path(path)
        if not path.exists():
            raise UserError(f"There is no file of preferences {path}; `--preferences auto` makes them from the data.")
        regular_file(path, "a file of preferences")
        with reading(f"{path} is not a safetensors file"), safe_open(path, "np") as file:
            header, names = file.metadata() or {}, set(file.keys())
            if header.get("format") != FORMAT or not names.issuperset(_COLUMNS):
                raise UserError(
                    f"{path} is not a file of preferences: expected the format {FORMAT} and the tensors "
                    f"{', '.join(_COLUMNS)}, as `diffrl.tuning.preferences.Preferences.write` has them."
                )
            columns = [file.get_tensor(name).astype(np.float32) for name in _COLUMNS]
        try:
            return cls(*columns)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error


def label_segments(
    dataset: OfflineDataset,
    pairs: int,
    segment: int,
    seed: int,
    *,
    by: Literal["advantage", "return"] = "advantage",
    discount: float = 0.99,
    temperature: float = 0.0,
    label_noise: float = 0.0,
) -> Preferences:
    """Draw pairs of segments from a data set's episodes and prefer the better one of each.

    by: what a segment's worth J is, its undiscounted return, or how much better it went than its start promised
    (`segment_advantages`, with `discount`). The latter is what the loss means: contrastive preference learning models
    preferences by regret. By returns, whatever is done where little can be earned, as at the start of an episode, is
    dispreferred.

    The segments start anywhere from which `segment` steps are left in the episode (and, for advantages, the state after
    them is known), uniformly. The first is preferred with probability sigmoid((J_1 - J_2) / temperature) (Bradley &
    Terry 1952); at temperature 0 the one with the larger J is, and pairs of equal ones, which say nothing, are drawn
    again. Then a share `label_noise` of the labels is swapped. Raises UserError where no episode is long enough, or
    where (almost) all segments are of equal worth.
    """
    rng = np.random.default_rng((seed, 0x9EF))
    starts = np.concatenate([np.arange(a, b - segment + 1) for a, b in dataset.episodes()])
    if by == "advantage" and len(starts):
        starts = starts[dataset.successors()[1][starts + segment - 1]]
    if len(starts) < 2:
        longest = int(dataset.episode_lengths().max(initial=0))
        raise UserError(f"--segment is {segment}, and the longest episode has {longest} steps; expected fewer.")
    if by == "advantage":
        worth = segment_advantages(dataset, starts, segment, discount, seed)
    else:
        worth = segment_returns(dataset, starts, segment, 1.0)
    drawn = rng.integers(len(starts), size=(pairs, 2))
    for _ in range(_ATTEMPTS):
        J = worth[drawn]
        equal = np.isclose(J[:, 0], J[:, 1], rtol=1e-9, atol=1e-9) & (temperature == 0)
        if not equal.any():
            break
        drawn[equal] = rng.integers(len(starts), size=(int(equal.sum()), 2))
    else:
        raise UserError(
            f"Of segments of {segment} steps hardly any two differ in {by}, so there is nothing to prefer: try a "
            "longer --segment, or a --temperature above 0."
        )
    gap = J[:, 0] - J[:, 1]
    # (1 + tanh(x / 2)) / 2 is the logistic function, and overflows nowhere.
    chance = (1 + np.tanh(gap / temperature / 2)) / 2 if temperature > 0 else (gap > 0).astype(np.float64)
    first = rng.random(pairs) < chance
    first ^= rng.random(pairs) < label_noise
    w, l = starts[np.where(first, drawn.T, drawn.T[::-1])]  # noqa: E741
    steps = np.arange(segment)
    rows = {"w": w[:, None] + steps, "l": l[:, None] + steps}
    columns = [getattr(dataset, kind)[rows[side]] for side in "wl" for kind in _KINDS]
    return Preferences(*columns)
