"""Between transitions and the rows that the diffusion model learns."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from diffrl.data.preprocessing import Normaliser
from diffrl.data.transitions import Batch, Transitions
from diffrl.support.errors import DataError

FEW_VALUES = 16
"""Rewards with no more values than this are taken as discrete: generated ones are rounded to the nearest."""

_TENSORS = ("whitening", "unwhitening", "low", "high", "reward_values")
_LEAST_VARIANCE = 1e-4
"""Directions of less (a constant column, a linear law) are amplified no further: there is only rounding in them."""


@dataclass(frozen=True, eq=False)
class RowCodec:
    """x = W [s, a, s' - s, r, terminal] standardised, D = 2 O + A + 2 columns: of mean 0 and covariance I on the data.

    A model is off by about as much in every direction of x. So what varies little, and matters, is to be as large there
    as all else: the change s' - s beside s, and after W, which whitens (ZCA: C^(-1/2), the rotation that leaves columns
    most like themselves), the deviation from every linear law, such as that of the reward from the velocity. Published
    is [s, a, s', r, terminal], each column by itself. `terminal` stays 0 or 1, apart.

    `decode` undoes it, thresholds `terminal` at one half, and clips: actions to their bounds, all else to what the data
    hold (and observations to their bounds); of data without an end no row is one. Rewards that take a few values only,
    such as 0 and 1, are rounded to them: a network's 0.98 is no reward that the task can give.
    """

    scale: Normaliser
    """Of D columns."""
    whitening: Tensor
    """W (D, D), symmetric."""
    unwhitening: Tensor
    """Its inverse."""
    observation_size: int
    """O."""
    action_size: int
    """A."""
    low: Tensor
    """(D) lower bounds of the columns."""
    high: Tensor
    """(D) upper bounds."""
    reward_values: Tensor
    """(K,) the values of a discrete reward, ascending; empty for a continuous one."""
    stand_ins: bool = False
    """Whether s' of terminal rows is not what followed, but s itself."""

    @classmethod
    def fit(
        cls,
        transitions: Transitions,
        action_bounds: tuple[ArrayLike, ArrayLike] = (-1.0, 1.0),
        observation_bounds: tuple[ArrayLike, ArrayLike] = (-np.inf, np.inf),
        stand_ins: bool = False,
    ) -> "RowCodec":
        """The codec of data with these rows, on their device. Raises DataError for values that are not finite."""
        o, a = transitions.observation_size, transitions.action_size
        exact = _changes(cls.columns(transitions.columns).double(), o, a)
        if not bool(torch.isfinite(exact).all()):
            raise DataError("The rows hold values that are not finite; a model cannot learn from these. Remove them.")
        shift, scale = exact.mean(0), exact.std(0, correction=0)
        scale = torch.where(scale > 1e-6 * shift.abs().clamp_min(1e-6), scale, 1.0)  # constant columns stay so
        shift[-1], scale[-1] = 0.0, 1.0
        whitening, unwhitening = _whitening((exact - shift) / scale)

        columns = transitions.columns
        states = torch.cat([columns.observations, columns.next_observations])

        def bounds(i: int, least: Tensor, r: Tensor) -> Tensor:
            """The i-th of the pairs, within which observations have reached `least` and rewards r."""
            given, actions = (
                torch.from_numpy(np.broadcast_to(np.asarray(pair[i], np.float32), (n,)).copy()).to(transitions.device)
                for pair, n in ((observation_bounds, o), (action_bounds, a))
            )
            s = torch.maximum(given, least) if i == 0 else torch.minimum(given, least)
            ends = columns.terminals.amin() if i == 0 else columns.terminals.amax()
            return torch.cat([s, actions, s, r[None], ends[None]])

        rewards = columns.rewards
        low, high = bounds(0, states.amin(0), rewards.amin()), bounds(1, states.amax(0), rewards.amax())
        values = torch.unique(rewards[: 100 * FEW_VALUES])
        if len(values) <= FEW_VALUES:  # most rewards need no sorting to be seen to be many
            values = torch.unique(rewards)
        if len(values) > FEW_VALUES:
            values = values[:0]
        normaliser = Normaliser(shift.float(), scale.float())
        return cls(normaliser, whitening.float(), unwhitening.float(), o, a, low, high, values, stand_ins)

    @property
    def action_bounds(self) -> tuple[Tensor, Tensor]:
        """(A,) and (A,)"""
        actions = slice(self.observation_size, self.observation_size + self.action_size)
        return self.low[actions], self.high[actions]

    @property
    def size(self) -> int:
        """D."""
        return 2 * self.observation_size + self.action_size + 2

    @property
    def causes(self) -> int:
        """How many of the first columns say whether a row is terminal: s, a and, where it is what followed, s'."""
        return self.observation_size + self.action_size + (0 if self.stand_ins else self.observation_size)

    @staticmethod
    def columns(batch: Batch) -> Tensor:
        """[s, a, s', r, terminal] of a batch (..., *), side by side and in its own units: (..., D)."""
        flat = (batch.rewards.unsqueeze(-1), batch.terminals.unsqueeze(-1))
        return torch.cat([batch.observations, batch.actions, batch.next_observations, *flat], dim=-1)

    def encode(self, batch: Batch) -> Tensor:
        """The rows x (..., D) of a batch."""
        return self.encode_rows(self.columns(batch))

    def encode_rows(self, rows: Tensor) -> Tensor:
        """x (..., D) of rows as `columns` and `decode` give them."""
        return self.standardise(rows) @ self.whitening

    def standardise(self, rows: Tensor) -> Tensor:
        """`encode_rows` without W."""
        return self.scale(_changes(rows, self.observation_size, self.action_size))

    def decode(self, x: Tensor) -> Tensor:
        """Rows (..., D) in the data's units, in the order of `Transitions`' first D columns."""
        o, following = self.observation_size, self.observation_size + self.action_size
        rows = self.scale.inverse(x @ self.unwhitening)
        rows[..., :o].clamp_(self.low[:o], self.high[:o])
        rows[..., following:-2] += rows[..., :o]
        rows = rows.clamp(self.low, self.high)
        if len(self.reward_values):
            middles = (self.reward_values[1:] + self.reward_values[:-1]) / 2
            rows[..., -2] = self.reward_values[torch.bucketize(rows[..., -2].contiguous(), middles)]
        self.mark(rows, rows[..., -1] > 0.5)
        return rows

    def mark(self, rows: Tensor, terminal: Tensor) -> None:
        """Set which rows (..., D) are terminal (...), so far as the data have such and others."""
        rows[..., -1] = terminal.to(rows.dtype).clamp(self.low[-1], self.high[-1])

    def to(self, device: torch.device | str) -> "RowCodec":
        """The same on another device."""
        tensors = {name: getattr(self, name).to(device) for name in _TENSORS}
        return replace(self, scale=self.scale.to(device), **tensors)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors by name, for safetensors."""
        own = {name: getattr(self, name) for name in _TENSORS}
        sizes = {"sizes": torch.tensor([self.observation_size, self.action_size, int(self.stand_ins)])}
        return own | sizes | {f"scale.{name}": tensor for name, tensor in self.scale.state_dict().items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "RowCodec":
        """The inverse of `state_dict`."""
        scale = Normaliser(state["scale.shift"], state["scale.scale"])
        o, a, stand_ins = (int(size) for size in state["sizes"])
        tensors = {name: state[name] for name in _TENSORS}
        return cls(scale, observation_size=o, action_size=a, stand_ins=bool(stand_ins), **tensors)


def _changes(rows: Tensor, o: int, a: int) -> Tensor:
    """Rows [s, a, s', r, terminal] with s' - s in the place of s'."""
    return torch.cat([rows[..., : o + a], rows[..., o + a : -2] - rows[..., :o], rows[..., -2:]], dim=-1)


def _whitening(x: Tensor) -> tuple[Tensor, Tensor]:
    """C^(-1/2) and C^(1/2), of the covariance C of standardised rows (N, D); the last column is left alone."""
    covariance = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    part = x[:, :-1]
    covariance[:-1, :-1] = part.mT @ part / len(part)
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(_LEAST_VARIANCE)
    return (vectors * values**-0.5) @ vectors.mT, (vectors * values**0.5) @ vectors.mT
