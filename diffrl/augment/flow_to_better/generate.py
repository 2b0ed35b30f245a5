"""Trajectories improved step by step: the flow, which of its steps are kept, and the rows it gives."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffrl.augment.flow_to_better.config import FlowConfig
from diffrl.data.offline import Bools, Floats

CHUNK = {"cpu": 32, "cuda": 512}
"""Trajectories that flow together, from a generator of their own: what a kill costs at most. The share of them that
improves ends their flow."""
EXTRA = 6
"""Columns of a generated row behind those of its transition: see `Columns`."""


class Columns(NamedTuple):
    """What rows of generated trajectories hold behind [s, a, s', r, terminal]; all but the last alike in one."""

    start: NDArray[np.float32]
    """The number of the window from which the flow started, among the starts."""
    tried: NDArray[np.float32]
    """Steps of the flow that were tried."""
    kept: NDArray[np.float32]
    """Steps that were kept; 0: it is the data's trajectory still."""
    start_return: NDArray[np.float32]
    """The predicted return of the trajectory it started from."""
    predicted_return: NDArray[np.float32]
    """Its own."""
    dynamics_error: NDArray[np.float32]
    """How far the transition's s' is from the simulator's, RMS in standard deviations of the data; NaN: unknown."""


class Flowed(NamedTuple):
    """Trajectories at the end of their flow, B of them."""

    x: Tensor
    """(1, B, H, D), as given where no step was kept."""
    start_returns: Tensor
    """(B,) of what they started from."""
    returns: Tensor
    """(B,) of what they have become."""
    kept: Tensor
    """(B,) steps that were kept."""
    tried: int
    """Steps that were tried, of all alike."""


def improves(new: Tensor, old: Tensor, least: float, scale: float) -> Tensor:
    """Whether predicted returns `new` (...) are better than `old` (...): new > old + least max(|old|, scale).

    Where old >= scale > 0 this is the published rule, new / old > 1 + least. The ratio has no meaning for returns of
    other signs or near 0: at -10 it would take -11 for better, at 0 anything. scale: what counts as a large return.
    """
    return new > old + least * old.abs().clamp_min(scale)


def flow(
    x: Tensor,
    step: Callable[[Tensor], Tensor],
    score: Callable[[Tensor], Tensor],
    config: FlowConfig,
    scale: float,
) -> Flowed:
    """Improve trajectories x (1, B, H, D) by `step`, which makes of each one of the next block.

    A trajectory takes the new one's place where `improves` says so and |x| stays below the bound, else it stays, and
    is tried again. The flow ends after `config.flow_steps`, or with the step that improves less than a share of
    `config.least_improved`, whose improvements are kept. score: predicted returns (B,) of x. scale: see `improves`.
    """
    first = returns = score(x)
    kept, tried = torch.zeros_like(returns), 0
    for _ in range(config.flow_steps):
        new = step(x)
        found = score(new)
        inside = (new.abs() < config.bound).flatten(2).all(-1)[0]  # False for what is not a number, too
        better = improves(found, returns, config.improvement, scale) & inside
        x = torch.where(better[None, :, None, None], new, x)
        returns = torch.where(better, found, returns)
        kept, tried = kept + better, tried + 1
        if float(better.double().mean()) < config.least_improved:
            break
    return Flowed(x, first, returns, kept, tried)


def transitions(rows: Tensor, rewards: Tensor, observation_size: int) -> Tensor:
    """Transitions [s, a, s', r, 0] (B, H - 1, 2 O + A + 2) of trajectories [s, a] (B, H, O + A), rewards (B, H).

    Of the last row nothing is known that followed. None is terminal.
    """
    following = rows[:, 1:, :observation_size]
    flat = torch.stack([rewards, torch.zeros_like(rewards)], -1)[:, :-1]
    return torch.cat([rows[:, :-1], following, flat], -1)


def split(rows: Floats) -> tuple[Floats, Columns]:
    """Generated rows (n, W) as transitions (n, W - 6) and what stands behind them."""
    return rows[:, :-EXTRA], Columns(*rows[:, -EXTRA:].T)


def written(columns: Columns, together: int, max_dynamics_error: float | None) -> tuple[Bools, Bools]:
    """(n,) which rows are written, and (n,) which end an episode; `together` rows in turn are of one trajectory.

    Written are the rows of trajectories that a step has improved, without those whose dynamics error is larger than a
    bound: where one is left out, the episode is cut. Rows of unknown error stay.
    """
    keep = columns.kept > 0
    if max_dynamics_error is not None:
        keep = keep & ~(columns.dynamics_error > max_dynamics_error)
    inside = keep.reshape(-1, together)
    ends = inside.copy()
    ends[:, :-1] &= ~inside[:, 1:]
    return keep, ends.reshape(-1)
