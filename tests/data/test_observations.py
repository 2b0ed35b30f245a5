"""Observations of several parts as one vector."""

import numpy as np
import pytest
from gymnasium import spaces

from diffrl.data import observations as flattening
from diffrl.support.errors import DataError


def box(*shape: int) -> spaces.Box:
    return spaces.Box(-1, 1, shape, np.float32)


SPACES = [
    box(3),
    box(2, 3),
    spaces.Dict({"z": box(2), "a": box(1, 2)}),
    spaces.Tuple((box(2), spaces.Dict({"q": box(3), "b": spaces.Tuple((box(1), box(2)))}))),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_one_flattener_equals_gymnasium_s(space: spaces.Space) -> None:
    """The rows of a file, the observation of an environment and the bounds of its space: Gymnasium's `flatten`."""
    space.seed(0)
    steps = [space.sample() for _ in range(4)]
    expected = np.stack([spaces.flatten(space, step) for step in steps])

    def stacked(part: spaces.Space, values: list) -> object:
        if isinstance(part, spaces.Dict):
            return {key: stacked(inner, [v[key] for v in values]) for key, inner in part.spaces.items()}
        if isinstance(part, spaces.Tuple):
            return tuple(stacked(inner, [v[i] for v in values]) for i, inner in enumerate(part.spaces))
        return np.stack(values)

    np.testing.assert_array_equal(flattening.flatten(space, stacked(space, steps)), expected)
    for step, row in zip(steps, expected, strict=True):
        np.testing.assert_array_equal(flattening.flatten_one(space, step), row)
    assert flattening.flat_space(space) == spaces.flatten_space(space)


def test_parts_are_taken_in_the_order_asked_for() -> None:
    space = spaces.Dict({"a": box(1), "b": box(2), "c": box(1)})
    value = {"a": [1.0], "b": [2.0, 3.0], "c": [4.0]}
    assert flattening.flatten_one(space, value, ("c", "b")).tolist() == [4, 2, 3]


def test_what_is_no_box_is_refused() -> None:
    with pytest.raises(DataError, match="expected Box"):
        flattening.flat_space(spaces.Dict({"a": box(1), "b": spaces.Discrete(3)}))
