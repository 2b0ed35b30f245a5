"""A data set whose observations say where they come from."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from diffrl.data.offline import OfflineDataset

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"the shared data are not here ({SHARED})")
    return SHARED


def episodes_like(lengths: Sequence[int], ends: str, has_next: bool = False) -> OfflineDataset:
    """One episode for each length; ends[i] is t (terminal), o (timeout) or - (neither).

    observations[row] = (episode, time, row), and the stored next observation is (episode, time + 1, row + 1).
    """
    episode = np.repeat(np.arange(len(lengths)), lengths)
    time = np.concatenate([np.arange(n) for n in lengths])
    row = np.arange(len(time))
    last = np.cumsum(lengths) - 1
    observations = np.stack([episode, time, row], axis=1).astype(np.float32)
    terminals, timeouts = np.zeros(len(row), bool), np.zeros(len(row), bool)
    for end, mark in zip(last, ends, strict=True):
        terminals[end], timeouts[end] = mark == "t", mark == "o"
    return OfflineDataset(
        observations=observations,
        actions=np.sin(np.stack([row, 2.0 * row], axis=1)).astype(np.float32),
        rewards=(0.5 * row).astype(np.float32),
        terminals=terminals,
        timeouts=timeouts,
        next_observations=observations + np.float32([0, 1, 1]) if has_next else None,
    )


@pytest.fixture
def make() -> Callable[..., OfflineDataset]:
    return episodes_like
