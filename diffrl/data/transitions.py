"""A data set on the training device: one row tensor, one gather a batch."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from typing_extensions import TypeVar

from diffrl.data.offline import OfflineDataset
from diffrl.support.errors import DataError


class Batch(NamedTuple):
    """Transitions drawn for S seeds, B each: views of one gathered tensor."""

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


BatchT_co = TypeVar("BatchT_co", covariant=True, default=Batch)


class Source(Protocol[BatchT_co]):
    """What training draws its batches from: a data set, a replay buffer, a mixture of them, pairs of segments.

    A batch is of the type `BatchT_co`, by default transitions, `Batch`: a tuple of tensors whose first axes are (S, B).
    """

    def draw(self, batch_size: int, n_seeds: int = 1, generator: torch.Generator | None = None) -> BatchT_co:
        """Draw a batch of B = `batch_size` examples for each of S = `n_seeds` seeds."""


class RowSource(Source[Batch], Protocol):
    """A source of transitions whose batches are views of row tensors, which can be joined."""

    def draw_rows(self, batch_size: int, n_seeds: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """The rows (S, B, W) of a batch."""

    def view(self, rows: Tensor) -> Batch:
        """Name the columns of rows (..., W); no copy."""


@dataclass(frozen=True, eq=False)
class Transitions:
    """N transitions as one float32 tensor (N, W) with named column slices, W = 2 O + A + 4.

    The columns, in this order: observations, actions, next_observations, rewards, terminals, episodes, steps.
    Rows keep the order of the data set, so that a row's successor within its episode is the next row. Episode
    numbers and times are exact up to 2**24.
    """

    rows: Tensor
    """(N, W) on the training device."""
    observation_size: int
    """O."""
    action_size: int
    """A."""

    @classmethod
    def from_dataset(cls, dataset: OfflineDataset, device: torch.device | str = "cpu") -> Transitions:
        """Put every row whose successor is known on `device`.

        Terminal rows stay. Rows that were cut off (a timeout, the last row) stay where the data set holds their next
        observation: each is then a whole transition, from which to bootstrap as from any other. D4RL's
        `qlearning_dataset` drops them even then. Raises DataError where no row is left.
        """
        next_observations, known = dataset.successors()
        if not known.any():
            raise DataError(
                f"None of the {len(dataset)} rows has a known successor: every row is a timeout or the last one, and "
                "the data set holds no next_observations. Check its `timeouts`."
            )
        episodes, steps = dataset.episode_indices()
        flat = (dataset.rewards, dataset.terminals, episodes, steps)
        columns = [dataset.observations, dataset.actions, next_observations, *(column[:, None] for column in flat)]
        width = sum(column.shape[1] for column in columns)
        rows = np.empty((int(known.sum()), width), np.float32)
        start = 0
        for column in columns:
            rows[:, start : start + column.shape[1]] = column[known]
            start += column.shape[1]
        return cls(torch.from_numpy(rows).to(device), dataset.observation_size, dataset.action_size)

    @contextmanager
    def shared(self) -> Iterator[int]:
        """Move the rows (on the CPU) to a temporary file that other processes can map, so that memory holds them once.

        Yields the file's descriptor. The file has no name: it is gone with the last process that has it open or mapped,
        however that process ends. Raises OSError where the temporary folder has no room.
        """
        with tempfile.TemporaryFile(prefix="diffrl-") as file:
            self.rows.numpy().tofile(file)
            file.flush()
            self.rows.data = self.mapped(file.fileno(), self.observation_size, self.action_size).rows
            yield file.fileno()

    @classmethod
    def mapped(cls, descriptor: int, observation_size: int, action_size: int) -> Transitions:
        """The transitions in the file of `shared`, in memory shared with the other processes that map it."""
        # Copy on write: nobody writes to the rows, and PyTorch wants memory that could be written to.
        memory = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
        rows = torch.frombuffer(memory, dtype=torch.float32).view(-1, 2 * observation_size + action_size + 4)
        return cls(rows, observation_size, action_size)

    def __len__(self) -> int:
        return self.rows.shape[0]

    @property
    def device(self) -> torch.device:
        """The device that the rows are on."""
        return self.rows.device

    def to(self, device: torch.device | str) -> Transitions:
        """The same transitions on another device."""
        return replace(self, rows=self.rows.to(device))

    def view(self, rows: Tensor) -> Batch:
        """Name the columns of a tensor (..., W) of rows; no copy."""
        o, a = self.observation_size, self.action_size
        return Batch(
            observations=rows[..., :o],
            actions=rows[..., o : o + a],
            next_observations=rows[..., o + a : 2 * o + a],
            rewards=rows[..., -4],
            terminals=rows[..., -3],
            episodes=rows[..., -2],
            steps=rows[..., -1],
        )

    @property
    def columns(self) -> Batch:
        """All N rows by column, without the seed axis: observations (N, O), rewards (N,), ... Views, no copy."""
        return self.view(self.rows)

    def gather(self, indices: Tensor) -> Batch:
        """The batch of the rows at `indices` (any shape), in one `index_select`."""
        return self.view(self.gather_rows(indices))

    def gather_rows(self, indices: Tensor) -> Tensor:
        """The rows (..., W) at `indices` (any shape), in one `index_select`."""
        return self.rows.index_select(0, indices.reshape(-1)).view(*indices.shape, -1)

    def draw(self, batch_size: int, n_seeds: int = 1, generator: torch.Generator | None = None) -> Batch:
        """Draw B = `batch_size` rows for each of S = `n_seeds` seeds, uniformly and with replacement.

        One call draws the (S, B) indices for the whole stack from `generator`, which lives on `device`: a stack with
        its list of seeds reproduces itself, and seed i alone draws other rows than as part of a stack.
        """
        return self.view(self.draw_rows(batch_size, n_seeds, generator))

    def draw_rows(self, batch_size: int, n_seeds: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """The rows (S, B, W) of `draw`."""
        indices = torch.randint(len(self), (n_seeds, batch_size), generator=generator, device=self.device)
        return self.gather_rows(indices)

    def map(
        self,
        observations: Callable[[Tensor], Tensor] | None = None,
        rewards: Callable[[Tensor], Tensor] | None = None,
    ) -> Transitions:
        """New transitions with a function applied to the rewards (N,) and one to the observations (N, O).

        The latter is applied to observations and next observations alike. Shapes must stay as they are. For normalisers
        and the tuning of rewards.
        """
        new = replace(self, rows=self.rows.clone())
        columns = new.columns
        if rewards is not None:
            columns.rewards.copy_(rewards(columns.rewards))
        if observations is not None:
            columns.observations.copy_(observations(columns.observations))
            columns.next_observations.copy_(observations(columns.next_observations))
        return new


def episode_returns(rewards: Tensor, episodes: Tensor) -> tuple[Tensor, Tensor]:
    """The sums (E,) of rewards (N,) over each episode, in double precision, and the index (N,) of each row's sum.

    episodes: (N,), the number of each reward's episode; the numbers may have gaps.
    """
    _, number = torch.unique(episodes, return_inverse=True)
    returns = torch.zeros(int(number.max()) + 1, dtype=torch.float64, device=rewards.device)
    return returns.index_add_(0, number, rewards.double()), number
