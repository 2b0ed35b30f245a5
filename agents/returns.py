"""What return guidance learns from and with: windows with the return that followed, and a network that predicts it.

The return of a window is what the data hold from its first row on: R_t = r_t + discount R_{t+1}, to the last row of the
episode. A time limit ends the sum as a terminal does.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from agents.planning_config import Diffuser
from diffrl.data.segments import SegmentSource
from diffrl.nets.temporal import TemporalValue


class ReturnWindows(NamedTuple):
    """Windows of H rows, drawn for S seeds, B each, and what followed."""

    observations: Tensor
    """(S, B, H, O)"""
    actions: Tensor
    """(S, B, H, A)"""
    returns: Tensor
    """(S, B) discounted returns from the windows' first rows on"""


Floats = npt.NDArray[np.float64]


def returns_to_go(rewards: Floats, lasts: npt.NDArray[np.int64], discount: float) -> Floats:
    """R_i = r_i + discount R_{i+1} of rows (N,), begun anew behind each of the rows `lasts`: (N,), in double precision.

    Rows behind the last of `lasts` are summed to the end.
    """
    ends = np.zeros(len(rewards), bool)
    ends[lasts] = True
    found, total = [], 0.0
    for reward, end in zip(rewards[::-1].tolist(), ends[::-1].tolist(), strict=True):
        total = reward if end else reward + discount * total
        found.append(total)
    return np.array(found[::-1])


class ReturnSource:
    """The windows of `segments` with their returns: a `data.transitions.Source` of `ReturnWindows`.

    A draw takes the very windows that `segments.draw` takes from the same generator.
    """

    def __init__(self, segments: SegmentSource, discount: float) -> None:
        self.segments = segments
        rewards = segments.rewards.cpu().numpy().astype(np.float64)
        returns = returns_to_go(rewards, np.unique(segments.windows.lasts), discount)
        of_windows = returns[segments.windows.starts]
        self.mean, self.std = float(of_windows.mean()), float(of_windows.std())
        """Of the windows' returns."""
        self.returns = torch.from_numpy(returns.astype(np.float32)).to(segments.device)

    def __len__(self) -> int:
        """W, the number of windows."""
        return len(self.segments)

    def draw(self, batch_size: int, n_seeds: int = 1, generator: torch.Generator | None = None) -> ReturnWindows:
        """Draw B = `batch_size` windows for each of S = `n_seeds` seeds, as `SegmentSource.draw` does."""
        drawn = self.segments.draw(batch_size, n_seeds, generator)
        returns = self.returns.index_select(0, drawn.starts.flatten()).view(drawn.starts.shape)
        return ReturnWindows(drawn.observations, drawn.actions, returns)


class ReturnPredictor(nn.Module):
    """J(x, t) = mean + std f(x, t), the return expected of a noised window, for S seeds; f is a `TemporalValue`.

    `mean` and `std` (S,) are the data's, see `scale`; so f learns numbers around 1, and J is in units of the rewards.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, size: int, generators: Sequence[torch.Generator], config: Diffuser) -> None:
        super().__init__()
        self.f = TemporalValue(size, generators, width=config.width, multipliers=config.channels, kernel=config.kernel)
        self.register_buffer("mean", torch.zeros(len(generators)))
        self.register_buffer("std", torch.ones(len(generators)))

    def scale(self, source: ReturnSource) -> None:
        """Take mean and deviation of the windows' returns; all returns alike: a deviation of 1."""
        self.mean.fill_(source.mean)
        self.std.fill_(source.std or 1.0)

    def standardised(self, returns: Tensor) -> Tensor:
        """(R - mean) / std of returns (S, B): what f learns."""
        return (returns - self.mean.unsqueeze(-1)) / self.std.unsqueeze(-1)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        """J (S, B) of windows x (S, B, H, A + O), label () or (S, B)."""
        values: Tensor = self.f(x, label)
        return self.mean.unsqueeze(-1) + self.std.unsqueeze(-1) * values
