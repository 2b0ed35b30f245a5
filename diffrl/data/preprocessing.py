"""Between an environment and an agent: observations normalised, actions scaled to [-1, 1]."""

from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from diffrl.data.normalise import Normaliser, normaliser, tune_rewards
from diffrl.data.offline import OfflineDataset
from diffrl.data.transitions import Transitions
from diffrl.support.errors import DataError


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
    def from_state_dict(cls, state: dict[str, Tensor]) -> "Preprocessing":
        """The preprocessing that `state_dict` came from."""
        names = ("observations", "actions")
        return cls(*(Normaliser(state[f"{name}.shift"], state[f"{name}.scale"]) for name in names))

    def to(self, device: torch.device) -> "Preprocessing":
        """The same on another device."""
        return Preprocessing(self.observations.to(device), self.actions.to(device))

    def transitions(self, dataset: OfflineDataset, reward_tune: str, device: str) -> Transitions:
        """A data set as an agent sees it: observations, actions and rewards in the agent's units, on `device`."""
        transitions = Transitions.from_dataset(dataset, device)
        parts = self.to(transitions.device)
        transitions.columns.actions.copy_(parts.actions(transitions.columns.actions).clamp(-1, 1))
        episodes, returns = transitions.columns.episodes, dataset.return_range()
        return transitions.map(
            observations=parts.observations,
            rewards=lambda rewards: tune_rewards(reward_tune, rewards, episodes, returns),
        )


def fit_preprocessing(
    dataset: OfflineDataset, env: gymnasium.Env[Any, Any] | None, *, standardise: bool
) -> Preprocessing:
    """The preprocessing of a data set: observations standardised, if so said, and actions scaled to [-1, 1].

    Raises DataError where the data's actions lie outside of their bounds.
    """
    kind = "standard" if standardise else "identity"
    return Preprocessing(normaliser(kind, torch.from_numpy(dataset.observations)), action_scaling(env, dataset))


def action_scaling(env: gymnasium.Env[Any, Any] | None, dataset: OfflineDataset) -> Normaliser:
    """The scaling of actions to [-1, 1], from the environment's bounds, else from those in the data's metadata.

    Where neither has bounds, [-1, 1] is assumed and nothing is scaled. Raises DataError where the data's actions lie
    outside the bounds, or these are not finite.
    """
    size = dataset.action_size
    low: Any
    high: Any
    if env is not None:
        space = env.action_space
        assert isinstance(space, gymnasium.spaces.Box)
        low, high, source = space.low, space.high, f"the bounds of {env.spec.id if env.spec else 'the environment'}"
    elif "action_low" in dataset.metadata and "action_high" in dataset.metadata:
        low, high, source = dataset.metadata["action_low"], dataset.metadata["action_high"], "the file's action bounds"
    else:
        low, high, source = -1.0, 1.0, "[-1, 1], assumed as no environment and no bounds in the file say otherwise"
    try:
        low = np.broadcast_to(np.asarray(low, dtype=np.float32), (size,))
        high = np.broadcast_to(np.asarray(high, dtype=np.float32), (size,))
    except ValueError as error:
        raise DataError(f"{source} do not fit actions of {size} dimensions: {low}, {high}.") from error
    outside = (dataset.actions < low - 1e-4) | (dataset.actions > high + 1e-4)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise DataError(
            f"{dataset.metadata.get('source', 'The data set')}: actions, row {row}, column {column} is "
            f"{dataset.actions[row, column]:.4g}, outside {source}. Name the environment of the data with --env, or "
            "clip the actions: `diffrl data convert SRC NEW.hdf5 --clip-actions`."
        )
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise DataError(f"The actions have no finite range in {source}; agents need one.")
    return Normaliser(torch.tensor((low + high) / 2), torch.tensor((high - low) / 2))
