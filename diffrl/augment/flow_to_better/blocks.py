"""Blocks of trajectories of similar return, lowest first, and pairs of one block and the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffrl.augment import streams
from diffrl.augment.flow_to_better.config import BlockConfig
from diffrl.data.offline import Floats, Ints
from diffrl.support.errors import UserError
from diffrl.support.seeds import mix


@dataclass(frozen=True, eq=False)
class Blocks:
    """E trajectories in n blocks by their returns; block 0 has the lowest."""

    of: Ints
    """(E,) the block of each trajectory."""
    centres: NDArray[np.float64]
    """(n,) the mean return of each block, ascending."""

    def __len__(self) -> int:
        return len(self.centres)

    def members(self, block: int) -> Ints:
        """The numbers (m,) of a block's trajectories, ascending."""
        return np.flatnonzero(self.of == block)

    def sizes(self) -> Ints:
        """(n,) trajectories of each block, at least one."""
        return np.bincount(self.of, minlength=len(self))


def make_blocks(returns: Floats | NDArray[np.float64], config: BlockConfig, seed: int) -> Blocks:
    """Put trajectories into blocks by k-means (Lloyd 1982; k-means++, scikit-learn) on their returns (E,).

    Raises UserError where there are fewer different returns than blocks, or one is not finite.
    """
    from sklearn.cluster import KMeans  # takes a second or two

    values = np.asarray(returns, np.float64)
    if not np.isfinite(values).all():
        raise UserError(f"The predicted return of trajectory {np.flatnonzero(~np.isfinite(values))[0]} is not finite.")
    distinct, n = len(np.unique(values)), config.blocks
    if distinct < n:
        raise UserError(
            f"{n} blocks were asked for, and the {len(values):,} trajectories have only {distinct:,} different "
            f"predicted returns: expected at least as many as blocks. Ask for fewer, --blocks {max(distinct, 2)}."
            if distinct >= 2
            else f"All {len(values):,} trajectories have one predicted return, so none is better than another: blocks "
            "need two or more."
        )
    # Centred, in units of the deviation: k-means stops by a tolerance, and squares lose digits far from 0.
    standard = (values - values.mean()) / values.std()
    means = KMeans(n, n_init=config.restarts, tol=0.0, random_state=mix((seed, streams.BLOCKS)) % 2**32)
    found = means.fit_predict(standard[:, None])
    labels, of = np.unique(found, return_inverse=True)
    if len(labels) < n:
        raise UserError(f"k-means found {len(labels)} blocks of {n}: the returns lie too close. Ask for fewer blocks.")
    centres = np.bincount(of, values) / np.bincount(of)
    order = np.argsort(centres)
    rank = np.argsort(order)
    return Blocks(rank[of], centres[order])


class TrajectoryPairs(NamedTuple):
    """Numbers (S, B) of trajectories: `source` of one block, `target` of the next; and the `block` of the source."""

    source: Tensor
    target: Tensor
    block: Tensor


class BlockPairs:
    """Pairs of a trajectory of one block and one of the next, drawn on a device without waiting for it."""

    def __init__(self, blocks: Blocks, device: torch.device | str = "cpu") -> None:
        sizes = torch.from_numpy(blocks.sizes())
        self._order = torch.from_numpy(np.argsort(blocks.of, kind="stable")).to(device)
        self._first = (sizes.cumsum(0) - sizes).to(device)
        self._sizes = sizes.to(device)
        self.device = self._order.device

    def draw(self, batch_size: int, n_seeds: int = 1, generator: torch.Generator | None = None) -> TrajectoryPairs:
        """Draw B pairs a seed: the source's block uniformly from all but the last, both trajectories from theirs."""
        u = torch.rand(3, n_seeds, batch_size, generator=generator, device=self.device)
        block = self._below(u[0], torch.full_like(self._sizes[:1], len(self._sizes) - 1))
        source, target = (
            self._order[self._first[of] + self._below(part, self._sizes[of])]
            for part, of in ((u[1], block), (u[2], block + 1))
        )
        return TrajectoryPairs(source, target, block)

    @staticmethod
    def _below(u: Tensor, n: Tensor) -> Tensor:
        """Whole numbers from 0 to n - 1, of uniform ones u on [0, 1)."""
        return torch.minimum((u * n).long(), n - 1)
