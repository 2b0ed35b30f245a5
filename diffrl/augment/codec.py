"""Between transitions and the rows that the diffusion model learns."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from diffrl.data.normalise import Normaliser
from diffrl.data.transitions import Batch, Transitions

FEW_VALUES = 16
"""Rewards with no more values than this are taken as discrete: generated ones are rounded to the nearest."""


@dataclass(frozen=True, eq=False)
class RowCodec:
    """x = [s, a, s' - s, r, terminal], D = 2 O + A + 2 columns, standardised but for `terminal`, which stays 0 or 1.

    The change s' - s has a scale of its own, often a small one: a model that is off by a hundredth of each column's
    deviation is then off by a hundredth of a step, not of all there is between one end of the data and the other.
    (Published: s' itself.) `decode` undoes it, thresholds `terminal` at one half, and clips: actions to their bounds, observations and rewards
    to what the data hold (and observations to their bounds). Rewards that take a few values only, such as 0 and 1, are
    rounded to them: a network's 0.98 is no reward that the task can give.
    """

    scale: Normaliser
    """Of D columns."""
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
        """The codec of data with these rows, on their device."""
        o, a = transitions.observation_size, transitions.action_size
        exact = _changes(cls.columns(transitions.columns).double(), o, a)
        shift, scale = exact.mean(0), exact.std(0, correction=0)
        scale = torch.where(scale > 1e-6 * shift.abs().clamp_min(1e-6), scale, 1.0)  # constant columns stay so
        shift[-1], scale[-1] = 0.0, 1.0

        columns = transitions.columns
        states = torch.cat([columns.observations, columns.next_observations])

        def bounds(i: int, least: Tensor, r: Tensor) -> Tensor:
            """The i-th of the pairs, within which observations have reached `least` and rewards r."""
            given, actions = (
                torch.from_numpy(np.broadcast_to(np.asarray(pair[i], np.float32), (n,)).copy()).to(transitions.device)
                for pair, n in ((observation_bounds, o), (action_bounds, a))
            )
            s = torch.maximum(given, least) if i == 0 else torch.minimum(given, least)
            return torch.cat([s, actions, s, r[None], r.new_full((1,), float(i))])

        rewards = columns.rewards
        low, high = bounds(0, states.amin(0), rewards.amin()), bounds(1, states.amax(0), rewards.amax())
        values = torch.unique(rewards[: 100 * FEW_VALUES])
        if len(values) <= FEW_VALUES:  # most rewards need no sorting to be seen to be many
            values = torch.unique(rewards)
        if len(values) > FEW_VALUES:
            values = values[:0]
        return cls(Normaliser(shift.float(), scale.float()), o, a, low, high, values, stand_ins)

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
        return self.scale(_changes(rows, self.observation_size, self.action_size))

    def decode(self, x: Tensor) -> Tensor:
        """Rows (..., D) in the data's units, in the order of `Transitions`' first D columns."""
        o, following = self.observation_size, self.observation_size + self.action_size
        rows = self.scale.inverse(x)
        rows[..., :o].clamp_(self.low[:o], self.high[:o])
        rows[..., following:-2] += rows[..., :o]
        rows = rows.clamp(self.low, self.high)
        if len(self.reward_values):
            middles = (self.reward_values[1:] + self.reward_values[:-1]) / 2
            rows[..., -2] = self.reward_values[torch.bucketize(rows[..., -2].contiguous(), middles)]
        rows[..., -1] = (rows[..., -1] > 0.5).to(rows.dtype)
        return rows

    def to(self, device: torch.device | str) -> "RowCodec":
        """The same on another device."""
        low, high, values = (tensor.to(device) for tensor in (self.low, self.high, self.reward_values))
        return replace(self, scale=self.scale.to(device), low=low, high=high, reward_values=values)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors by name, for safetensors."""
        own = {"low": self.low, "high": self.high, "reward_values": self.reward_values}
        sizes = {"sizes": torch.tensor([self.observation_size, self.action_size, int(self.stand_ins)])}
        return own | sizes | {f"scale.{name}": tensor for name, tensor in self.scale.state_dict().items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "RowCodec":
        """The inverse of `state_dict`."""
        scale = Normaliser(state["scale.shift"], state["scale.scale"])
        o, a, stand_ins = (int(size) for size in state["sizes"])
        return cls(scale, o, a, state["low"], state["high"], state["reward_values"], bool(stand_ins))


def _changes(rows: Tensor, o: int, a: int) -> Tensor:
    """Rows [s, a, s', r, terminal] with s' - s in the place of s'."""
    return torch.cat([rows[..., : o + a], rows[..., o + a : -2] - rows[..., :o], rows[..., -2:]], dim=-1)
