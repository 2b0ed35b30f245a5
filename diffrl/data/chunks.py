"""Chunks: H steps of an episode as one transition, for targets that look H steps ahead."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffrl.data.segments import SegmentSource
from diffrl.data.transitions import Transitions
from diffrl.support.errors import DataError


class Chunks(NamedTuple):
    """Steps t to t + H - 1, drawn for S seeds, B each (or of any other leading shape that was asked for).

    Nothing here depends on what stands behind an episode's end in the data.
    """

    observations: Tensor
    """(S, B, O) s_t"""
    actions: Tensor
    """(S, B, H A) a_t to a_{t+H-1}, one after the other, the episode's last repeated behind its end; or (S, B, A), a_t
    alone"""
    rewards: Tensor
    """(S, B) sum_i gamma^i r_{t+i} over the H steps, up to the episode's end"""
    next_observations: Tensor
    """(S, B, O) s_{t+H}; meaningless, though finite, where `terminals` is 1 or `valid` is 0"""
    terminals: Tensor
    """(S, B) 1.0 where the episode truly ends within the H steps, else 0.0"""
    valid: Tensor
    """(S, B) 1.0 where the return is known to its bootstrap or to a true end; 0.0 where the episode is cut before"""
    mask: Tensor
    """(S, B, H) 1.0 where a step belongs to the episode; 0.0 behind its end"""


class ChunkSource:
    """The chunks of `Transitions`, a `data.transitions.Source`: every row starts one. The memory of rows is shared.

    horizon: H. discount: gamma. actions: "all" of a chunk, or its "first" alone, for H-step returns.

    Raises DataError where no episode is as long as a chunk, or the data have no episodes.
    """

    def __init__(self, transitions: Transitions, horizon: int, discount: float, actions: str = "all") -> None:
        self.transitions = transitions
        self._segments = SegmentSource.from_transitions(transitions, horizon, pad=True)
        windows = self._segments.windows
        longest = int((windows.lasts - windows.starts).max()) + 1
        if longest < horizon:
            raise DataError(
                f"No episode has the {horizon:,} steps of a chunk: the longest has {longest:,}. Ask for no more."
            )
        weights = discount ** torch.arange(horizon, dtype=torch.float64)
        self._weights = weights.to(transitions.rows.dtype).to(transitions.device)
        self._first = actions == "first"

    def __len__(self) -> int:
        """N, the number of chunks and of rows."""
        return len(self.transitions)

    def draw(self, batch_size: int, n_seeds: int = 1, generator: torch.Generator | None = None) -> Chunks:
        """Draw B = `batch_size` first rows for each of S = `n_seeds` seeds, uniformly and with replacement.

        The rows, and the random numbers that choose them, are those of `Transitions.draw`.
        """
        shape, device = (n_seeds, batch_size), self.transitions.device
        return self.gather(torch.randint(len(self), shape, generator=generator, device=device))

    def gather(self, rows: Tensor) -> Chunks:
        """The chunks that start at these rows, of any shape."""
        segments = self._segments.gather(rows)  # padded windows start at every row, so their numbers are the rows'
        last = self.transitions.gather(rows + segments.mask.sum(-1).long() - 1)
        return Chunks(
            observations=segments.observations[..., 0, :],
            actions=segments.actions[..., 0, :] if self._first else segments.actions.flatten(-2),
            rewards=(segments.rewards * segments.mask * self._weights).sum(-1),
            next_observations=last.next_observations,
            terminals=last.terminals,
            valid=torch.maximum(segments.mask[..., -1], last.terminals),
            mask=segments.mask,
        )
