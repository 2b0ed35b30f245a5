from dataclasses import replace

import numpy as np
import pytest
import torch

from diffrl.data.transitions import Transitions
from diffrl.support.errors import DataError


def test_columns_are_the_data_set_s(make):
    dataset = make([3, 4], "tt", has_next=True)
    columns = Transitions.from_dataset(dataset).columns
    for key in ("observations", "actions", "rewards", "next_observations"):
        np.testing.assert_array_equal(getattr(columns, key), getattr(dataset, key))
    np.testing.assert_array_equal(columns.terminals, dataset.terminals.astype(np.float32))
    np.testing.assert_array_equal(torch.stack([columns.episodes, columns.steps], 1), dataset.observations[:, :2])


def test_rows_without_a_known_successor_are_dropped_and_no_pair_crosses_an_end(make):
    columns = Transitions.from_dataset(make([4, 1, 3, 5], "oot-")).columns
    assert columns.observations[:, 2].tolist() == [0, 1, 2, 5, 6, 7, 8, 9, 10, 11]
    inside = columns.terminals == 0
    step = columns.next_observations[inside] - columns.observations[inside]
    assert (step == torch.tensor([0.0, 1.0, 1.0])).all()
    assert columns.observations[~inside][:, 2].tolist() == [7]


def test_a_row_cut_off_stays_where_its_next_observation_is_stored(make):
    """With the stored one, to bootstrap from. D4RL's `qlearning_dataset` drops rows 3 and 6."""
    columns = Transitions.from_dataset(make([4, 3, 2], "oot", has_next=True)).columns
    assert columns.observations[:, 2].tolist() == list(range(9))
    step = columns.next_observations - columns.observations
    assert (step == torch.tensor([0.0, 1.0, 1.0])).all()
    assert columns.terminals.nonzero().flatten().tolist() == [8]
    without = Transitions.from_dataset(make([4, 3, 2], "oot")).columns
    assert without.observations[:, 2].tolist() == [0, 1, 2, 4, 5, 7, 8]


def test_no_row_left_is_an_error(make):
    with pytest.raises(DataError, match="known successor"):
        Transitions.from_dataset(make([1, 1], "oo"))


def test_a_batch_holds_whole_rows_for_every_seed(make):
    transitions = Transitions.from_dataset(make([50, 50], "tt", has_next=True))
    batch = transitions.draw(32, 3, torch.Generator().manual_seed(0))
    assert batch.observations.shape == batch.next_observations.shape == (3, 32, 3)
    assert batch.actions.shape == (3, 32, 2)
    assert batch.rewards.shape == batch.terminals.shape == batch.episodes.shape == batch.steps.shape == (3, 32)
    row = batch.observations[..., 2]
    torch.testing.assert_close(batch.rewards, 0.5 * row)
    torch.testing.assert_close(batch.actions, torch.stack([row, 2 * row], -1).sin())
    torch.testing.assert_close(batch.next_observations[..., 2], row + 1)
    assert batch.observations.untyped_storage().data_ptr() == batch.rewards.untyped_storage().data_ptr()


def test_the_generator_decides_the_batch_and_seeds_differ(make):
    transitions = Transitions.from_dataset(make([1000], "t"))
    first, again, other = (transitions.draw(64, 2, torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(first.observations, again.observations)
    assert not torch.equal(first.observations, other.observations)
    assert not torch.equal(first.observations[0], first.observations[1])


def test_sampling_is_uniform(make):
    transitions = Transitions.from_dataset(make([20], "t"))
    rows = transitions.draw(20_000, 2, torch.Generator().manual_seed(0)).steps.long()
    for seed in range(2):
        counts = torch.bincount(rows[seed], minlength=20).double()
        chi_squared = ((counts - 1000) ** 2 / 1000).sum()
        assert chi_squared < 43.8  # 19 degrees of freedom, p = .001


def test_a_row_that_is_both_terminal_and_timeout_is_a_terminal(make):
    dataset = make([3, 3], "tt")
    columns = Transitions.from_dataset(replace(dataset, timeouts=dataset.terminals)).columns
    assert columns.terminals.tolist() == [0, 0, 1, 0, 0, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_rows_and_indices_stay_on_the_device(make):
    transitions = Transitions.from_dataset(make([100], "t"), "cuda")
    batch = transitions.draw(8, 2, torch.Generator("cuda").manual_seed(0))
    assert batch.observations.device.type == "cuda"
