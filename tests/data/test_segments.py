"""Laws of segments: all windows of all episodes, none across an end, drawn uniformly, equal to the data set's rows."""

import math

import numpy as np
import pytest
import torch

from diffrl.augment.columns import as_dataset
from diffrl.data.segments import Segments, SegmentSource, Windows
from diffrl.data.transitions import Transitions
from diffrl.support.errors import DataError

LENGTHS = [7, 2, 5, 4]
ENDS = "toto"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def everything(source: SegmentSource) -> Segments:
    """All W segments, without the seeds axis."""
    return source.gather(torch.arange(len(source)))


@pytest.mark.parametrize("horizon", [1, 2, 4, 5, 7])
def test_windows_are_those_that_lie_within_an_episode(make, horizon):
    dataset = make(LENGTHS, ENDS)
    windows = Windows.of(dataset.episodes(), horizon)
    episode, _ = dataset.episode_indices()
    expected = [i for i in range(18 - horizon + 1) if episode[i] == episode[i + horizon - 1]]
    assert windows.starts.tolist() == expected
    assert len(windows) == sum(max(n - horizon + 1, 0) for n in LENGTHS)
    assert (episode[windows.lasts] == episode[windows.starts]).all()


@pytest.mark.parametrize("horizon", [1, 3, 10])
def test_with_padding_every_row_starts_a_window(make, horizon):
    windows = Windows.of(make(LENGTHS, ENDS).episodes(), horizon, pad=True)
    assert windows.starts.tolist() == list(range(sum(LENGTHS)))


def test_whole_episodes_are_windows_from_their_first_rows(make):
    dataset = make(LENGTHS, ENDS)
    segments = everything(SegmentSource.from_dataset(dataset, Windows.whole(dataset.episodes())))
    assert segments.starts.tolist() == [0, 7, 9, 14]
    assert segments.mask.sum(-1).tolist() == LENGTHS
    np.testing.assert_array_equal((segments.rewards * segments.mask).sum(-1).numpy(), dataset.episode_returns())
    assert Windows.whole(dataset.episodes(), 3).horizon == 3


@pytest.mark.parametrize("pad", [False, True])
def test_segments_are_the_data_set_s_rows_and_never_cross_an_end(make, pad):
    dataset = make(LENGTHS, ENDS)
    segments = everything(SegmentSource.from_dataset(dataset, 4, pad=pad))
    assert segments.mask.all() == (not pad)
    stops = dict(dataset.episodes().tolist())
    for i, start in enumerate(segments.starts.tolist()):
        last = next(stop for first, stop in stops.items() if first <= start < stop) - 1
        rows = [min(start + h, last) for h in range(4)]
        for name in ("observations", "actions", "rewards"):
            np.testing.assert_array_equal(getattr(segments, name)[i].numpy(), getattr(dataset, name)[rows])
        assert segments.mask[i].tolist() == [float(start + h <= last) for h in range(4)]


def test_a_batch_has_its_axes_and_every_seed_its_own_rows(make):
    source = SegmentSource.from_dataset(make([50, 60], "tt"), 8)
    batch = source.draw(16, 3, generator())
    assert [tuple(v.shape) for v in batch] == [(3, 16, 8, 3), (3, 16, 8, 2), (3, 16, 8), (3, 16, 8), (3, 16)]
    assert all(v.dtype == torch.float32 for v in batch[:4])
    assert (batch.starts[0] != batch.starts[1]).any()
    row = batch.observations[..., 2]
    assert torch.equal(row, batch.starts[..., None] + torch.arange(8.0))
    torch.testing.assert_close(batch.rewards, 0.5 * row)


def test_the_generator_decides_the_batch(make):
    source = SegmentSource.from_dataset(make([50, 60], "tt"), 8)
    first, again, other = (source.draw(16, 2, generator(seed)) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.starts, other.starts)


@pytest.mark.parametrize("pad", [False, True])
def test_windows_are_drawn_uniformly(make, pad):
    """Counts of n draws from W windows: chi-squared of W - 1 degrees, of mean W - 1 and variance 2 (W - 1)."""
    source = SegmentSource.from_dataset(make(LENGTHS, ENDS), 3, pad=pad)
    n, windows = 50_000, len(source)
    assert windows == (18 if pad else 5 + 0 + 3 + 2)
    starts = source.draw(n // 2, 2, generator()).starts.flatten()
    counts = torch.bincount(starts, minlength=18)[torch.from_numpy(source.windows.starts)]
    assert counts.sum() == n
    chi_squared = ((counts - n / windows) ** 2 / (n / windows)).sum().item()
    assert abs(chi_squared - (windows - 1)) < 5 * math.sqrt(2 * (windows - 1))


def test_transitions_segments_share_their_memory_and_break_where_rows_are_missing(make):
    """Without next observations the last row of a timeout is not among the transitions, so that 7, 5 become 6, 4."""
    dataset = make([7, 5, 4], "oto")
    transitions = Transitions.from_dataset(dataset)
    source = SegmentSource.from_transitions(transitions, 3)
    assert source.rows.untyped_storage().data_ptr() == transitions.rows.untyped_storage().data_ptr()
    assert len(source) == 4 + 3 + 1
    segments = everything(source)
    numbers, steps = segments.observations[..., 0], segments.observations[..., 1]
    assert (numbers == numbers[:, :1]).all()
    assert (steps[:, 1:] == steps[:, :-1] + 1).all()
    batch = transitions.gather(segments.starts)
    torch.testing.assert_close(segments.observations[:, 0], batch.observations, rtol=0, atol=0)
    torch.testing.assert_close(segments.rewards[:, 0], batch.rewards, rtol=0, atol=0)


def test_a_gap_inside_of_an_episode_ends_a_segment(make):
    transitions = Transitions.from_dataset(make([10], "t"))
    rows = torch.cat([transitions.rows[:4], transitions.rows[6:]])
    source = SegmentSource.from_transitions(Transitions(rows, 3, 2), 3)
    assert source.windows.starts.tolist() == [0, 1, 4, 5]


def test_windows_are_not_copied(make):
    """The source holds each row once, and two numbers a window."""
    dataset = make([1000], "t")
    source = SegmentSource.from_dataset(dataset, 500)
    held = [v for v in vars(source).values() if isinstance(v, torch.Tensor)]
    assert sum(v.nbytes for v in held) == 1000 * (3 + 2 + 1) * 4 + 2 * 501 * 8 + 500 * 8


def test_a_segment_longer_than_every_episode_is_one_clear_line(make):
    dataset = make(LENGTHS, ENDS)
    with pytest.raises(DataError, match=r"No episode has the 8 rows of a segment: the longest of 4 has 7\.") as error:
        SegmentSource.from_dataset(dataset, 8)
    assert "\n" not in str(error.value)
    assert len(SegmentSource.from_dataset(dataset, 8, pad=True)) == 18


@pytest.mark.parametrize("pad", [False, True])
def test_generated_rows_have_no_episodes_to_take_segments_from(pad):
    """As SynthER writes them: each row an episode of its own."""
    rows = torch.rand(20, 2 * 3 + 2 + 4)
    rows[:, -3] = (rows[:, -3] > 0.5).float()
    dataset = as_dataset(Transitions(rows, 3, 2), {})
    assert dataset.n_episodes == 20
    with pytest.raises(DataError, match="These data have no episodes: each of 20 rows"):
        SegmentSource.from_dataset(dataset, 2, pad=pad)
    with pytest.raises(DataError, match="no episodes"):
        Windows.whole(dataset.episodes(), 2)
    assert len(SegmentSource.from_dataset(dataset, 1)) == 20


@pytest.mark.parametrize("horizon", [0, -3])
def test_a_segment_has_rows(make, horizon):
    with pytest.raises(DataError, match="expected at least 1"):
        Windows.of(make([3], "t").episodes(), horizon)


def test_no_rows_have_no_segments():
    with pytest.raises(DataError, match="no rows"):
        Windows.of(np.zeros((0, 2), np.int64), 3)
    with pytest.raises(DataError, match="no rows"):
        Windows.whole(np.zeros((0, 2), np.int64))
