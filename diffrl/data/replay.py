"""Transitions that grow while one trains: a replay buffer for S seeds, and batches mixed from several sources."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffrl.data.transitions import Batch, RowSource, Transitions


class ReplayBuffer:
    """A ring of `capacity` rows for each of S seeds, in the layout of `Transitions`; the oldest are overwritten.

    All seeds are given rows at the same time, so they hold equally many. Shapes never change, and the number of rows
    to draw from is a tensor: a captured step, when it is replayed, draws from all rows there are then.
    """

    def __init__(
        self,
        n_seeds: int,
        capacity: int,
        observation_size: int,
        action_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        if capacity < 1:
            raise ValueError(f"a buffer's capacity is {capacity}; expected at least 1")
        self.n_seeds, self.capacity = n_seeds, capacity
        width = 2 * observation_size + action_size + 4
        self._flat = Transitions(torch.zeros(n_seeds * capacity, width, device=device), observation_size, action_size)
        self._first = capacity * torch.arange(n_seeds, device=device)[:, None]
        self._filled = 0
        self._size = torch.zeros((), dtype=torch.float64, device=device)
        self._next = 0

    @property
    def _rows(self) -> Tensor:
        """(S, capacity, W); made when asked for, so that a copy of the buffer is a buffer."""
        return self._flat.rows.view(self.n_seeds, self.capacity, -1)

    def __len__(self) -> int:
        """The number of rows of each seed."""
        return self._filled

    @property
    def rows(self) -> Tensor:
        """(S, len, W) the rows there are, in the ring's own order; a view."""
        return self._rows[:, : self._filled]

    @property
    def columns(self) -> Batch:
        """The rows by column: observations (S, len, O), rewards (S, len), ... Views, no copy."""
        return self._flat.view(self.rows)

    def add(self, rows: Tensor) -> None:
        """Add rows (S, n, W), oldest first. Where there is no room they overwrite the oldest rows.

        Of more than `capacity` rows the last ones are kept.
        """
        rows = rows[:, -self.capacity :]
        n = rows.shape[1]
        head = min(n, self.capacity - self._next)
        self._rows[:, self._next : self._next + head] = rows[:, :head]
        self._rows[:, : n - head] = rows[:, head:]
        self._next = (self._next + n) % self.capacity
        if self._filled < self.capacity:
            self._filled = min(self._filled + n, self.capacity)
            self._size.fill_(self._filled)

    def clear(self) -> None:
        """Forget all rows."""
        self._filled = self._next = 0
        self._size.zero_()

    def draw(self, batch_size: int, n_seeds: int | None = None, generator: torch.Generator | None = None) -> Batch:
        """Draw B = `batch_size` rows for each of the S seeds from its own rows, uniformly and with replacement.

        Raises ValueError where nothing has been added yet, or for another number of seeds.
        """
        return self.view(self.draw_rows(batch_size, n_seeds, generator))

    def view(self, rows: Tensor) -> Batch:
        """The batch whose columns are views of rows (..., W); no copy."""
        return self._flat.view(rows)

    def draw_rows(
        self, batch_size: int, n_seeds: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw the rows (S, B, W) of a batch: the same rows as `draw`, as one tensor."""
        if not self._filled:
            raise ValueError("the replay buffer is empty; expected rows to draw from")
        if n_seeds not in (None, self.n_seeds):
            raise ValueError(f"the replay buffer holds the rows of {self.n_seeds} seeds, {n_seeds} were asked for")
        shape = (self.n_seeds, batch_size)
        # In double precision u < 1 gives floor(u n) < n for every n, and each row to within 2**-53 its due.
        u = torch.rand(shape, dtype=torch.float64, generator=generator, device=self._rows.device)
        return self._flat.gather_rows((u * self._size).long() + self._first)

    def state_dict(self) -> dict[str, Tensor]:
        """`rows`, those there are (S, len, W) in the ring's order, and `next`, the place of the next one: ()."""
        return {"rows": self.rows, "next": torch.tensor(self._next)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state_dict`. Raises ValueError where it has other seeds, another width or too many rows."""
        rows = state["rows"]
        if (rows.shape[0], rows.shape[2]) != (self.n_seeds, self._rows.shape[2]) or rows.shape[1] > self.capacity:
            raise ValueError(
                f"the replay buffer's rows have shape {tuple(rows.shape)}, expected ({self.n_seeds}, up to "
                f"{self.capacity}, {self._rows.shape[2]})"
            )
        self._filled = rows.shape[1]
        # A buffer that was full and has grown since goes on at its end.
        self._next = int(state["next"]) if self._filled == self.capacity else self._filled
        self._rows[:, : self._filled] = rows
        self._size.fill_(self._filled)


class MixedSource:
    """Batches of which every source gives a fixed share of the rows, in the order of the sources.

    Each batch holds exactly the shares, to the nearest row (the largest remainders win). A source without a row in the
    batch is never asked.
    """

    def __init__(self, sources: Sequence[RowSource], shares: Sequence[float]) -> None:
        if len(sources) != len(shares) or not shares:
            raise ValueError(f"{len(sources)} sources and {len(shares)} shares; expected one share a source")
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"the shares are {list(shares)}; expected numbers from 0 up whose sum is 1")
        self.sources, self.shares = tuple(sources), tuple(shares)

    def counts(self, batch_size: int) -> list[int]:
        """Rows from each source in a batch of B = `batch_size`."""
        return row_counts(batch_size, self.shares)

    def draw(self, batch_size: int, n_seeds: int = 1, generator: torch.Generator | None = None) -> Batch:
        """Draw B = `batch_size` transitions for each of S = `n_seeds` seeds: (S, B, ...).

        Its columns are views of one tensor of rows, as those of every other batch: a compiler sees no difference.
        """
        return self.view(self.draw_rows(batch_size, n_seeds, generator))

    def draw_rows(self, batch_size: int, n_seeds: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Draw the rows (S, B, W) of a batch: the same rows as `draw`, as one tensor."""
        pairs = zip(self.sources, self.counts(batch_size), strict=True)
        parts = [source.draw_rows(n, n_seeds, generator) for source, n in pairs if n]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def view(self, rows: Tensor) -> Batch:
        """The batch whose columns are views of rows (..., W); no copy."""
        return self.sources[0].view(rows)


def row_counts(batch_size: int, shares: Sequence[float]) -> list[int]:
    """How many of `batch_size` rows each share is, to the nearest row: the largest remainders win.

    shares: their sum is 1.
    """
    exact = [share * batch_size for share in shares]
    counts = [int(value + 1e-9) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: batch_size - sum(counts)]:
        counts[i] += 1
    return counts
