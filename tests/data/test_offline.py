from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffrl.data.offline import BOTH_STAND_IN, MADE_STAND_IN, STAND_IN, OfflineDataset, count_timeouts
from diffrl.support.errors import DataError


def test_episodes_end_at_terminals_timeouts_and_the_last_row(make):
    dataset = make([3, 1, 2, 4], "to--"[:2] + "t-")
    assert dataset.episodes().tolist() == [[0, 3], [3, 4], [4, 6], [6, 10]]
    assert dataset.n_episodes == 4
    assert dataset.episode_lengths().tolist() == [3, 1, 2, 4]


def test_returns_sum_each_episode_s_rewards(make):
    dataset = make([3, 1, 2], "tot")
    assert dataset.episode_returns().tolist() == [0.5 * (0 + 1 + 2), 0.5 * 3, 0.5 * (4 + 5)]


def test_episode_indices_are_the_episode_and_the_time_in_it(make):
    dataset = make([3, 2], "t-")
    episodes, steps = dataset.episode_indices()
    np.testing.assert_array_equal(np.stack([episodes, steps], 1), dataset.observations[:, :2])


def test_derived_successors_never_cross_an_end(make):
    dataset = make([4, 1, 3, 2], "otot")
    following, known = dataset.successors()
    assert known.tolist() == [True] * 3 + [False] + [True] + [True] * 2 + [False] + [True] * 2
    inside = known & ~dataset.terminals
    np.testing.assert_array_equal(following[inside], dataset.observations[inside] + np.float32([0, 1, 1]))
    np.testing.assert_array_equal(following[dataset.terminals], dataset.observations[dataset.terminals])


def test_a_last_row_that_is_cut_off_has_no_successor_but_a_terminal_one_needs_none(make):
    assert not make([3], "-").successors()[1][-1]
    assert make([3], "t").successors()[1][-1]


def test_a_row_left_out_makes_the_one_before_it_its_episode_s_last(make):
    dataset = make([4, 1, 3, 2], "otot").with_successors()
    assert dataset.observations[:, 2].tolist() == [0, 1, 2, 4, 5, 6, 8, 9]
    assert np.flatnonzero(dataset.timeouts).tolist() == [2, 5]
    assert np.flatnonzero(dataset.terminals).tolist() == [3, 7]
    inside = ~dataset.terminals
    np.testing.assert_array_equal(
        dataset.next_observations[inside], dataset.observations[inside] + np.float32([0, 1, 1])
    )
    assert not dataset.has_terminal_next
    assert make([4, 2], "ot", has_next=True).with_successors().has_terminal_next


def test_stand_ins_are_declared_where_a_terminal_row_has_one(make):
    derived = make([3, 2], "to").with_successors()
    assert derived.metadata["terminal_successors"] == STAND_IN
    assert "terminal_successors" not in derived.head(2).metadata, "the terminal row is gone"
    assert "terminal_successors" not in make([3, 2], "oo").with_successors().metadata
    for said in (STAND_IN, MADE_STAND_IN, BOTH_STAND_IN):
        known = replace(make([3, 2], "to", has_next=True), metadata={"terminal_successors": said})
        assert not known.has_terminal_next
        assert known.with_successors().metadata["terminal_successors"] == said


@pytest.mark.parametrize(("rows", "real", "made"), [(2, 2, 0), (4, 4, 0), (5, 4, 1), (7, 4, 3)])
def test_what_the_first_rows_say_of_their_making_holds_of_them(make, rows, real, made):
    about = {"real_rows": 4, "synthetic_rows": 3, "algorithm": "SynthER", "fidelity": "no fault found"}
    about |= {
        "model": "{}",
        "blocks": "{}",
        "flow": "{}",
        "fidelity_says": "...",
        "description": "3 synthetic transitions, after 4 real ones",
        "source": "x",
    }
    found = replace(make([4, 1, 1, 1], "tttt"), metadata=about).head(rows).metadata
    assert (found["real_rows"], found["synthetic_rows"], found["source"]) == (real, made, "x")
    cut = "" if rows == 7 else f"the first {rows} rows of: "
    assert found["description"] == cut + about["description"]
    of_model = {"algorithm", "model", "fidelity", "fidelity_says", "blocks", "flow"}
    assert of_model & found.keys() == (of_model if made else set())
    twice = replace(make([4, 1, 1, 1], "tttt"), metadata=about | {"source_rows": 6}).head(rows).metadata
    assert of_model & twice.keys() == (of_model if rows == 7 else set()), "the source had two synthetic rows"
    others = {"description": "a walk", "algorithm": "SAC"}
    assert replace(make([4], "t"), metadata=others).head(2).metadata == others


def test_of_real_rows_alone_nothing_is_said_of_generated_stand_ins(make):
    about = {"real_rows": 4, "synthetic_rows": 2, "terminal_successors": BOTH_STAND_IN}
    both = replace(make([2, 2, 1, 1], "tttt", has_next=True), metadata=about)
    for rows, said in ((3, STAND_IN), (4, STAND_IN), (5, BOTH_STAND_IN)):
        assert both.head(rows).metadata["terminal_successors"] == said
        assert not both.head(rows).has_terminal_next


def test_stored_successors_are_known_even_at_timeouts(make):
    dataset = make([2, 2], "oo", has_next=True)
    following, known = dataset.successors()
    assert known.all()
    np.testing.assert_array_equal(following, dataset.next_observations)


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 7))
def test_counted_timeouts_agree_with_counting_steps_one_by_one(ends, limit):
    terminals = np.array(ends)
    expected, step = [], 0
    for terminal in terminals:
        step += 1
        expected.append(step == limit and not terminal)
        if terminal or step == limit:
            step = 0
    assert count_timeouts(terminals, limit).tolist() == expected


def test_head_marks_the_cut_as_a_timeout(make):
    dataset = make([4, 4], "tt", has_next=True).head(6)
    assert len(dataset) == len(dataset.next_observations) == 6
    assert dataset.timeouts.tolist() == [False] * 5 + [True]
    assert make([4, 4], "tt").head(4).timeouts.sum() == 0
    assert make([4], "t").head(9).timeouts.sum() == 0
    with pytest.raises(DataError, match="at least 1"):
        dataset.head(0)


def test_a_sound_data_set_has_no_problems(make):
    dataset = make([3, 2], "to", has_next=True)
    assert dataset.problems() == []
    assert dataset.validate("name") is dataset


def damaged(dataset: OfflineDataset, key: str, row: int, value: float) -> OfflineDataset:
    column = getattr(dataset, key).copy()
    column.reshape(len(column), -1)[row, -1] = value
    return replace(dataset, **{key: column})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "next_observations"])
def test_values_that_are_not_finite_are_named_by_key_and_row(make, key, value):
    with pytest.raises(DataError, match=rf"file\.hdf5: {key}: row 3 holds {value}") as error:
        damaged(make([5], "t", has_next=True), key, 3, value).validate("file.hdf5")
    assert "expected finite" in str(error.value)


def test_actions_out_of_range_are_named_unless_any_range_is_allowed(make):
    dataset = damaged(make([5], "t"), "actions", 2, -1.5)
    with pytest.raises(DataError, match=r"actions: row 2 holds -1\.5 .*\[-1, 1\]"):
        dataset.validate("file")
    assert dataset.problems(action_limit=None) == []
    assert dataset.problems(action_limit=1.5) == []
    assert dataset.clip_actions().problems() == []


def test_of_columns_that_differ_in_length_the_odd_one_is_blamed(make):
    dataset = replace(make([6000], "t"), rewards=np.zeros(100, np.float32))
    said = "rewards: 100 rows; expected 6,000, as in most other columns. The file may be cut short."
    assert dataset.structural_problems() == [said]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"observations": np.zeros((4, 3), np.float32)}, "observations: 4 rows; expected 5"),
        ({"observations": np.zeros((5, 2, 2), np.float32)}, r"observations: shape \(5, 2, 2\)"),
        ({"actions": np.zeros((5, 0), np.float32)}, r"actions: shape \(5, 0\)"),
        ({"terminals": np.zeros((5, 2), bool)}, r"terminals: shape \(5, 2\); expected \(5,\)"),
        ({"next_observations": np.zeros((5, 2), np.float32)}, r"next_observations: shape \(5, 2\)"),
        ({"rewards": np.zeros(0, np.float32)}, "0 rows"),
    ],
)
def test_shapes_and_lengths_that_do_not_fit_are_named(make, change, text):
    with pytest.raises(DataError, match=text):
        replace(make([5], "t"), **change).validate("file")


def test_columns_may_be_lists_tensors_and_arrays_of_other_types(make):
    """They are what they would be read as from a file; arrays of the right type are not copied."""
    dataset = make([3, 2], "to", has_next=True)
    columns = dataset.columns()
    for form in (
        lambda values: values.tolist(),
        torch.from_numpy,
        lambda values: values.astype(np.uint8 if values.dtype == bool else np.float64),
    ):
        found = OfflineDataset(**{name: form(values) for name, values in columns.items()}).columns()
        for name, values in columns.items():
            np.testing.assert_array_equal(found[name], values)
            assert found[name].dtype == values.dtype
    same = OfflineDataset(**columns).columns()
    assert all(same[name] is values for name, values in columns.items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"timeouts": None},
            "timeouts is None; .* one row a time step, all False where",
        ),
        ({"rewards": None}, "rewards is None; expected an array"),
        ({"terminals": np.array([0, 0, 0, 0, 2])}, "terminals holds 2; expected true or false"),
        ({"timeouts": [0.0, 0.0, 0.5, 0.0, 1.0]}, "timeouts holds 0.5"),
        ({"observations": [[1.0], [1.0, 2.0]]}, "observations holds no array of numbers"),
        ({"observations": np.array(["a"] * 5)}, "observations holds no array of numbers"),
        ({"rewards": torch.ones(5, requires_grad=True)}, "rewards holds no array of numbers"),
        ({"rewards": 1.0}, "rewards: shape"),
        ({"actions": np.zeros((5, 1), np.int64)}, r"actions are whole numbers \(int64\), 0; .*discrete actions"),
        ({"actions": [[0], [1], [0], [1], [1]]}, "actions are whole numbers .*, 0, 1; "),
    ],
    ids=str,
)
def test_what_is_no_column_is_refused_in_a_sentence(make, changes, said):
    with pytest.raises(DataError, match=said):
        OfflineDataset(**(make([3, 2], "to").columns() | changes))


def test_a_data_set_prints_its_sizes(make):
    dataset = make([3, 2], "to")
    sizes = f"{dataset.observation_size} -> {dataset.action_size}"
    assert repr(dataset) == f"OfflineDataset(5 rows, 2 episodes, {sizes})"
    assert repr(dataset.head(1)) == f"OfflineDataset(1 row, 1 episode, {sizes})"
    misfit = repr(replace(dataset, rewards=dataset.rewards[1:]))
    assert "rewards (4,)" in misfit
    assert "observations (5, 3)" in misfit
    assert "(0,)" in repr(OfflineDataset(*(np.zeros((0, 1), np.float32),) * 2, np.zeros(0), *(np.zeros(0, bool),) * 2))
