"""A data set's windows as trajectories: how long, which are held out, what they earn, from which a flow starts."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from diffrl.data.offline import Bools, Ints, OfflineDataset
from diffrl.data.segments import Windows

MOST_WINDOWS = 20_000
"""Windows that are trained on, at most: of more, which overlap nearly all, so many evenly spread ones are taken."""
MOST_WHOLE = 256
"""Rows of an episode that is taken as a whole, at most."""
WINDOW = 32
"""Rows of a window of longer episodes: executed from their first state, Hopper's generated windows of 32 rows earn more
than the data's, and those of 100 rows less than half of it (benchmarks/results/flow_to_better.md)."""


def horizon_of(dataset: OfflineDataset, segment: int) -> int:
    """Rows of a trajectory: those of an episode, where all have one length of 256 or less; else 32, or a segment's."""
    lengths = np.unique(dataset.episode_lengths())
    return int(lengths[0]) if len(lengths) == 1 and segment <= lengths[0] <= MOST_WHOLE else min(segment, WINDOW)


def windows_of(episodes: Ints, horizon: int, which: Literal["all", "first"]) -> Windows:
    """The windows of `horizon` rows that lie within the episodes (E, 2): all, or of each the one of its first rows.

    Raises DataError where no episode is so long.
    """
    windows = Windows.of(episodes, horizon)
    if which == "all":
        return windows
    first = np.isin(windows.starts, episodes[:, 0])
    return Windows(windows.starts[first], windows.lasts[first], horizon)


def thinned(windows: Windows) -> Windows:
    """`MOST_WINDOWS` of the windows, evenly spread, or all of fewer."""
    if len(windows) <= MOST_WINDOWS:
        return windows
    chosen = np.linspace(0, len(windows) - 1, MOST_WINDOWS).round().astype(np.int64)
    return Windows(windows.starts[chosen], windows.lasts[chosen], windows.horizon)


def rows_held_out(dataset: OfflineDataset, windows: Windows, share: float, seed: int) -> Bools:
    """(N,) which rows of a data set are held out: whole episodes with about so large a share of the windows.

    At least one episode with windows is held out, and one is not. Where a single episode has them all, rows are drawn
    one by one, and windows that start at one are held out, which overlap with others.
    """
    rng = np.random.default_rng(seed)
    numbers = dataset.episode_indices()[0]
    episodes, counts = np.unique(numbers[windows.starts], return_counts=True)
    if len(episodes) < 2:
        out: Bools = rng.random(len(dataset)) < share
        out[windows.starts[0]], out[windows.starts[-1]] = True, False
        return out
    order = rng.permutation(len(episodes))
    n = int(np.searchsorted(counts[order].cumsum(), share * counts.sum())) + 1
    chosen: Bools = np.isin(numbers, episodes[order[: min(n, len(episodes) - 1)]])
    return chosen


def window_returns(rewards: NDArray[np.float32], windows: Windows) -> NDArray[np.float64]:
    """(W,) the sums of the rewards (N,) of each window's rows, which lie within an episode."""
    sums = np.append(0.0, np.cumsum(rewards, dtype=np.float64))
    returns: NDArray[np.float64] = sums[windows.starts + windows.horizon] - sums[windows.starts]
    return returns


def best_episodes(
    episodes: Ints,
    returns: NDArray[np.float64],
    horizon: int,
    share: float,
    which: Literal["all", "first"] = "all",
) -> Windows:
    """Windows of `horizon` rows that lie end to end, from row 0, in the episodes (E, 2) of the highest returns (E,).

    which: all of these, or of each episode the first alone.

    They are of so many episodes, the best one first, that they are `share` of all such windows, or a little more. So
    with "all" a flow starts from all parts of an episode, its beginning too. The best windows would all be of an
    episode's middle, and a policy cloned from there does not know how to get there.
    """
    first, stop = episodes.T
    count = (stop - first) // horizon
    if which == "first":
        count = count.clip(max=1)
    order = np.argsort(-returns, kind="stable")
    order = order[count[order] > 0]
    total = count[order].cumsum()
    order = order[: int(np.searchsorted(total, share * total[-1])) + 1]
    starts = [first[i] + horizon * np.arange(count[i]) for i in order]
    return Windows(np.concatenate(starts), np.repeat(stop[order] - 1, count[order]), horizon)
