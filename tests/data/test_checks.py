"""What data say against themselves or their environment is found, and only that; rows are taken as they should be.

The inputs are those of ../shared/cases: one experience of Pendulum-v1 as other programs write it.
"""

import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest
import torch

from diffrl.data import d4rl
from diffrl.data.arrays import discrete_values
from diffrl.data.checks import Finding, Known, Taken, _observed, counted_limit, examine, take
from diffrl.data.fidelity import LOOK_FIRST, NO_FAULT, NOT_MEASURED, USELESS, Verdict
from diffrl.data.offline import OfflineDataset
from diffrl.data.transitions import Transitions
from diffrl.support.errors import DataError, UserError
from tests.data.pendulum import ENDS, Columns, cases, pendulum

MAKE = Path(__file__).parents[2].parent / "shared" / "cases" / "make.py"
AS_THEY_STAND = Taken()


@pytest.fixture(scope="module")
def data() -> Columns:
    return pendulum()


@pytest.fixture(scope="module")
def env() -> Iterator[gymnasium.Env]:
    made = gymnasium.make("Pendulum-v1")
    yield made
    made.close()


@pytest.fixture
def written(data, tmp_path):
    """A function that writes columns as another program would, and gives what is read of them."""

    def write(columns: Columns | str) -> OfflineDataset:
        with h5py.File(tmp_path / "data.hdf5", "w") as file:
            for key, values in (cases(data)[columns] if isinstance(columns, str) else columns).items():
                file[key] = values
        return d4rl.read(tmp_path / "data.hdf5", action_limit=None)

    return write


def found(dataset: OfflineDataset, env: gymnasium.Env | None, taken: Taken = AS_THEY_STAND) -> list[Finding]:
    return examine(dataset, Known.of(dataset, env), taken)


def as_taken(dataset: OfflineDataset, env: gymnasium.Env | None, taken: Taken = AS_THEY_STAND) -> OfflineDataset:
    """The data set as a run takes it: counted where it has to be."""
    known = Known.of(dataset, env)
    return take(dataset, known, replace(taken, counted=counted_limit(dataset, known, taken)))


def assert_same_columns(one: OfflineDataset, other: OfflineDataset, but: tuple[str, ...] = ()) -> None:
    for key in ("observations", "actions", "rewards", "terminals", "timeouts"):
        if key not in but:
            np.testing.assert_array_equal(getattr(one, key), getattr(other, key), err_msg=key)


# --- ends of episodes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["truncations", "truncated", "timeout", "Truncation", "dones", "is_last", "is_first"])
def test_a_column_of_another_name_that_marks_ends_is_taken(written, data, env, name):
    starts = np.concatenate([[True], data["timeouts"][:-1]])
    plain = {k: v for k, v in data.items() if k != "timeouts"}
    dataset = written(plain | {name: starts if name == "is_first" else data["timeouts"].astype(np.uint8)[:, None]})
    last = ENDS[:-1] if name == "is_first" else ENDS  # what comes after the last row, no column of starts tells
    np.testing.assert_array_equal(np.flatnonzero(dataset.timeouts), last)
    assert dataset.n_episodes == 10
    assert dataset.metadata["timeouts"] == f"from the file's column {name!r}"
    assert found(dataset, env) == []


def test_all_ends_that_are_marked_once_more_say_nothing_new(written, data, env):
    for name in ("dones", "truncated", "is_last"):
        assert_same_columns(written(data | {name: data["timeouts"]}), written(data))
    ended = data | {"terminals": data["timeouts"], "dones": data["timeouts"]}
    assert written({k: v for k, v in ended.items() if k != "timeouts"}).timeouts.sum() == 0


@pytest.mark.parametrize(
    ("column", "row", "text"),
    [
        ("dones", 7, "dones contradicts terminals, timeouts: row 7 is an end by dones, no end by terminals, timeouts"),
        ("truncated", 7, "row 7 is an end by truncated"),
        ("truncated", 399, "row 399 is no end by truncated, an end by terminals, timeouts"),
        ("is_terminal", 7, "is_terminal contradicts terminals: row 7 is an end"),
    ],
)
def test_columns_that_contradict_one_another_are_refused_by_name_and_row(written, data, column, row, text):
    marks = np.zeros(2000, bool) if column == "is_terminal" else data["timeouts"].copy()
    marks[row] = ~marks[row]
    with pytest.raises(DataError, match=text):
        written(data | {column: marks})


def test_a_column_of_ends_that_does_not_fit_is_refused_by_name(written, data):
    for values in (np.zeros(40, bool), np.array([b"no"] * 2000)):
        with pytest.raises(DataError, match=r"truncations(: shape| has type) .*expected (a mark for each row|numbers)"):
            written(data | {"truncations": values})
    assert written(data | {"timeout": np.float32(200)}).n_episodes == 10  # a setting, no column


def test_without_marks_the_environments_limit_counts_and_that_is_said(written, env):
    dataset, right = written("no_marks"), written("truncations")
    assert_same_columns(as_taken(dataset, env), right)
    assert_same_columns(as_taken(replace(dataset, metadata={}), env), right)  # a column of False alone marks nothing
    counted = counted_limit(dataset, Known.of(dataset, env), AS_THEY_STAND)
    assert counted == 200
    (finding,) = found(dataset, env, Taken(counted=counted))
    assert "longest episode has 2,000 steps, more than the limit of 200 of Pendulum-v1" in finding.sentence
    assert "10 episodes" in finding.sentence
    assert finding.severity == "warning"


def test_a_first_part_of_data_without_marks_is_counted_too(written, env):
    """The last row of a part is marked, since it ends an episode; that marks no other."""
    whole = written("no_marks")
    for rows in (1201, 1999):
        part = whole.head(rows)
        assert counted_limit(part, Known.of(part, env), AS_THEY_STAND) == 200
        assert as_taken(part, env).n_episodes == -(-rows // 200)


def test_a_limit_for_evaluations_is_not_that_of_the_data(written):
    dataset = written("no_marks")
    longer = gymnasium.make("Pendulum-v1", max_episode_steps=1000)
    assert Known.of(dataset, longer).limit == 1000
    assert Known.of(dataset, longer, asked=1000).limit == 200
    longer.close()


def test_without_marks_and_without_an_environment_it_is_said_that_all_is_one_episode(written, data):
    dataset = written(cases(data)["no_marks"] | {"actions": data["actions"] / 2})
    assert [(f.severity, "all 2,000 rows are one episode" in f.sentence) for f in found(dataset, None)] == [
        ("note", True)
    ]
    assert as_taken(dataset, None).n_episodes == 1


def test_marks_are_not_overruled_by_a_limit(written, data, env):
    """Such as those of data that were recorded with another limit: they are said to be longer, no more."""
    longer = data["timeouts"].copy()
    longer[199] = False
    dataset = written({k: v for k, v in data.items() if k != "next_observations"} | {"timeouts": longer})
    assert as_taken(dataset, env).episode_lengths().max() == 400
    assert [(f.severity, "has 400 steps" in f.sentence) for f in found(dataset, env)] == [("note", True)]


def test_next_observations_that_contradict_the_next_row_are_reported_by_row_and_cut(written, data):
    dataset = written(cases(data)["no_marks_next"] | {"actions": data["actions"] / 2})
    np.testing.assert_array_equal(dataset.contradicted_rows(), ENDS[:-1])
    (finding,) = found(dataset, None)
    assert "9 rows (199, 399, 599, 799, 999 and 4 more) are contradicted" in finding.sentence
    assert finding.severity == "warning"
    cut = as_taken(dataset, None, Taken(cut_contradictions=True))
    np.testing.assert_array_equal(np.flatnonzero(cut.timeouts), ENDS[:-1])
    assert [f.severity for f in found(dataset, None, Taken(cut_contradictions=True))] == ["note"]


def test_a_count_that_contradictions_agree_with_is_only_noted(written, env):
    dataset = written("no_marks_next")
    (finding,) = found(dataset, env, Taken(counted=200))
    assert finding.severity == "note"
    assert "9 of these cuts (rows 199, 399, 599, 799, 999 and 4 more)" in finding.sentence
    assert_same_columns(as_taken(dataset, env), written("wide_actions"))


@pytest.mark.parametrize(("factor", "contradicted"), [(1e-4, False), (1e-2, True)])
def test_rounding_of_observations_is_no_contradiction(written, data, factor, contradicted):
    """The line is a thousandth of a dimension's deviation."""
    moved = data["next_observations"] + np.float32(factor) * data["observations"].std(0)
    assert (len(written(data | {"next_observations": moved}).contradicted_rows()) > 0) == contradicted


def test_next_observations_taken_across_resets_are_unknown(written, env):
    """The rest are the true transitions, and the cut rows are gone, as where no next observations are stored."""
    dataset, right = written("shifted_next"), written("truncations")
    _, known = dataset.successors()
    np.testing.assert_array_equal(np.flatnonzero(~known), ENDS)
    assert torch.equal(Transitions.from_dataset(dataset).rows, Transitions.from_dataset(right).rows)
    assert not np.isin(dataset.with_successors().observations, dataset.observations[ENDS]).all(axis=1).any()
    (finding,) = found(dataset, env)
    assert "10 cut rows (199, 399, 599, 799, 999 and 5 more)" in finding.sentence
    assert written("wide_actions").successors()[1].all()


def test_an_environment_that_goes_on_after_a_cut_has_true_successors():
    """As in maze2d: the next episode's first observation is what followed, and no reset lies between."""
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.normal(size=(2001, 2)), axis=0).astype(np.float32)
    timeouts = np.arange(1, 2001) % 50 == 0
    columns = {"actions": np.diff(walk, axis=0).clip(-1, 1), "rewards": walk[1:, 0], "timeouts": timeouts}
    dataset = OfflineDataset(walk[:-1], terminals=np.zeros(2000, bool), next_observations=walk[1:], **columns)
    assert dataset.successors()[1].all()
    assert found(dataset, None) == []
    alone = replace(dataset, timeouts=np.ones(2000, bool))  # each row an episode of its own: nothing tells
    assert alone.successors()[1].all()
    assert found(alone, None) == []


@pytest.mark.parametrize("name", ["done_is_either", "both"])
def test_time_limits_that_are_marked_as_terminal_can_be_taken_as_timeouts(written, env, name):
    dataset, right = written(name), written("wide_actions")
    (finding,) = found(dataset, env)
    assert finding.severity == "warning"
    assert finding.remedy.endswith("--time-limit-terminals timeouts.")
    what = "all 10 are at exactly 200 steps, the limit of Pendulum-v1" if name != "both" else "marked as timeouts too"
    assert what in finding.sentence
    assert_same_columns(as_taken(dataset, env, Taken("timeouts")), right)
    assert_same_columns(as_taken(dataset, env), dataset)
    assert found(dataset, env, Taken("terminals")) == []
    assert [f.severity for f in found(dataset, env, Taken("timeouts"))] == ["note"]


def test_true_ends_stay_terminal_where_time_limits_are_taken_as_timeouts(written, data, env):
    early = cases(data)["done_is_either"]["terminals"].copy()
    early[[50, 1250]] = True
    dataset = written(cases(data)["done_is_either"] | {"terminals": early})
    (finding,) = found(dataset, env)
    assert "8 of 12 are at exactly 200 steps" in finding.sentence
    taken = as_taken(dataset, env, Taken("timeouts"))
    np.testing.assert_array_equal(np.flatnonzero(taken.terminals), [50, 199, 1250, 1399])


def test_a_true_end_at_the_limit_is_no_finding_but_is_taken_as_said(written, data, env):
    """One of many that are marked as time-outs; and one alone among other true ends."""
    ends = {"terminals": data["timeouts"].copy(), "timeouts": data["timeouts"].copy()}
    ends["terminals"][ENDS[1:]], ends["timeouts"][199] = False, False
    dataset = written(data | ends)
    assert found(dataset, env) == []
    assert not as_taken(dataset, env, Taken("timeouts")).terminals.any()
    ends["terminals"][ENDS[:-1] + 51] = True
    assert found(written(data | ends), env) == []


def test_time_limits_need_a_limit(written, data):
    """Where no environment is known, it is the length that all episodes have."""
    unit = {"actions": data["actions"] / 2}
    dataset = written(cases(data)["done_is_either"] | unit)
    assert [(f.severity, f.remedy) for f in found(dataset, None)] == [("note", found(dataset, None)[0].remedy)]
    np.testing.assert_array_equal(np.flatnonzero(as_taken(dataset, None, Taken("timeouts")).timeouts), ENDS)
    early = cases(data)["done_is_either"]["terminals"].copy()
    early[50] = True
    dataset = written(cases(data)["done_is_either"] | unit | {"terminals": early})
    assert found(dataset, None) == []
    assert "no limit of steps is known" in found(dataset, None, Taken("timeouts"))[0].sentence
    assert not as_taken(dataset, None, Taken("timeouts")).timeouts.any()


# --- units of actions ----------------------------------------------------------------------------------------------


def test_actions_in_the_unit_range_of_wider_bounds_are_told_and_scaled_when_said(written, env):
    dataset = written("unit_actions")
    (finding,) = found(dataset, env)
    assert "all lie in [-1, 1]; expected [-2, 2], the bounds of Pendulum-v1" in finding.sentence
    assert (finding.severity, "--actions normalised" in finding.remedy) == ("warning", True)
    assert_same_columns(as_taken(dataset, env, Taken(actions="normalised")), written("wide_actions"))
    assert_same_columns(as_taken(dataset, env, Taken(actions="environment")), dataset)
    assert found(dataset, env, Taken(actions="environment")) == []
    assert found(dataset, None) == []


def test_normalised_actions_need_bounds_and_the_unit_range(written, env):
    with pytest.raises(UserError, match="name the environment with --env"):
        as_taken(written("unit_actions"), None, Taken(actions="normalised"))
    with pytest.raises(DataError, match=r"row 8 holds -1\.4\d+; expected \[-1, 1\]"):
        as_taken(written("wide_actions"), env, Taken(actions="normalised"))


def test_wide_actions_are_right_where_bounds_are_known(written, env, tmp_path):
    dataset = written("wide_actions")
    assert found(dataset, env) == []
    (finding,) = found(dataset, None)
    assert finding.severity == "problem"
    assert "--env ID" in finding.sentence
    dataset.metadata.update(action_low=np.float32([-2]), action_high=np.float32([2]))
    again = d4rl.read(d4rl.write(tmp_path / "bounded.hdf5", dataset))  # with no limit of its own
    assert found(again, None) == []
    again.metadata.update(action_low=-1.5, action_high=1.5)
    (finding,) = found(again, None)
    assert "--env" not in finding.sentence
    assert again.problems()[0].startswith("actions: row ")


def test_actions_beyond_narrow_bounds_may_be_scaled_ones(written, data):
    dataset = written(data | {"actions": data["actions"] / 2})
    dataset.metadata.update(action_low=-0.4, action_high=0.4)
    (finding,) = found(dataset, None)
    assert finding.severity == "problem"
    assert "--actions normalised" in finding.sentence
    taken = as_taken(dataset, None, Taken(actions="normalised"))
    np.testing.assert_allclose(taken.actions, 0.4 * dataset.actions, rtol=2 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("kind", [bool, np.int64])
def test_actions_of_whole_types_are_refused_by_their_values(written, data, kind):
    with pytest.raises(DataError, match=r"actions are (booleans, False, True|whole numbers \(int64\), 0, 1);"):
        written(data | {"actions": (data["actions"] > 0).astype(kind)})


def test_floats_that_are_few_and_whole_look_discrete(written, data):
    dataset = written(data | {"actions": (data["actions"] > 0).astype(np.float32)})
    (finding,) = found(dataset, None)
    assert str(finding) == "actions: look discrete (only 0 and 1): a continuous policy would act between them."
    assert finding.severity == "warning"
    beyond = written(data | {"actions": np.arange(2000, dtype=np.float32) % 3})
    assert "Their values are 0, 1, 2 alone: discrete actions" in found(beyond, None)[0].sentence
    for continuous in ([-1, 1, -1], [-2, 0, 2], [0, 0, 0], [0, 1, 0.5], range(40)):
        assert discrete_values(np.float32(continuous)) is None


# --- observations, and data that teach nothing -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["standardised", "scaled"])
def test_observations_outside_their_environments_bounds_are_told_in_one_line(written, data, env, how):
    raw = data["observations"]
    mean, deviation = (raw.mean(0), raw.std(0)) if how == "standardised" else (0, np.float32([0.5, 0.5, 1]))
    odd = (raw - mean) / deviation
    columns = {k: v for k, v in data.items() if k != "next_observations"}
    (finding,) = found(written(columns | {"observations": odd}), env)
    most = int((np.abs(odd[:, :2]) > 1).sum(0).argmax())
    n = int((np.abs(odd) > [1, 1, 8]).any(1).sum())
    expected = f"observations: {n:,} of 2,000 rows lie outside the bounds of Pendulum-v1: dimension {most} has "
    assert finding.severity == "warning"
    assert finding.sentence.startswith(expected)
    assert finding.sentence.endswith("expected [-1, 1].")
    assert ("standardised" in finding.remedy) == (how == "standardised")


def test_rounding_is_within_the_bounds_of_observations_and_infinite_ones_bound_nothing(written, data, env):
    edge = data["observations"].copy()
    edge[:, 0] = np.nextafter(np.float32(1), np.float32(2))
    columns = {k: v for k, v in data.items() if k != "next_observations"} | {"observations": edge}
    assert found(written(columns), env) == []
    wide = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    free = gymnasium.wrappers.TransformObservation(gymnasium.make("Pendulum-v1"), lambda seen: seen, wide)
    assert found(written(columns | {"observations": 100 * edge}), free) == []


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("largest", [np.finfo(np.float32).max, 1e30, np.inf])
def test_the_largest_float32_bounds_nothing(written, data, largest):
    high = np.array([largest, 1, largest], np.float32)
    bounded = gymnasium.wrappers.TransformObservation(
        gymnasium.make("Pendulum-v1"), lambda seen: seen, gymnasium.spaces.Box(-high, high, (3,), np.float32)
    )
    columns = {k: v for k, v in data.items() if k != "next_observations"}
    far = columns | {"observations": data["observations"] * np.float32([1e29, 1, 1e31])}
    assert [one for one in found(written(far), bounded) if "overflow" not in one.sentence] == []
    (finding,) = found(written(columns | {"observations": data["observations"] * 2}), bounded)
    assert "dimension 1 has" in finding.sentence
    low, high = Known.of(written(columns), bounded).observations
    assert low.tolist() == [-np.inf, -1, -np.inf]
    assert high.dtype == np.float32


def test_looking_at_observations_takes_no_copy_of_them_in_double_precision(make):
    env = gymnasium.make("Pendulum-v1")
    dataset = make([1000] * 200, "o" * 200)
    observations, actions = np.full((200_000, 3), 2, np.float32), np.zeros((200_000, 1), np.float32)
    dataset = replace(dataset, observations=observations, actions=actions)
    known = Known.of(dataset, env)
    tracemalloc.start()
    assert "expected [-1, 1]" in _observed(dataset, known)[0].sentence
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < dataset.observations.nbytes  # the flags of what lies outside, and a sample


def test_data_that_teach_nothing_are_told_in_a_line_each(written, data, env):
    same = np.full_like(data["actions"], 1.5)
    (finding,) = found(written(data | {"rewards": np.zeros(2000)}), env)
    assert finding.severity == "note"  # some agents need none, and --rows may have cut the others
    assert finding.sentence.startswith(
        "rewards: all 2,000 of the rows read are 0: of diffrl's agents only bc, diffusion_bc and diffuser "
    )
    (finding,) = found(written(data | {"actions": same}), env)
    assert "actions: all 2,000 rows hold the same one, 1.5." in finding.sentence
    ones = {name: np.ones_like(data[name]) for name in ("observations", "next_observations") if name in data}
    still = found(written(data | ones), env)
    assert [finding.sentence for finding in still if "next_observations" in finding.sentence] == []
    assert any("observations: all 2,000 rows hold the same one, 1, 1" in finding.sentence for finding in still)
    one = {key: values[:1] for key, values in data.items()}
    single = [finding for finding in found(written(one), env) if finding.sentence.startswith("rows:")]
    assert [(finding.sentence, finding.severity) for finding in single] == [
        ("rows: a single transition was read.", "warning")
    ]
    nearly = np.zeros(2000)
    nearly[7] = 1  # a sparse reward is one
    assert found(written(data | {"rewards": nearly}), env) == []
    assert (
        found(written(data | {"rewards": np.ones(2000)}), env) == []
    )  # as of a task that lasts as long as it goes well


def test_what_train_refuses_is_a_problem(make):
    """Rows without any successor; with stored next observations they have one."""
    for rows, has_next, n in ((30, False, 1), (30, True, 0)):
        dataset = make([1] * rows, "o" * rows, has_next=has_next)
        problems = [finding for finding in found(dataset, None) if finding.severity == "problem"]
        assert len(problems) == n
        if n:
            assert problems[0].sentence.startswith(
                "timeouts: no row has a known successor: each of the 30 is a timeout"
            )
            with pytest.raises(DataError, match="None of the 30 rows has a known successor"):
                Transitions.from_dataset(dataset)


@pytest.mark.parametrize("has_next", [False, True])
def test_marks_of_what_goes_on_are_not_taken_for_ends_in_silence(make, has_next):
    """As 1 - done is stored; of data whose episodes end half of the rows nothing is said."""
    for ends, said in (("t" * 30, "30 of 30"), ("tttttttttot" * 3, "30 of 33")):
        (finding,) = [one for one in found(make([1] * len(ends), ends, has_next), None) if "1 - done" in one.remedy]
        assert finding.severity == "note"
        assert f"terminals: {said} rows are terminal" in finding.sentence
    assert found(make([2] * 20, "t" * 20, has_next), None) == []


def test_values_whose_squares_overflow_are_told(make):
    dataset = make([30, 30], "oo", has_next=True)
    observations = dataset.observations.copy()
    observations[:, 1] = -1e30
    for changes, which in (
        ({"observations": observations}, "dimension 1 reaches 1e+30"),
        ({"rewards": dataset.rewards + 3e19}, "reach 3e+19"),
    ):
        (finding,) = [
            one
            for one in found(replace(dataset, **changes, next_observations=None), None)
            if "overflow" in one.sentence
        ]
        assert finding.severity == "note"
        assert which in finding.sentence
    assert np.square(1.8e19) < np.finfo(np.float32).max < np.square(1.9e19)


def test_pictures_are_told_by_their_values(make):
    """Whole numbers from 0 to 255, many a row; not marks of 0 and 1, few numbers, or real ones."""
    dataset, rng = make([30, 30], "oo"), np.random.default_rng(0)
    for values, n in (
        (rng.integers(0, 256, (60, 192)), 1),
        (rng.integers(0, 256, (60, 12)), 0),
        (rng.integers(0, 2, (60, 192)), 0),
        (rng.uniform(0, 255, (60, 192)), 0),
    ):
        said = [str(one) for one in found(replace(dataset, observations=values.astype(np.float32)), None)]
        assert len(said) == n
        assert all("192 whole numbers from 0 to 255, as pixels are. Networks here are MLPs" in one for one in said)


# --- no false alarms ------------------------------------------------------------------------------------------------


def test_sound_data_give_no_findings(make):
    sound = [
        make([3, 1, 4, 2], "toto", has_next=True),
        make([3, 1, 4, 2], "oot-"),
        make([1] * 30, "o" * 30, has_next=True),
        make([5, 5, 5], "ttt", has_next=True),
        make([5, 3, 5], "oto", has_next=True).with_successors(),
        make([30, 30], "oo", has_next=True).head(40),
        make([6, 6], "oo").with_successors(),
    ]
    for dataset in sound:
        assert found(dataset, None) == []
        assert (take(dataset, Known.of(dataset, None), AS_THEY_STAND).timeouts == dataset.timeouts).all()


@pytest.mark.parametrize("family", ["hopper", "halfcheetah", "walker2d"])
def test_real_rollouts_give_no_findings_and_resets_are_told_from_steps(shared_data, family):
    for path in sorted((shared_data / "rollouts").glob(f"{family}_*.hdf5")):
        dataset = d4rl.read(path)
        assert found(dataset, None) == [], path
        moved = np.concatenate([dataset.observations[1:], dataset.observations[:1]])
        shifted = replace(dataset, next_observations=moved).shifted_rows()
        np.testing.assert_array_equal(shifted, dataset.timeouts & ~dataset.terminals, err_msg=str(path))


def test_generated_mazes_give_no_findings(tmp_path):
    from envs import maze2d

    env = gymnasium.make("maze2d-umaze-v1")
    maze2d.generate("maze2d-umaze-v1", tmp_path / "maze.hdf5", 5000, progress=False)
    dataset = d4rl.read(tmp_path / "maze.hdf5")
    assert found(dataset, env) == found(dataset, None) == []
    going_on = replace(dataset, next_observations=np.concatenate([dataset.observations[1:], dataset.observations[:1]]))
    assert going_on.successors()[1].all()  # its walk is not reset where a target is reached
    env.close()


@pytest.mark.slow
def test_the_shared_cases_are_these(tmp_path, data):
    """The inputs that were reported are those of this file, column for column, and are read alike."""
    if not MAKE.is_file():
        pytest.skip(f"the shared cases are not here ({MAKE})")
    subprocess.run([sys.executable, str(MAKE), str(tmp_path)], check=True, capture_output=True)
    for name, columns in cases(data).items():
        if name == "both":
            continue
        with h5py.File(tmp_path / f"{name}.hdf5") as file:
            assert file.keys() == columns.keys(), name
            for key, values in columns.items():
                np.testing.assert_array_equal(file[key][()], values, err_msg=f"{name}: {key}")


@pytest.mark.parametrize(
    ("kept", "severity"),
    [
        (Verdict(USELESS, "Do not train on these rows."), "warning"),
        (Verdict(LOOK_FIRST, "Look first: rewards."), "note"),
        (Verdict(NO_FAULT, "No fault found."), None),
        (NOT_MEASURED, "note"),
        (NOT_MEASURED._replace(sentence="Only 1 synthetic rows."), "note"),
        (None, None),
    ],
)
def test_a_verdict_on_synthetic_rows_is_said_where_it_is_a_bad_one(
    kept: Verdict | None, severity: str | None, written, env: gymnasium.Env, data: Columns
) -> None:
    """As a warning where the rows are of no use, as a note where they are to be looked at or were not looked at."""
    plain = written(data)
    dataset = replace(plain, metadata={**plain.metadata, **(kept.metadata() if kept else {})})
    added = [finding for finding in found(dataset, env) if finding not in found(plain, env)]
    assert [finding.severity for finding in added] == ([severity] if severity else [])
    sentence = "their fidelity was not measured." if kept == NOT_MEASURED else kept and kept.sentence
    assert all(str(sentence) in str(finding) for finding in added)
    assert any("--no-report" in str(finding) for finding in added) == (kept == NOT_MEASURED)
