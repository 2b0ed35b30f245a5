"""Transitions as the rows that the diffusion model learns, and back."""

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
    """The map from transitions to rows x = W [s, a, s' - s, r, terminal], standardised and whitened, and its inverse.

    A row has D = 2 O + A + 2 columns, of mean 0 and covariance I on the data.

    A model is off by about as much in every direction of x. So a quantity that varies little, and matters, must be as
    large in x as all others. One is the change s' - s, which is small beside s. Another is the deviation from each
    linear law, such as that between reward and velocity: W enlarges it, since it whitens (ZCA: C^(-1/2), of all
    whitenings the one that leaves columns most like themselves). The paper standardises each column of
    [s, a, s', r, terminal] by itself. `terminal` stays 0 or 1, and W leaves it alone.

    `decode` is the inverse. It takes rows as terminal where that column is above one half, and clips actions to their
    bounds, observations to theirs and to what the data hold, rewards to what the data hold. Where no row of the data is
    terminal, no decoded row is. Rewards that take a few values only, such as 0 and 1, are rounded to the nearest: a
    network's 0.98 is no reward that the task can give.
    """

    scale: Normaliser
    """The mean and the deviation of the D columns, before W."""
    whitening: Tensor
    """W (D, D), symmetric."""
    unwhitening: Tensor
    """The inverse of W (D, D)."""
    observation_size: int
    """The number O of columns of s."""
    action_size: int
    """The number A of columns of a."""
    low: Tensor
    """Lower bounds (D,) of decoded columns."""
    high: Tensor
    """Upper bounds (D,) of decoded columns."""
    reward_values: Tensor
    """The values (K,) of a discrete reward, ascending; none for a continuous one."""
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
        """Fit a codec to transitions, on their device.

        action_bounds, observation_bounds: (low, high), numbers or one a column, that decoded rows stay within.
        stand_ins: see the field. Raises DataError for values that are not finite.
        """
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
            """Lower (i = 0) or upper bounds (D,); `least`, r: of the data's observations and rewards."""
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
        """The lowest and the highest actions, (A,) each."""
        actions = slice(self.observation_size, self.observation_size + self.action_size)
        return self.low[actions], self.high[actions]

    @property
    def size(self) -> int:
        """The number D of columns of a row."""
        return 2 * self.observation_size + self.action_size + 2

    @property
    def causes(self) -> int:
        """How many of the first columns say whether a row is terminal: s, a and, where it is what followed, s'."""
        return self.observation_size + self.action_size + (0 if self.stand_ins else self.observation_size)

    @staticmethod
    def columns(batch: Batch) -> Tensor:
        """The columns [s, a, s', r, terminal] (..., D) of a batch, in the batch's units."""
        flat = (batch.rewards.unsqueeze(-1), batch.terminals.unsqueeze(-1))
        return torch.cat([batch.observations, batch.actions, batch.next_observations, *flat], dim=-1)

    def encode(self, batch: Batch) -> Tensor:
        """The encoded rows x (..., D) of a batch."""
        return self.encode_rows(self.columns(batch))

    def encode_rows(self, rows: Tensor) -> Tensor:
        """The encoded rows x (..., D) of rows (..., D) in the data's units, as `columns` and `decode` give them."""
        return self.standardise(rows) @ self.whitening

    def standardise(self, rows: Tensor) -> Tensor:
        """Rows (..., D) in the data's units with s' - s in the place of s', each column standardised; W comes after."""
        return self.scale(_changes(rows, self.observation_size, self.action_size))

    def decode(self, x: Tensor) -> Tensor:
        """Rows [s, a, s', r, terminal] (..., D) in the data's units, of encoded rows x (..., D)."""
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
        """Set which rows (..., D) are terminal (...); where all of the data's rows are alike in it, so are these."""
        rows[..., -1] = terminal.to(rows.dtype).clamp(self.low[-1], self.high[-1])

    def to(self, device: torch.device | str) -> "RowCodec":
        """The same codec on another device."""
        tensors = {name: getattr(self, name).to(device) for name in _TENSORS}
        return replace(self, scale=self.scale.to(device), **tensors)

    def state_dict(self) -> dict[str, Tensor]:
        """The codec as tensors by name, for safetensors."""
        own = {name: getattr(self, name) for name in _TENSORS}
        sizes = {"sizes": torch.tensor([self.observation_size, self.action_size, int(self.stand_ins)])}
        return own | sizes | {f"scale.{name}": tensor for name, tensor in self.scale.state_dict().items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "RowCodec":
        """The codec whose `state_dict` gave these tensors. Raises KeyError where one is missing."""
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
