"""Transitions with the action that the data took next, (s, a, r, s', a'), for targets that are held to the data."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from diffrl.data.transitions import Batch, Transitions


class SuccessiveBatch(NamedTuple):
    """A `Batch`, and what the data did in the next state."""

    observations: Tensor
    """(S, B, O)"""
    actions: Tensor
    """(S, B, A)"""
    rewards: Tensor
    """(S, B)"""
    next_observations: Tensor
    """(S, B, O); meaningless, though finite, where `terminals` is 1"""
    terminals: Tensor
    """(S, B) 1.0 at a true end of the episode, else 0.0"""
    episodes: Tensor
    """(S, B) the episode's number in the data set, as a float"""
    steps: Tensor
    """(S, B) the time within the episode, from 0, as a float"""
    next_actions: Tensor
    """(S, B, A) the action of the episode's next row; that of this row where there is none"""
    succeeded: Tensor
    """(S, B) 1.0 where the episode has a next row, else 0.0: at its end, or where it was cut off"""


AnyBatch: TypeAlias = Batch | SuccessiveBatch
"""Transitions with or without what the data did next."""


class SuccessiveSource:
    """The `Transitions` with their next actions, a `data.transitions.Source`. The memory of the rows is shared.

    Rows, and the random numbers that choose them, are those of `Transitions.draw`.
    """

    def __init__(self, transitions: Transitions) -> None:
        self.transitions = transitions
        columns = transitions.columns
        same = (columns.episodes[1:] == columns.episodes[:-1]) & (columns.steps[1:] == columns.steps[:-1] + 1)
        self._succeeded = torch.cat([same, same.new_zeros(1)]).to(transitions.rows.dtype)

    def draw(self, batch_size: int, n_seeds: int = 1, generator: torch.Generator | None = None) -> SuccessiveBatch:
        """Draw B = `batch_size` rows for each of S = `n_seeds` seeds, uniformly and with replacement."""
        transitions = self.transitions
        shape = (n_seeds, batch_size)
        indices = torch.randint(len(transitions), shape, generator=generator, device=transitions.device)
        succeeded = self._succeeded.index_select(0, indices.flatten())
        following = indices.flatten() + succeeded.long()
        next_actions = transitions.columns.actions.index_select(0, following).view(*shape, -1)
        return SuccessiveBatch(*transitions.gather(indices), next_actions, succeeded.view(shape))
