"""Segments: H consecutive rows of one episode, drawn as one gather on the training device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffrl.data.offline import OfflineDataset
from diffrl.data.transitions import Transitions
from diffrl.support.errors import DataError

Ints = npt.NDArray[np.int64]


class Segments(NamedTuple):
    """Segments of H rows, drawn for S seeds, B each (or of any other leading shape that was asked for)."""

    observations: Tensor
    """(S, B, H, O)"""
    actions: Tensor
    """(S, B, H, A)"""
    rewards: Tensor
    """(S, B, H)"""
    mask: Tensor
    """(S, B, H) 1.0 where a row belongs to the episode; 0.0 behind its end, where its last row is repeated"""
    starts: Tensor
    """(S, B) the segments' ids: the rows of the data set at which they start, int64"""


@dataclass(frozen=True, eq=False)
class Windows:
    """Where segments of `horizon` rows may start: W places, each with the last row of its episode."""

    starts: Ints
    """(W,) the first row, increasing: the segments' ids."""
    lasts: Ints
    """(W,) the last row of the start's episode."""
    horizon: int
    """H, rows of a segment."""

    @classmethod
    def of(cls, episodes: Ints, horizon: int, *, pad: bool = False) -> Windows:
        """All windows of `episodes` (E, 2): the first row and one past the last of each (`OfflineDataset.episodes`).

        pad=False: an episode of L rows has max(L - H + 1, 0) windows, which all lie within it. pad=True: every row
        starts one, and a window that runs over the end repeats the last row.

        Raises DataError where there is none, and where H > 1 and every episode is a single row.
        """
        first, stop = _checked(episodes, horizon)
        count = stop - first if pad else (stop - first - horizon + 1).clip(min=0)
        if not count.any():
            longest = int((stop - first).max())
            raise DataError(
                f"No episode has the {horizon:,} rows of a segment: the longest of {len(first):,} has {longest:,}. "
                f"Ask for segments of at most {longest:,} rows."
            )
        ordinal = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
        return cls(np.repeat(first, count) + ordinal, np.repeat(stop - 1, count), horizon)

    @classmethod
    def whole(cls, episodes: Ints, horizon: int | None = None) -> Windows:
        """One window an episode, from its first row: of `horizon` rows, or as many as the longest episode has.

        A shorter episode's last row is repeated; what is longer is cut. Raises DataError as `of` does.
        """
        horizon = int((episodes[:, 1] - episodes[:, 0]).max(initial=1)) if horizon is None else horizon
        first, stop = _checked(episodes, horizon)
        return cls(first, stop - 1, horizon)

    def __len__(self) -> int:
        return len(self.starts)


def _checked(episodes: Ints, horizon: int) -> tuple[Ints, Ints]:
    """First rows (E,) and rows past the last (E,) of episodes from which segments of `horizon` rows can come."""
    if horizon < 1:
        raise DataError(f"a segment has {horizon} rows; expected at least 1")
    if len(episodes) == 0:
        raise DataError("These data have no rows, and so no segments.")
    first, stop = episodes[:, 0], episodes[:, 1]
    if horizon > 1 and (stop - first).max() == 1:
        raise DataError(
            f"These data have no episodes: each of {len(first):,} rows is one of its own, as in generated transitions. "
            "Take segments from the data set that they were made from."
        )
    return first, stop


class SegmentSource:
    """A data set's segments on the training device: a `data.transitions.Source` of `Segments`.

    The rows are held once, and a batch is gathered from them: windows are never copied. Draws look at no tensor's value
    and have static shapes, so that they can be captured.
    """

    def __init__(self, rows: Tensor, rewards: Tensor, observation_size: int, windows: Windows) -> None:
        """rows: (N, O + A) observations and actions; rewards: (N,); both on the training device."""
        self.rows, self.rewards, self.observation_size = rows, rewards, observation_size
        self.windows = windows
        self._starts = torch.from_numpy(windows.starts).to(rows.device)
        self._lasts = torch.from_numpy(windows.lasts).to(rows.device)
        self._offsets = torch.arange(windows.horizon, device=rows.device)

    @classmethod
    def from_dataset(
        cls, dataset: OfflineDataset, windows: Windows | int, device: torch.device | str = "cpu", *, pad: bool = False
    ) -> SegmentSource:
        """The segments of all rows of `dataset`. windows: which, or H for `Windows.of(dataset.episodes(), H, pad=pad)`.

        Raises DataError as `Windows.of` does.
        """
        if isinstance(windows, int):
            windows = Windows.of(dataset.episodes(), windows, pad=pad)
        rows = np.concatenate([dataset.observations, dataset.actions], axis=1, dtype=np.float32)
        rewards = torch.from_numpy(np.asarray(dataset.rewards, np.float32)).to(device)
        return cls(torch.from_numpy(rows).to(device), rewards, dataset.observation_size, windows)

    @classmethod
    def from_transitions(cls, transitions: Transitions, horizon: int, *, pad: bool = False) -> SegmentSource:
        """The segments of `transitions`, whose memory is shared; ids count its rows.

        Those can be fewer than the data set's: see `Transitions.from_dataset`. Raises DataError as `Windows.of` does.
        """
        columns = transitions.columns
        numbers, steps = columns.episodes.cpu().numpy(), columns.steps.cpu().numpy()
        cut = np.flatnonzero((numbers[1:] != numbers[:-1]) | (steps[1:] != steps[:-1] + 1)) + 1
        episodes = np.stack([np.append(0, cut), np.append(cut, len(transitions))], axis=1)
        size = transitions.observation_size
        rows = transitions.rows[:, : size + transitions.action_size]
        return cls(rows, columns.rewards, size, Windows.of(episodes, horizon, pad=pad))

    def __len__(self) -> int:
        """W, the number of windows."""
        return len(self.windows)

    @property
    def device(self) -> torch.device:
        """The device that the rows are on."""
        return self.rows.device

    @property
    def horizon(self) -> int:
        """H, rows of a segment."""
        return self.windows.horizon

    def draw(self, batch_size: int, n_seeds: int = 1, generator: torch.Generator | None = None) -> Segments:
        """Draw B = `batch_size` windows for each of S = `n_seeds` seeds, uniformly and with replacement.

        One call draws the (S, B) numbers for the whole stack from `generator`, which lives on `device`.
        """
        return self.gather(torch.randint(len(self), (n_seeds, batch_size), generator=generator, device=self.device))

    def gather(self, numbers: Tensor) -> Segments:
        """The segments of the windows with these numbers, 0 to W - 1, of any shape: (*shape, H, ...)."""
        shape, flat = numbers.shape, numbers.reshape(-1)
        starts, lasts = self._starts[flat], self._lasts[flat]
        places = starts[:, None] + self._offsets
        index = torch.minimum(places, lasts[:, None]).flatten()
        rows = self.rows.index_select(0, index).view(*shape, self.horizon, -1)
        rewards = self.rewards.index_select(0, index).view(*shape, self.horizon)
        mask = (places <= lasts[:, None]).to(rewards.dtype).view(rewards.shape)
        o = self.observation_size
        return Segments(rows[..., :o], rows[..., o:], rewards, mask, starts.view(shape))
