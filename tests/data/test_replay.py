"""A replay buffer is a ring that is drawn from uniformly; a mixture gives every source exactly its share."""

import pytest
import torch

from diffrl.data.replay import MixedSource, ReplayBuffer
from diffrl.data.transitions import Batch

WIDTH = 2 * 3 + 2 + 4


def rows(start: int, n: int, n_seeds: int = 2) -> torch.Tensor:
    """(S, n, W): every column of seed s's row i is 1000 s + start + i."""
    number = torch.arange(start, start + n) + 1000.0 * torch.arange(n_seeds)[:, None]
    return number[..., None].expand(-1, -1, WIDTH)


def filled(capacity: int, *chunks: int) -> ReplayBuffer:
    buffer, start = ReplayBuffer(2, capacity, 3, 2), 0
    for n in chunks:
        buffer.add(rows(start, n))
        start += n
    return buffer


@pytest.mark.parametrize("chunks", [(1,), (7,), (3, 3), (5, 4), (7, 1), (20,), (3, 20), (2,) * 9])
def test_the_ring_holds_the_newest_rows_of_each_seed(chunks: tuple[int, ...]) -> None:
    buffer = filled(7, *chunks)
    total, n = sum(chunks), min(sum(chunks), 7)
    assert len(buffer) == n
    for seed in range(2):
        held = buffer.columns.rewards[seed].sort().values
        assert held.tolist() == [1000.0 * seed + i for i in range(total - n, total)]
    assert torch.equal(buffer.rows[..., 0], buffer.columns.rewards)  # rows are moved whole


@pytest.mark.parametrize("chunks", [(5,), (20,), (20, 9)])
def test_rows_are_drawn_uniformly_from_what_is_there_and_from_the_own_seed(chunks: tuple[int, ...]) -> None:
    """Pearson's statistic of 20,000 draws stays under its .999 quantile: one generator, so no chance of failing."""
    buffer = filled(20, *chunks)
    batch = buffer.draw(20_000, 2, torch.Generator().manual_seed(0))
    assert batch.observations.shape == (2, 20_000, 3)
    assert torch.equal(batch.observations[..., 1], batch.rewards)
    n, first = len(buffer), sum(chunks) - len(buffer)
    limit = {5: 18.5, 20: 43.8}[n]  # 4 and 19 degrees of freedom
    for seed in range(2):
        counts = torch.bincount((batch.rewards[seed] - 1000 * seed - first).long(), minlength=n).double()
        assert len(counts) == n
        assert ((counts - 20_000 / n) ** 2 / (20_000 / n)).sum() < limit
    assert not torch.equal(batch.rewards[0], batch.rewards[1] - 1000)


def test_a_buffer_drawn_from_by_a_fixed_graph_sees_its_new_rows() -> None:
    """The number of rows is a tensor that keeps its place: what is captured once follows it."""
    buffer = filled(50, 1)
    place = buffer._size.data_ptr()
    buffer.add(rows(1, 30))
    assert buffer._size.data_ptr() == place
    assert int(buffer._size) == len(buffer) == 31


@pytest.mark.parametrize("chunks", [(3,), (7,), (5, 4)])
def test_a_restored_ring_goes_on_as_the_one_that_was_saved(chunks: tuple[int, ...]) -> None:
    one, other = filled(7, *chunks), ReplayBuffer(2, 7, 3, 2)
    state = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    assert state["rows"].shape[1] == min(sum(chunks), 7)
    other.load_state_dict(state)
    for buffer in (one, other):
        buffer.add(rows(100, 3))
    assert torch.equal(one.rows, other.rows)
    draws = [buffer.draw(50, 2, torch.Generator().manual_seed(1)).rewards for buffer in (one, other)]
    assert torch.equal(*draws)


def test_a_full_buffer_restored_into_a_larger_one_keeps_its_rows() -> None:
    larger = ReplayBuffer(2, 10, 3, 2)
    larger.load_state_dict(filled(4, 4).state_dict())
    larger.add(rows(4, 3))
    assert larger.columns.rewards[0].tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(ValueError, match="empty"):
        ReplayBuffer(2, 7, 3, 2).draw(4, 2)
    with pytest.raises(ValueError, match="of 2 seeds, 3"):
        filled(7, 3).draw(4, 3)
    with pytest.raises(ValueError, match="expected at least 1"):
        ReplayBuffer(2, 0, 3, 2)
    with pytest.raises(ValueError, match=r"expected \(2, up to 2, 12\)"):
        ReplayBuffer(2, 2, 3, 2).load_state_dict(filled(7, 3).state_dict())
    for shares in ([0.5, 0.6], [1.5, -0.5], [1.0], []):
        with pytest.raises(ValueError, match="shares"):
            MixedSource([filled(7, 3)] * 2, shares)


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.25, 0.75), (0.1, 0.2, 0.7), (1 / 3, 1 / 3, 1 / 3), (0.0, 1.0)])
def test_counts_add_up_and_are_the_shares_to_within_a_row(shares: tuple[float, ...]) -> None:
    mixture = MixedSource([filled(7, 3)] * len(shares), shares)
    for batch_size in (*range(1, 40), 256, 1000):
        counts = mixture.counts(batch_size)
        assert sum(counts) == batch_size
        assert all(abs(n - share * batch_size) < 1 for n, share in zip(counts, shares, strict=True))
    if shares == (0.1, 0.2, 0.7):
        assert mixture.counts(10) == [1, 2, 7]  # although 0.7 * 10 < 7 in floating point
        assert mixture.counts(256) == [26, 51, 179]


def test_every_batch_holds_each_source_by_its_share_in_order() -> None:
    low, high = filled(50, 50), ReplayBuffer(2, 50, 3, 2)
    high.add(rows(500, 50))
    batch: Batch = MixedSource([low, high], [0.25, 0.75]).draw(12, 2, torch.Generator().manual_seed(0))
    assert batch.next_observations.shape == (2, 12, 3)
    within = batch.rewards - torch.tensor([[0.0], [1000.0]])
    assert ((within >= 500) == (torch.arange(12) >= 3)).all()
    assert torch.equal(batch.actions[..., 1], batch.rewards)
    plain = low._flat.draw(12, 2)
    assert [column.stride() for column in batch] == [column.stride() for column in plain]  # compiled code fits both


def test_a_source_without_a_share_is_not_asked() -> None:
    empty = ReplayBuffer(2, 5, 3, 2)
    batch = MixedSource([empty, filled(7, 7)], [0.0, 1.0]).draw(8, 2, torch.Generator().manual_seed(0))
    assert batch.rewards.shape == (2, 8)
