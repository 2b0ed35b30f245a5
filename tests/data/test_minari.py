import json
import os
from dataclasses import replace

import h5py
import numpy as np
import pytest

from diffrl.data import minari as minari_format
from diffrl.data.observations import goal_left_out
from diffrl.data.offline import MADE_STAND_IN
from diffrl.support.errors import DataError, UserError

minari = pytest.importorskip("minari")
spaces = pytest.importorskip("gymnasium").spaces


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_what_is_written_is_read(make, store, data_format):
    dataset = make([3, 1, 4], "tot", has_next=True)
    dataset.metadata.update(env_id="Pendulum-v1", algorithm="walk")
    path = minari_format.write("ours/walk-v0", dataset, data_format, reference_scores=(-1.0, 7.0))
    for source in ("ours/walk-v0", path):
        found = minari_format.read(source)
        for key, values in dataset.columns().items():
            np.testing.assert_array_equal(found.columns()[key], values, err_msg=key)
            assert found.columns()[key].dtype == values.dtype
    assert found.metadata["env_id"] == "Pendulum-v1"
    theirs = minari.load_dataset("ours/walk-v0")
    assert data_format == theirs.storage.FORMAT
    assert (theirs.total_episodes, theirs.total_steps) == (3, 8)
    assert minari.get_normalized_score(theirs, np.array([7.0])) == 1
    assert minari_format.local_ids() == {"ours/walk-v0": 8}
    assert minari.list_local_datasets().keys() == {"ours/walk-v0"}


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_metadata_that_minari_has_no_place_for_are_kept(make, data_format):
    """Such as the range of returns, without which rewards of rows that have lost their episodes are scaled wrongly."""
    dataset = make([1, 1, 1], "tot", has_next=True)
    kept = {"return_range": np.array([-2.0, 30.5]), "source_sha256": "abc", "model": {"width": 256, "batch": None}}
    dataset.metadata.update(kept, algorithm="SynthER", sha256="of a file")
    minari_format.write("ours/new-v0", dataset, data_format)
    found = minari_format.read("ours/new-v0")
    assert found.return_range() == (-2.0, 30.5)
    assert {"model": kept["model"], "source_sha256": "abc", "algorithm": "SynthER"}.items() <= found.metadata.items()
    assert "sha256" not in found.metadata
    assert found.has_terminal_next
    minari_format.write("ours/old-v0", make([3, 2], "t-"), data_format)
    assert not minari_format.read("ours/old-v0").has_terminal_next
    found.metadata["terminal_successors"] = MADE_STAND_IN
    minari_format.write("ours/made-v0", found, data_format)
    assert minari_format.read("ours/made-v0").metadata["terminal_successors"] == MADE_STAND_IN
    assert minari.load_dataset("ours/new-v0").total_steps == 3


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_minari_prints_an_episode(make, data_format):
    """Its text names the keys of the infos, of which there are none."""
    minari_format.write("ours/walk-v0", make([3, 1], "to", has_next=True), data_format)
    for episode in minari.load_dataset("ours/walk-v0"):
        assert episode.infos == {}
        assert "infos=dict with the following keys: []" in repr(episode)


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_cut_steps_without_a_successor_are_left_out(make, data_format):
    minari_format.write("walk-v0", make([3, 1, 4, 2], "oot-"), data_format)
    found = minari_format.read("walk-v0")
    assert found.observations[:, 2].tolist() == [0, 1, 4, 5, 6, 7, 8]
    assert found.terminals.tolist() == [False, False, False, False, False, True, False]
    assert found.timeouts.tolist() == [False, True, False, False, False, False, True]
    inside = ~found.terminals
    np.testing.assert_array_equal(found.next_observations[inside], found.observations[inside] + np.float32([0, 1, 1]))


def test_rows_that_do_not_follow_one_another_are_refused(make, store):
    shuffled = make([5], "t", has_next=True)
    order = [0, 1, 3, 2, 4]
    shuffled = replace(shuffled, **{k: v[order] for k, v in shuffled.columns().items() if "observations" in k})
    with pytest.raises(DataError, match=r"next_observations: row 1 is not the observation of row 2.*write HDF5"):
        minari_format.write("walk-v0", shuffled)
    assert not (store / "walk-v0").exists()


def goal_space(observation: int, nested: bool = False) -> object:
    box = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    goal = spaces.Dict({"kettle": box}) if nested else box
    whole = spaces.Box(-np.inf, np.inf, (observation,), np.float32)
    return spaces.Dict({"observation": whole, "achieved_goal": goal, "desired_goal": goal})


def write_foreign(
    observations: object, space: object, action_space: object = None, name: str = "foreign-v0", **changes: object
) -> None:
    from minari.data_collector import EpisodeBuffer

    columns = {
        "actions": np.zeros((3, 1), np.float32),
        "rewards": np.arange(3.0),
        "terminations": np.zeros(3, bool),
        "truncations": np.array([False, False, True]),
    }
    minari.create_dataset_from_buffers(
        name,
        [EpisodeBuffer(observations=observations, **columns | changes)],
        observation_space=space,
        action_space=action_space or spaces.Box(-1, 1, (1,), np.float32),
    )


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_a_goal_is_put_first_as_d4rl_does_and_the_desired_one_last():
    place, rest = np.ones((4, 2), np.float32), np.full((4, 3), 5, np.float32)
    write_foreign({"observation": rest, "achieved_goal": place, "desired_goal": 2 * place}, goal_space(3))
    found = minari_format.read("foreign-v0")
    np.testing.assert_array_equal(found.observations, np.concatenate([place, rest, 2 * place], 1)[:3])
    np.testing.assert_array_equal(found.next_observations, found.observations)
    np.testing.assert_array_equal(found.infos["goal"], 2 * place[:3])
    assert found.metadata["observation_parts"] == "achieved_goal,observation,desired_goal"


@pytest.mark.parametrize("name", ["pointmaze/umaze", "antmaze/umaze"])
def test_minari_s_mazes_have_the_goal_last_and_a_file_of_old_says_that_it_has_none(name):
    whole = np.arange(16, dtype=np.float32).reshape(4, 4)
    values = {"observation": whole, "achieved_goal": whole[:, :2], "desired_goal": whole[:, 2:]}
    write_foreign(values, goal_space(4), name=f"D4RL/{name}-v2")
    found = minari_format.read(f"D4RL/{name}-v2")
    np.testing.assert_array_equal(found.observations, np.concatenate([whole, whole[:, 2:]], 1)[:3])
    np.testing.assert_array_equal(found.infos["goal"], whole[:3, 2:])
    assert found.metadata["observation_parts"] == "observation,desired_goal"
    assert goal_left_out(found.metadata) is None
    assert "the policy does not see goals" in goal_left_out(found.metadata | {"observation_parts": "observation"})


def test_a_goal_that_the_observation_begins_with_is_not_repeated():
    whole = np.arange(16, dtype=np.float32).reshape(4, 4)
    write_foreign({"observation": whole, "achieved_goal": whole[:, :2], "desired_goal": whole[:, 2:]}, goal_space(4))
    found = minari_format.read("foreign-v0")
    np.testing.assert_array_equal(found.observations, np.concatenate([whole, whole[:, 2:]], 1)[:3])
    assert goal_left_out(found.metadata) is None


def test_of_goals_that_are_dictionaries_the_desired_one_is_taken():
    """FrankaKitchen's: what is achieved is in the observation."""
    whole, goal = np.zeros((4, 3), np.float32), {"kettle": np.ones((4, 2), np.float32)}
    write_foreign({"observation": whole, "achieved_goal": goal, "desired_goal": goal}, goal_space(3, nested=True))
    found = minari_format.read("foreign-v0")
    np.testing.assert_array_equal(found.observations, np.concatenate([whole, goal["kettle"]], 1)[:3])
    assert found.infos == {}


def test_an_episode_that_ends_in_neither_flag_ends_in_a_timeout():
    space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    write_foreign(np.zeros((4, 2), np.float32), space, truncations=np.zeros(3, bool))
    assert minari_format.read("foreign-v0").timeouts.tolist() == [False, False, True]


def test_discrete_actions_are_refused():
    space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    write_foreign(np.zeros((4, 2), np.float32), space, spaces.Discrete(3), actions=np.zeros(3, np.int64))
    with pytest.raises(DataError, match=r"Discrete\(3\); expected Box"):
        minari_format.read("foreign-v0")


def test_bounds_of_actions_are_the_action_spaces():
    """Read from it, so that wide actions need no environment, and written to it."""
    box = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    actions = np.float32([[-1.5], [0], [2]])
    write_foreign(np.zeros((4, 2), np.float32), box, spaces.Box(-2, 3, (1,), np.float64), actions=actions)
    found = minari_format.read("foreign-v0")
    assert [bound.tolist() for bound in found.stored_bounds()] == [[-2], [3]]
    minari_format.write("again-v0", found)
    space = minari.load_dataset("again-v0").action_space
    assert (space.low.tolist(), space.high.tolist()) == ([-2], [3])
    np.testing.assert_array_equal(minari_format.read("again-v0").actions, actions)
    minari.delete_dataset("foreign-v0")
    write_foreign(np.zeros((4, 2), np.float32), box, spaces.Box(-np.inf, np.inf, (1,), np.float32))
    assert minari_format.read("foreign-v0").stored_bounds() is None


def test_bad_values_and_damage_are_named(make, store):
    dataset = make([3], "t", has_next=True)
    dataset.rewards[1] = np.nan
    minari_format.write("walk-v0", dataset)
    with pytest.raises(DataError, match="walk-v0: rewards: row 1 holds nan"):
        minari_format.read("walk-v0")
    main = store / "walk-v0" / "data" / "main_data.hdf5"
    main.write_bytes(main.read_bytes()[:500])
    with pytest.raises(DataError, match=r"main_data\.hdf5 cannot be read to its end.*Download or write it again"):
        minari_format.read("walk-v0")


def test_a_data_set_that_is_not_here_says_how_to_get_it():
    with pytest.raises(DataError, match="diffrl data download mujoco/hopper/medium-v0"):
        minari_format.read("mujoco/hopper/medium-v0")


def test_an_existing_id_is_replaced_only_by_force(make, store):
    minari_format.write("walk-v0", make([3], "t"))
    with pytest.raises(UserError, match="--force"):
        minari_format.write("walk-v0", make([5], "t"))
    minari_format.write("walk-v0", make([5], "t"), force=True)
    assert len(minari_format.read("walk-v0")) == 5
    assert [path.name for path in store.iterdir()] == ["walk-v0"]


@pytest.mark.parametrize("bad", ["walk", "walk-v", "../walk-v0", "/walk-v0", "a b-v0"])
def test_a_bad_id_is_the_user_s_error(make, bad):
    with pytest.raises(UserError, match="no Minari id"):
        minari_format.write(bad, make([3], "t"))


def test_without_minari_the_extra_is_named(make, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "minari", None)
    with pytest.raises(UserError, match=r"pip install 'diffrl\[minari\]'"):
        minari_format.read("walk-v0")


def test_a_host_that_cannot_be_reached_is_the_user_s_error(monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(minari, "download_dataset", refuse)
    with pytest.raises(UserError, match="could not be reached"):
        minari_format.download("mujoco/hopper/medium-v0")


@pytest.mark.parametrize("way", ["link", "storage", "virtual"])
@pytest.mark.parametrize("name", ["rewards", "observations"])
def test_what_leads_out_of_the_folder_is_refused_before_it_is_opened(make, store, way, name):
    """It leads to a named pipe: whoever opened it would wait for ever."""
    main = minari_format.write("walk-v0", make([3], "t", has_next=True)) / "data" / "main_data.hdf5"
    pipe = str(store / "pipe")
    os.mkfifo(pipe)
    with h5py.File(main, "r+") as file:
        episode = file["episode_0"]
        shape = episode[name].shape
        del episode[name]
        if way == "link":
            episode[name] = h5py.ExternalLink(pipe, "/x")
        elif way == "storage":
            episode.create_dataset(name, shape, "f4", external=[(pipe, 0, 4 * int(np.prod(shape)))])
        else:
            layout = h5py.VirtualLayout(shape, "f4")
            layout[:] = h5py.VirtualSource(pipe, "x", shape)
            episode.create_virtual_dataset(name, layout)
    with pytest.raises(DataError, match=f"episode_0: {name} is (a link to another|kept outside|a virtual)"):
        minari_format.read("walk-v0")


@pytest.mark.parametrize(("data_format", "name"), [("hdf5", "main_data.hdf5"), ("arrow", "0/part-0.arrow")])
def test_a_pipe_in_the_place_of_a_file_is_refused(make, data_format, name):
    path = minari_format.write("walk-v0", make([3], "t", has_next=True), data_format) / "data" / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="is a named pipe"):
        minari_format.read("walk-v0")


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_rows_reads_no_more_episodes_than_it_needs(make, data_format):
    dataset = make([3, 4, 5], "tot", has_next=True)
    folder = minari_format.write("walk-v0", dataset, data_format) / "data"
    if data_format == "hdf5":
        with h5py.File(folder / "main_data.hdf5", "r+") as file:
            del file["episode_2"]
    else:
        (folder / "2" / "part-0.arrow").unlink()
    for rows in (2, 3, 6):
        found, expected = minari_format.read("walk-v0", rows=rows), dataset.head(rows)
        for key, values in expected.columns().items():
            np.testing.assert_array_equal(found.columns()[key], values, err_msg=key)
    with pytest.raises(DataError):
        minari_format.read("walk-v0")


def test_infos_are_not_read(make):
    """They are damaged here, and what is needed of the file is not."""
    folder = minari_format.write("walk-v0", make([3], "t", has_next=True)) / "data"
    with h5py.File(folder / "main_data.hdf5", "r+") as file:
        file["episode_0/infos/camera"] = h5py.SoftLink("/nothing")
    assert len(minari_format.read("walk-v0")) == 3


@pytest.mark.parametrize(
    ("entry", "value"), [("observation_space", None), ("data_format", "pickle"), ("total_steps", "3")]
)
def test_metadata_that_are_not_minari_s_are_named(make, entry, value):
    """Without a space Minari would make the environment that the file names, and run what it says."""
    path = minari_format.write("walk-v0", make([3], "t", has_next=True)) / "data" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {entry: value}))
    with pytest.raises(DataError, match=f"walk-v0: metadata.json has no {entry}"):
        minari_format.read("walk-v0")
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="is damaged, or no JSON"):
        minari_format.read("walk-v0")
    assert minari_format.local_ids() == {"walk-v0": 0}
