"""Between an environment and an agent: observations normalised, actions scaled to [-1, 1], rewards tuned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from diffrl.data.offline import Floats, OfflineDataset, outside_bounds, shown_bounds
from diffrl.data.transitions import Transitions, episode_returns
from diffrl.support.errors import DataError, UserError, counted, nearest

CLIPPED = "clipped_actions"
"""The key in the metadata of data whose actions were clipped: those of how many rows, and to which bounds."""


@dataclass(frozen=True, eq=False)
class Normaliser:
    """z = (x - shift) / scale for every dimension of x (..., O)."""

    shift: Tensor
    """(O,)"""
    scale: Tensor
    """(O,), positive"""

    @classmethod
    def identity(cls, size: int) -> Normaliser:
        """The normaliser that leaves x (..., `size`) as it is."""
        return cls(torch.zeros(size), torch.ones(size))

    @classmethod
    def standard(cls, values: Tensor, eps: float = 1e-3) -> Normaliser:
        """Mean 0 and deviation 1 over the rows of `values` (N, O): shift = mean, scale = std + eps, as in TD3+BC."""
        exact = values.double()
        return cls(exact.mean(0).float(), (exact.std(0, correction=0) + eps).float())

    @classmethod
    def min_max(cls, values: Tensor) -> Normaliser:
        """The range of every dimension of `values` (N, O) becomes [-1, 1]; a constant dimension becomes 0."""
        low, high = values.double().aminmax(dim=0)
        half = (high - low) / 2
        return cls((low + half).float(), torch.where(half > 0, half, 1.0).float())

    def __call__(self, values: Tensor) -> Tensor:
        """z (..., O) from values x (..., O)."""
        return (values - self.shift) / self.scale

    def inverse(self, values: Tensor) -> Tensor:
        """x (..., O) from normalised values (..., O): scale z + shift."""
        return values * self.scale + self.shift

    def to(self, device: torch.device | str) -> Normaliser:
        """This normaliser on another device."""
        return Normaliser(self.shift.to(device), self.scale.to(device))

    def state_dict(self) -> dict[str, Tensor]:
        """The shift and the scale by name, for safetensors."""
        return {"shift": self.shift, "scale": self.scale}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Normaliser:
        """The normaliser that `state_dict` came from."""
        return cls(state["shift"], state["scale"])


def normaliser(name: str, observations: Tensor) -> Normaliser:
    """The normaliser called `name` (identity, standard, min_max), fitted to `observations` (N, O), on their device."""
    makers: dict[str, Callable[[], Normaliser]] = {
        "identity": lambda: Normaliser.identity(observations.shape[1]).to(observations.device),
        "standard": lambda: Normaliser.standard(observations),
        "min_max": lambda: Normaliser.min_max(observations),
    }
    if name not in makers:
        raise UserError(f"Unknown observation normaliser {name!r}: {nearest(name, makers)}")
    return makers[name]()


Range = tuple[float, float]
"""The smallest and the largest return."""
Tuning = Callable[[Tensor, Tensor | None, Range | None], tuple[float, float]]


def _standardised(rewards: Tensor, episodes: Tensor | None, return_range: Range | None) -> tuple[float, float]:
    exact = rewards.double()
    std = exact.std(correction=0)
    if std == 0:
        raise DataError("rewards: all are equal, so `normalize` cannot divide by their deviation; use `no`.")
    return float(exact.mean()), float(std)


def _by_return_range(rewards: Tensor, episodes: Tensor | None, return_range: Range | None) -> tuple[float, float]:
    if return_range is None:
        if episodes is None:
            raise DataError("rewards: `iql_locomotion` needs to know which episode each belongs to.")
        returns, _ = episode_returns(rewards.cpu(), episodes.cpu())
        return_range = float(returns.min()), float(returns.max())
    spread = return_range[1] - return_range[0]
    if spread == 0:
        raise DataError("rewards: all episodes return the same, so `iql_locomotion` cannot divide by their range.")
    return 0.0, spread / 1000


REWARD_TUNING: dict[str, Tuning] = {
    "no": lambda rewards, episodes, return_range: (0.0, 1.0),
    "normalize": _standardised,
    "cql_antmaze": lambda rewards, episodes, return_range: (0.5, 0.25),
    "iql_antmaze": lambda rewards, episodes, return_range: (1.0, 1.0),
    "iql_locomotion": _by_return_range,
}
"""Functions of the data's rewards and their episodes that give shift and scale of (reward - shift) / scale, by name.

They are Diffusion-QL's, by the names of its configurations, and IQL's for MuJoCo, 1000 r / (largest - smallest return).
For training only: scores use the environment's rewards.
"""


def reward_tuning(
    name: str, rewards: Tensor, episodes: Tensor | None = None, return_range: Range | None = None
) -> tuple[float, float]:
    """Shift and scale of the tuning called `name`, a key of `REWARD_TUNING`, for data with these rewards (N,).

    iql_locomotion needs episodes (N,), the number of each reward's episode, or the range of the episodes' returns:
    synthetic rows have lost their episodes, and their metadata hold that range.
    """
    if name not in REWARD_TUNING:
        raise UserError(f"Unknown reward tuning {name!r}: {nearest(name, REWARD_TUNING)}")
    return REWARD_TUNING[name](rewards, episodes, return_range)


def tune_rewards(
    name: str, rewards: Tensor, episodes: Tensor | None = None, return_range: Range | None = None
) -> Tensor:
    """Rewards (N,) after the tuning called `name`: (reward - shift) / scale, in double precision on the way."""
    shift, scale = reward_tuning(name, rewards, episodes, return_range)
    return ((rewards.double() - shift) / scale).to(rewards.dtype)


@dataclass(frozen=True)
class Preprocessing:
    """The scales between an environment and an agent: observations are normalised, actions scaled to [-1, 1]."""

    observations: Normaliser
    actions: Normaliser

    def state_dict(self) -> dict[str, Tensor]:
        """The normalisers' tensors by name, for safetensors."""
        parts = {"observations": self.observations, "actions": self.actions}
        return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> Preprocessing:
        """The preprocessing that `state_dict` came from."""
        names = ("observations", "actions")
        return cls(*(Normaliser(state[f"{name}.shift"], state[f"{name}.scale"]) for name in names))

    def to(self, device: torch.device) -> Preprocessing:
        """This preprocessing on another device."""
        return Preprocessing(self.observations.to(device), self.actions.to(device))

    def transitions(self, dataset: OfflineDataset, reward_tune: str, device: str) -> Transitions:
        """A data set as an agent sees it: observations, actions and rewards in the agent's units, on `device`."""
        transitions = Transitions.from_dataset(dataset, device)
        parts, columns = self.to(transitions.device), transitions.columns
        columns.actions.copy_(parts.actions(columns.actions).clamp(-1, 1))
        columns.rewards.copy_(tune_rewards(reward_tune, columns.rewards, columns.episodes, dataset.return_range()))
        for observations in (columns.observations, columns.next_observations):
            observations.copy_(parts.observations(observations))
        return transitions


def fit_preprocessing(dataset: OfflineDataset, bounds: ActionBounds, *, scaling: str) -> Preprocessing:
    """The preprocessing of a data set: observations by the `normaliser` of that name, and actions scaled to [-1, 1].

    bounds: of its actions. Raises DataError where they are not finite.
    """
    return Preprocessing(normaliser(scaling, torch.from_numpy(dataset.observations)), bounds.scaling())


@dataclass(frozen=True, eq=False)
class ActionBounds:
    """The lowest and the highest actions."""

    low: Floats
    """(A,)"""
    high: Floats
    """(A,)"""
    source: str
    """Whose they are, as "the bounds of Pendulum-v1"."""
    known: bool = True
    """False: nothing says what they are, and [-1, 1] is assumed."""
    named: str = ""
    """The environment whose they are, where the data's metadata do not name it; ID: it is to be named."""

    def unlimited(self) -> ActionBounds:
        """No bounds: for actions of which nothing is to be assumed."""
        return ActionBounds(np.full_like(self.low, -np.inf), np.full_like(self.high, np.inf), "unknown", known=False)

    def complaint(self, actions: Floats) -> str | None:
        """What is wrong with actions (N, A) that lie outside; None where none does. Rounding is forgiven, 1e-4."""
        return outside_bounds(actions, self.low, self.high, 1e-4, self.source, self.known, named=self.named)

    def __str__(self) -> str:
        return f"{shown_bounds(self.low, self.high)}, {self.source}"

    def clip(self, dataset: OfflineDataset) -> OfflineDataset:
        """The data set with its actions clipped to these bounds; where some lie outside, its metadata say of how many.

        What they say of an earlier time stands behind that.
        """
        actions = np.clip(dataset.actions, self.low, self.high)
        rows, before = int((actions != dataset.actions).any(axis=1).sum()), dataset.metadata.get(CLIPPED)
        if not rows:
            return dataset
        said = f"{rows:,} of {counted(len(dataset), 'rows')}, to {self}"
        said += "" if before is None else f"; before that {before}"
        return replace(dataset, actions=actions, metadata=dataset.metadata | {CLIPPED: said})

    def scaling(self) -> Normaliser:
        """The scaling of actions to [-1, 1]. Raises DataError where the bounds are not finite."""
        if not (np.isfinite(self.low).all() and np.isfinite(self.high).all() and (self.low < self.high).all()):
            raise DataError(f"The actions have no finite range in {self.source}; agents need one.")
        return Normaliser(torch.tensor((self.low + self.high) / 2), torch.tensor((self.high - self.low) / 2))

    @property
    def metadata(self) -> dict[str, Floats]:
        """The bounds as a data set's metadata have them; nothing where they are only assumed, or infinite."""
        finite = np.isfinite(self.low).all() and np.isfinite(self.high).all()
        return {"action_low": self.low, "action_high": self.high} if self.known and finite else {}


def action_bounds(env: gymnasium.Env[Any, Any] | None, dataset: OfflineDataset) -> ActionBounds:
    """The bounds of a data set's actions: the environment's, else those in its metadata, else [-1, 1].

    A Minari data set has those of its action space in its metadata. Raises DataError where they do not fit the actions.
    """
    size = dataset.action_size
    if env is not None:
        space = env.action_space
        assert isinstance(space, gymnasium.spaces.Box)
        low, high = (np.asarray(bound, np.float32).reshape(size) for bound in (space.low, space.high))
        name = env.spec.id if env.spec else ""
        named = "" if dataset.metadata.get("env_id") == name else name
        return ActionBounds(low, high, f"the bounds of {name or 'the environment'}", named=named)
    stored = dataset.stored_bounds()
    if stored is not None:
        return ActionBounds(*stored, "the bounds in the data set's metadata")
    one = np.ones(size, np.float32)
    assumed = "assumed as no environment and no bounds in the data set say otherwise"
    return ActionBounds(-one, one, assumed, known=False, named="ID")
