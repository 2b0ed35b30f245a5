"""Blocks of trajectories: k-means of returns, lowest first, and pairs of one block and the next."""

import numpy as np
import pytest
import torch

from diffrl.augment.flow_to_better.blocks import BlockPairs, make_blocks
from diffrl.augment.flow_to_better.config import BlockConfig
from diffrl.support.errors import UserError


def test_blocks_of_separated_returns_are_those_returns() -> None:
    """Four groups far apart, in any order and of any size; a shift and a scale of all returns change no block."""
    rng = np.random.default_rng(0)
    group = rng.permutation(np.repeat([0, 1, 2, 3], [5, 40, 2, 13]))
    returns = np.array([-50.0, 3.0, 10.0, 400.0])[group] + 0.1 * rng.uniform(-1, 1, 60)
    blocks = make_blocks(returns, BlockConfig(blocks=4), 0)
    np.testing.assert_array_equal(blocks.of, group)
    np.testing.assert_allclose(blocks.centres, [returns[group == i].mean() for i in range(4)], rtol=1e-12)
    np.testing.assert_array_equal(blocks.sizes(), [5, 40, 2, 13])
    np.testing.assert_array_equal(blocks.members(2), np.flatnonzero(group == 2))
    np.testing.assert_array_equal(make_blocks(1e6 + 1e-2 * returns, BlockConfig(blocks=4), 0).of, group)
    np.testing.assert_array_equal(make_blocks(-returns, BlockConfig(blocks=4), 0).of, 3 - group)


def test_blocks_are_where_k_means_comes_to_rest() -> None:
    """Each trajectory lies in the block of the nearest centre, which is the mean of its block: blocks are intervals."""
    returns = np.random.default_rng(1).standard_normal(300) ** 3
    blocks = make_blocks(returns, BlockConfig(blocks=20), 0)
    assert (np.diff(blocks.centres) > 0).all()
    np.testing.assert_array_equal(np.abs(returns[:, None] - blocks.centres).argmin(1), blocks.of)
    for i in range(20):
        assert blocks.centres[i] == pytest.approx(returns[blocks.of == i].mean())
    assert (np.diff(blocks.of[np.argsort(returns)]) >= 0).all()
    again = make_blocks(returns, BlockConfig(blocks=20), 0)
    np.testing.assert_array_equal(again.of, blocks.of)


def test_as_many_blocks_as_returns_are_possible_and_more_are_not() -> None:
    returns = np.array([3.0, 1.0, 2.0, 1.0])
    np.testing.assert_array_equal(make_blocks(returns, BlockConfig(blocks=3), 0).of, [2, 0, 1, 0])
    with pytest.raises(UserError, match=r"4 blocks were asked for.*only 3 different.*--blocks 3"):
        make_blocks(returns, BlockConfig(blocks=4), 0)
    with pytest.raises(UserError, match="All 5 trajectories have one predicted return"):
        make_blocks(np.ones(5), BlockConfig(blocks=2), 0)
    with pytest.raises(UserError, match="trajectory 1 is not finite"):
        make_blocks(np.array([0.0, np.nan]), BlockConfig(blocks=2), 0)
    with pytest.raises(UserError, match="at least 2"):
        BlockConfig(blocks=1)


def test_pairs_lead_from_each_block_to_the_next_and_reach_everybody() -> None:
    """Every block but the last is as likely a source; within a block, every trajectory is; each seed draws its own."""
    group = np.array([2, 0, 1, 1, 3, 0, 3, 3, 1])
    blocks = make_blocks(10.0 * group, BlockConfig(blocks=4), 0)
    n = 30_000
    source, target, block = BlockPairs(blocks).draw(n, 2, torch.Generator().manual_seed(0))
    assert source.shape == target.shape == block.shape == (2, n)
    of = torch.from_numpy(blocks.of)
    assert torch.equal(of[source], block)
    assert torch.equal(of[target], block + 1)
    assert not torch.equal(source[0], source[1])
    sizes = np.bincount(group)
    for drawn, step in ((source, 0), (target, 1)):
        for episode in range(9):
            from_ = group[episode] - step
            p = (1 / 3) / sizes[group[episode]] if 0 <= from_ <= 2 else 0.0
            share = float((drawn == episode).double().mean())
            assert share == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / (2 * n)))
    again = BlockPairs(blocks).draw(n, 2, torch.Generator().manual_seed(0))
    assert torch.equal(again.source, source)
