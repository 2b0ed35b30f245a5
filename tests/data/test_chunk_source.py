"""Chunks against a loop over the rows of random episodes; nothing that stands behind an episode's end enters."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from diffrl.augment.columns import as_dataset
from diffrl.data.chunks import Chunks, ChunkSource
from diffrl.data.offline import OfflineDataset
from diffrl.data.transitions import Transitions
from diffrl.support.errors import DataError
from tests.rounding import rounding

DISCOUNT = 0.9


def random_episodes(seed: int, has_next: bool, longest: int = 9) -> OfflineDataset:
    """Thirty episodes of 1 to 9 rows, about half of them ended by a terminal row, the others by a timeout."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, 30)
    last = lengths.cumsum() - 1
    n = int(lengths.sum())
    terminals, timeouts = np.zeros(n, bool), np.zeros(n, bool)
    terminals[last] = rng.random(30) < 0.5
    timeouts[last] = ~terminals[last]
    return OfflineDataset(
        observations=rng.normal(size=(n, 3)).astype(np.float32),
        actions=rng.uniform(-1, 1, (n, 2)).astype(np.float32),
        rewards=rng.normal(size=n).astype(np.float32),
        terminals=terminals,
        timeouts=timeouts,
        next_observations=rng.normal(size=(n, 3)).astype(np.float32) if has_next else None,
    )


def plain(dataset: OfflineDataset, row: int, horizon: int) -> dict[str, NDArray[np.float64]]:
    """The chunk that starts at a row, step by step."""
    following, known = dataset.successors()
    rewards, actions, mask = 0.0, [], []
    end, terminal, cut = row, False, False
    for i in range(horizon):
        inside = not terminal and not cut
        if inside:
            end = row + i
            rewards += DISCOUNT**i * float(dataset.rewards[end])
            terminal = bool(dataset.terminals[end])
            # Nothing is known behind a timeout, nor behind a row whose successor was not recorded.
            cut = bool(dataset.timeouts[end]) or end + 1 == len(dataset) or not known[end + 1]
        actions.append(dataset.actions[end])
        mask.append(float(inside))
    return {
        "observations": dataset.observations[row],
        "actions": np.concatenate(actions),
        "rewards": np.array(rewards),
        "terminals": np.array(float(terminal)),
        "valid": np.array(float(terminal or mask[-1] == 1)),
        "mask": np.array(mask),
        "next_observations": following[end],
    }


@pytest.mark.parametrize("has_next", [False, True])
@pytest.mark.parametrize("horizon", [1, 2, 5, 9])
def test_chunks_are_those_of_a_loop_over_the_rows(horizon: int, has_next: bool) -> None:
    """Of rewards, one rounding a product and one a sum; all else to the bit. Each kind of end is met."""
    dataset = random_episodes(horizon, has_next)
    transitions = Transitions.from_dataset(dataset)
    found = ChunkSource(transitions, horizon, DISCOUNT).gather(torch.arange(len(transitions)))
    rows = np.flatnonzero(dataset.successors()[1])
    assert len(rows) == len(transitions)
    expected = [plain(dataset, int(row), horizon) for row in rows]
    for name in Chunks._fields:
        values = np.stack([one[name] for one in expected])
        size = float(np.abs(dataset.rewards).max())
        atol = rounding(torch.float32, 2 * horizon, size) if name == "rewards" else 0
        np.testing.assert_allclose(getattr(found, name).numpy(), values, rtol=0, atol=atol, err_msg=name)
    if horizon in (2, 5):
        met = {(bool(one["valid"]), bool(one["terminals"]), one["mask"].all()) for one in expected}
        assert met >= {(True, False, True), (True, True, False), (True, True, True), (False, False, False)}


def test_the_first_actions_alone_for_returns_of_several_steps() -> None:
    transitions = Transitions.from_dataset(random_episodes(0, True))
    rows = torch.arange(len(transitions))
    first, every = (ChunkSource(transitions, 4, DISCOUNT, how).gather(rows) for how in ("first", "all"))
    assert torch.equal(first.actions, transitions.columns.actions)
    assert torch.equal(every.actions[:, :2], first.actions)
    for name in set(Chunks._fields) - {"actions"}:
        assert torch.equal(getattr(first, name), getattr(every, name))


def test_chunks_of_one_step_are_the_transitions_to_the_bit_and_drawn_alike() -> None:
    transitions = Transitions.from_dataset(random_episodes(1, True))
    ours = ChunkSource(transitions, 1, DISCOUNT).draw(16, 2, torch.Generator().manual_seed(3))
    theirs = transitions.draw(16, 2, torch.Generator().manual_seed(3))
    for name in ("observations", "actions", "rewards", "next_observations", "terminals"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.valid.all()
    assert ours.mask.all()


@pytest.mark.parametrize("has_next", [False, True])
def test_nothing_behind_an_episodes_end_enters(has_next: bool) -> None:
    """All other episodes are replaced, ends kept: the chunks of an episode's rows stay, bit for bit."""
    dataset, other = random_episodes(2, has_next), random_episodes(3, has_next)
    known, checked = dataset.successors()[1], 0
    for first, stop in dataset.episodes().tolist()[:20]:
        columns = {}
        for name in ("observations", "actions", "rewards", "next_observations"):
            values, foreign = getattr(dataset, name), getattr(other, name)
            if values is not None:
                columns[name] = np.resize(foreign, values.shape).copy()
                columns[name][first:stop] = values[first:stop]
        changed = dataclasses.replace(dataset, **columns)
        rows = torch.from_numpy(np.flatnonzero(np.isin(np.flatnonzero(known), np.arange(first, stop))))
        if not len(rows):  # an episode of one row, whose successor is not known
            continue
        ours, theirs = (
            ChunkSource(Transitions.from_dataset(data), 5, DISCOUNT).gather(rows) for data in (dataset, changed)
        )
        for name in Chunks._fields:
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        checked += len(rows)
    assert checked > 50


def test_rows_are_drawn_uniformly() -> None:
    transitions = Transitions.from_dataset(random_episodes(4, True, longest=4))
    source, n = ChunkSource(transitions, 3, DISCOUNT), len(transitions)
    drawn = source.draw(200 * n, 1, torch.Generator().manual_seed(0)).observations[0]
    _, counts = torch.unique(drawn, dim=0, return_counts=True)
    assert len(counts) == n
    statistic = float(((counts - 200.0) ** 2 / 200.0).sum())
    assert statistic < n - 1 + 4 * math.sqrt(2 * (n - 1))  # chi-squared: mean n - 1, variance 2 (n - 1)


def test_a_chunk_longer_than_every_episode_is_refused_in_a_line() -> None:
    transitions = Transitions.from_dataset(random_episodes(5, True, longest=4))
    ChunkSource(transitions, 4, DISCOUNT)
    with pytest.raises(DataError, match=r"No episode has the 5 steps of a chunk: the longest has 4. Ask for no more."):
        ChunkSource(transitions, 5, DISCOUNT)


def test_rows_without_episodes_are_refused() -> None:
    dataset = random_episodes(6, True)
    single = Transitions.from_dataset(as_dataset(Transitions.from_dataset(dataset), {}))
    with pytest.raises(DataError, match="have no episodes"):
        ChunkSource(single, 2, DISCOUNT)
