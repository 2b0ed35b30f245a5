"""How much better a stretch of experience went than its start promised: what segments of a data set are judged by."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffrl.data.offline import OfflineDataset
from diffrl.nets import MLP, Adam, average_, seed_generator

STEPS, BATCH, WIDTH, RATE, AVERAGE = 2_000, 256, 64, 1e-3, 0.02
"""How the value function is trained: updates, rows of each, width of two layers, learning rate, its average's rate."""


def segment_returns(dataset: OfflineDataset, starts: NDArray[np.int64], segment: int, discount: float) -> NDArray[Any]:
    """The returns sum_h discount^h r_h of the segments of `segment` rows from each of `starts` on: (n,)."""
    total = np.zeros(len(starts))
    for h in range(segment):
        total += discount**h * dataset.rewards[starts + h]
    return total


def segment_advantages(
    dataset: OfflineDataset, starts: NDArray[np.int64], segment: int, discount: float, seed: int
) -> NDArray[np.float64]:
    """Advantages sum_h discount^h r_h + discount^H V(s_H) - V(s_0) of the segments of H rows from `starts` on: (n,).

    V is the value of the data's own behaviour, fitted to the same segments: to V(s_0) = sum_h discount^h r_h +
    discount^H V'(s_H) in the mean square, V' its moving average, 0 where the last row is terminal. s_H is the state
    that the last row led to: `starts` are those of segments for which it is known (`OfflineDataset.successors`).
    """
    following, _ = dataset.successors()
    last = starts + segment - 1
    observations = torch.from_numpy(dataset.observations)
    mean, std = observations.mean(0), observations.std(0, correction=0) + 1e-3

    def standardised(rows: NDArray[np.float32]) -> torch.Tensor:
        return ((torch.from_numpy(rows) - mean) / std)[None]

    here, there = standardised(dataset.observations[starts]), standardised(following[last])
    returns = torch.from_numpy(segment_returns(dataset, starts, segment, discount))
    scale = float(returns.square().mean().sqrt()) + 1e-8
    gain = (returns / scale).float()
    ahead = torch.from_numpy(discount**segment * (1.0 - dataset.terminals[last])).float()
    generator = torch.Generator().manual_seed(seed)
    value, target = (MLP((1,), here.shape[-1], 1, [seed_generator(seed)], width=WIDTH, layers=2) for _ in range(2))
    optimiser = Adam(value, RATE)
    for _ in range(STEPS):
        rows = torch.randint(len(starts), (BATCH,), generator=generator)
        with torch.no_grad():
            y = gain[rows] + ahead[rows] * target(there[:, rows])[0, :, 0]
        optimiser.step((value(here[:, rows])[..., 0] - y).square().mean(-1))
        average_(target, value, AVERAGE)
    advantages = []
    with torch.no_grad():
        for rows in torch.split(torch.arange(len(starts)), 2**16):
            advantage = gain[rows] + ahead[rows] * value(there[:, rows])[0, :, 0] - value(here[:, rows])[0, :, 0]
            advantages.append(advantage)
    return scale * torch.cat(advantages).double().numpy()
