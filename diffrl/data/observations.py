"""Observations of several parts as one vector: the same for the episodes of a file and for an environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from diffrl.data.env_spec import parts_in
from diffrl.data.offline import OfflineDataset
from diffrl.support.errors import DataError

Array: TypeAlias = npt.NDArray[Any]

GOAL = "desired_goal"
"""The part of a goal-conditioned task's observation that says where to go."""
_D4RL_WITHOUT_GOAL = ("D4RL/antmaze/", "D4RL/pointmaze/")
"""How the ids of Minari's data sets begin of which files were once written without the goal, as D4RL has its mazes."""


def is_goal_conditioned(space: spaces.Space[Any]) -> bool:
    """Whether observations are a dictionary of `observation`, a vector, and goals alone, as in Gymnasium-Robotics."""
    if not isinstance(space, spaces.Dict) or not isinstance(space.spaces.get("observation"), spaces.Box):
        return False
    return {"observation"} < set(space.spaces) <= {"observation", "achieved_goal", GOAL}


def goal_parts(space: spaces.Space[Any], begins_with_achieved: bool) -> tuple[str, ...]:
    """The parts of a goal-conditioned observation that make the vector, in D4RL's order and then the goal.

    `achieved_goal` comes first, unless the observation begins with it already (so AntMaze has D4RL's 29 numbers, and
    PointMaze 4) or it is a dictionary itself (FrankaKitchen's, which the observation holds); `desired_goal` is last.
    """
    assert isinstance(space, spaces.Dict)
    achieved = isinstance(space.spaces.get("achieved_goal"), spaces.Box) and not begins_with_achieved
    return (*(["achieved_goal"] if achieved else []), "observation", *([GOAL] if GOAL in space.spaces else []))


def flatten(space: spaces.Space[Any], values: Any, parts: Sequence[str] | None = None) -> Array:
    """Observations of `space`, T of them, as (T, O) float32; each part's columns in Gymnasium's order.

    parts: of a dictionary, those of its keys that are taken, in this order; None: all. Raises DataError for a part
    that is no Box.
    """
    if isinstance(space, spaces.Box):
        array = np.asarray(values, np.float32)
        return array.reshape(len(array), -1)
    if isinstance(space, spaces.Dict):
        keys = list(space.spaces) if parts is None else list(parts)
        return np.concatenate([flatten(space.spaces[key], values[key]) for key in keys], axis=1)
    if isinstance(space, spaces.Tuple):
        return np.concatenate([flatten(part, values[i]) for i, part in enumerate(space.spaces)], axis=1)
    raise _no_box(space)


def _no_box(space: spaces.Space[Any]) -> DataError:
    return DataError(f"An observation, or a part of it, is {str(space)[:200]}; expected Box, or a dictionary of Box.")


def flatten_one(space: spaces.Space[Any], value: Any, parts: Sequence[str] | None = None) -> Array:
    """One observation of `space` as (O,) float32: the row that `flatten` makes of it."""
    one: Array = flatten(space, _stacked(space, value), parts)[0]
    return one


def _stacked(space: spaces.Space[Any], value: Any) -> Any:
    """One observation as `flatten` takes several."""
    if isinstance(space, spaces.Dict):
        return {key: _stacked(part, value[key]) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_stacked(part, value[i]) for i, part in enumerate(space.spaces))
    return np.asarray(value)[None]


@dataclass(frozen=True)
class Part:
    """One array of an observation of several parts."""

    path: tuple[str | int, ...]
    """The keys of dictionaries, and places in tuples, that lead to it; () where it is the whole observation."""
    shape: tuple[int, ...]
    """Of the array in one observation."""

    def __str__(self) -> str:
        name = "/".join(map(str, self.path)) or "observation"
        return f"{name} ({', '.join(map(str, self.shape))})" if self.shape else name


def parts_of(space: spaces.Space[Any], parts: Sequence[str] | None = None) -> tuple[Part, ...]:
    """The arrays of an observation of `space`, in the order in which `flatten` joins them. Raises DataError as it does.

    parts: of a dictionary, those of its keys that are taken, in this order; None: all.
    """
    if isinstance(space, spaces.Box):
        return (Part((), space.shape),)
    inner: Sequence[tuple[str | int, spaces.Space[Any]]]
    if isinstance(space, spaces.Dict):
        inner = [(key, space.spaces[key]) for key in (space.spaces if parts is None else parts)]
    elif isinstance(space, spaces.Tuple):
        inner = list(enumerate(space.spaces))
    else:
        raise _no_box(space)
    return tuple(Part((key, *part.path), part.shape) for key, one in inner for part in parts_of(one))


def flat_space(space: spaces.Space[Any], parts: Sequence[str] | None = None) -> spaces.Box:
    """The space of the vectors that `flatten` makes, with the parts' bounds. Raises DataError as it does."""
    low, high = (flatten_one(space, _bound(space, end), parts) for end in ("low", "high"))
    return spaces.Box(low, high, dtype=np.float32)


def _bound(space: Any, end: str) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: _bound(part, end) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_bound(part, end) for part in space.spaces)
    return getattr(space, end, None)


def goal_left_out(metadata: Mapping[str, Any]) -> str | None:
    """A sentence that says that a data set's observations lack the goal, as files of old do; None: they do not."""
    parts, dataset_id = parts_in(metadata), str(metadata.get("minari_id", ""))
    if parts is None or GOAL in parts or not dataset_id.startswith(_D4RL_WITHOUT_GOAL):
        return None
    return f"{dataset_id}: {GOAL} is no part of this file's observations: the policy does not see goals."


def without_goal(dataset: OfflineDataset, observation_size: int) -> OfflineDataset:
    """A data set as runs of this size of observations see it: in old ones the goal, now last, was left out."""
    following = dataset.next_observations
    if GOAL not in (parts_in(dataset.metadata) or ()) or following is None or observation_size >= following.shape[1]:
        return dataset
    seen = dataset.observations[:, :observation_size]
    return replace(dataset, observations=seen, next_observations=following[:, :observation_size])
