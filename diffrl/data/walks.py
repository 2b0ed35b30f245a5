"""Walks: data collected without resets, from one goal to the next, such as maze2d's."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from diffrl.data.offline import Bools, OfflineDataset

NEAR = math.exp(-0.5)
"""The least reward of a state in the goal of maze2d, of radius .5: 1 where rewards are sparse, exp(-distance) else."""


def between_visits(dataset: OfflineDataset) -> OfflineDataset:
    """The data cut where the rewarded goal is left, and joined at the timeouts where the walk went on without a reset.

    As Diffuser's authors cut maze2d (arXiv 2205.09991, their `maze2d_set_terminals`): D4RL marks a timeout wherever the
    walk's own goal was reached, on maze2d-umaze after 80 rows on average, which is shorter than a plan. A timeout stays
    where the step to the next row is longer, in some dimension, than any within an episode. Terminals stay.
    """
    if len(dataset) < 2:
        return dataset
    near = dataset.rewards >= NEAR
    timeouts = dataset.timeouts & ~went_on(dataset)
    timeouts[:-1] |= near[:-1] & ~near[1:]
    return dataclasses.replace(dataset, timeouts=timeouts)


def went_on(dataset: OfflineDataset) -> Bools:
    """(N,) whether the next row follows this one as a row of the same episode might, by the size of the step."""
    steps = np.abs(np.diff(dataset.observations, axis=0))
    inside = ~(dataset.terminals | dataset.timeouts)[:-1]
    result = np.zeros(len(dataset), bool)
    if inside.any():
        result[:-1] = (steps <= steps[inside].max(axis=0)).all(axis=1) & ~dataset.terminals[:-1]
    return result
