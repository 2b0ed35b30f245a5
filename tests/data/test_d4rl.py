from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from diffrl.data import d4rl
from diffrl.data.offline import OfflineDataset
from diffrl.data.others import left_out
from diffrl.data.transitions import Transitions
from diffrl.support.errors import DataError, UserError


def raw(path: Path, dataset: OfflineDataset, **changes: object) -> Path:
    """Write the data set as another program would: plain h5py, no checksum; a change of None leaves a key out."""
    arrays = {key: getattr(dataset, key) for key in ("observations", "actions", "rewards", "terminals", "timeouts")}
    with h5py.File(path, "w") as file:
        for key, values in (arrays | changes).items():
            if values is not None:
                file[key] = values
    return path


def assert_same(one: OfflineDataset, other: OfflineDataset) -> None:
    assert one.columns().keys() == other.columns().keys()
    for key, values in one.columns().items():
        np.testing.assert_array_equal(values, other.columns()[key], err_msg=key)
        assert values.dtype == other.columns()[key].dtype


@pytest.mark.parametrize("has_next", [False, True])
def test_what_is_written_is_read(make, tmp_path, has_next):
    dataset = make([3, 4, 2], "to-", has_next)
    dataset.infos["qpos"] = np.arange(18.0).reshape(9, 2)
    dataset.metadata.update(generator="walk é", seed=3, noise=0.5, flags=True, empty="", plan={"a": 1})
    found = d4rl.read(d4rl.write(tmp_path / "deep" / "file.hdf5", dataset))
    assert_same(found, dataset)
    np.testing.assert_array_equal(found.infos["qpos"], dataset.infos["qpos"])
    known = {key: found.metadata[key] for key in dataset.metadata}
    assert known == {"generator": "walk é", "seed": 3, "noise": 0.5, "flags": True, "empty": "", "plan": '{"a": 1}'}
    assert_same(d4rl.read(d4rl.write(tmp_path / "again.hdf5", found)), dataset)


def test_text_of_an_npz_is_metadata_and_pickled_text_is_not(make, tmp_path):
    """As docs/data.md says of `metadata/env_id`; NumPy writes text in four bytes a character."""
    columns, texts = make([3], "t").columns(), ("Pendulum-v1", "日本-v1", "")
    for text in (*(np.array(text) for text in texts), np.array(b"Pendulum-v1")):
        np.savez(tmp_path / "a.npz", **columns, **{"metadata/env_id": text})
        expected = text.item() if text.dtype.kind == "U" else "Pendulum-v1"
        assert d4rl.read(tmp_path / "a.npz").metadata["env_id"] == expected
        d4rl.write(tmp_path / "a.hdf5", d4rl.read(tmp_path / "a.npz"), force=True)
        assert d4rl.read(tmp_path / "a.hdf5").metadata["env_id"] == expected
        assert left_out(tmp_path / "a.npz", ["metadata/env_id"]) == ([], [])
    np.savez(
        tmp_path / "a.npz", **columns, **{"metadata/names": np.array(["a", "bc"]), "infos/word": np.array([*"abc"])}
    )
    assert d4rl.read(tmp_path / "a.npz", infos=True).metadata["names"].tolist() == [b"a", b"bc"]
    np.savez(tmp_path / "a.npz", **columns, **{"metadata/env_id": np.array("Pendulum-v1", object)})
    with pytest.raises(DataError, match="it holds objects, which are pickled"):
        d4rl.read(tmp_path / "a.npz")
    wrong = np.array([0x7FFFFFFF], np.uint32).view("<U1")[0:1].reshape(())
    np.savez(tmp_path / "a.npz", **columns, **{"metadata/env_id": wrong})
    with pytest.raises(DataError, match="metadata/env_id"):
        d4rl.read(tmp_path / "a.npz")


def test_npz_is_read_and_pickles_are_not(make, tmp_path):
    dataset = make([3], "t")
    np.savez(tmp_path / "good.npz", **dataset.columns())
    assert_same(d4rl.read(tmp_path / "good.npz"), dataset)
    np.savez(tmp_path / "bad.npz", **dataset.columns() | {"observations": np.array([{}, [], 1], object)})
    with pytest.raises(DataError, match=r"bad\.npz, key 'observations'"):
        d4rl.read(tmp_path / "bad.npz")


def test_columns_of_shape_n_1_and_other_types_are_taken(make, tmp_path):
    dataset = make([3, 2], "to")
    path = raw(
        tmp_path / "file.hdf5",
        dataset,
        observations=dataset.observations.astype(np.float64),
        rewards=dataset.rewards[:, None].astype(np.float64),
        terminals=dataset.terminals[:, None].astype(np.uint8),
        timeouts=dataset.timeouts[:, None].astype(np.float32),
    )
    assert_same(d4rl.read(path), dataset)


def test_missing_timeouts_are_counted_from_the_step_limit_if_it_is_known(make, tmp_path):
    path = raw(tmp_path / "file.hdf5", make([5, 2, 4], "-t-"), timeouts=None)
    assert d4rl.read(path, max_episode_steps=5).episodes().tolist() == [[0, 5], [5, 7], [7, 11]]
    assert d4rl.read(path).episodes().tolist() == [[0, 7], [7, 11]]
    columns = Transitions.from_dataset(d4rl.read(path, max_episode_steps=5)).columns
    assert columns.observations[:, 2].tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9]


def test_rows_keeps_the_first(make, tmp_path):
    path = d4rl.write(tmp_path / "file.hdf5", make([5, 5], "tt"))
    assert_same(d4rl.read(path, rows=7), make([5, 5], "tt").head(7))


def test_what_hdf5_cannot_hold_is_named(make, tmp_path):
    dataset = make([3], "t")
    dataset.infos["words"] = np.array([object()] * 3)
    with pytest.raises(DataError, match="infos/words has type object"):
        d4rl.write(tmp_path / "file.hdf5", dataset)


def test_a_failed_write_leaves_the_old_file(make, tmp_path, monkeypatch):
    path = d4rl.write(tmp_path / "file.hdf5", make([3], "t"))
    monkeypatch.setattr(d4rl, "digest", lambda arrays: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        d4rl.write(path, make([4], "t"), force=True)
    monkeypatch.undo()
    assert len(d4rl.read(path)) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["file.hdf5"]


def test_a_place_that_cannot_be_written_is_the_user_s_error(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        d4rl.write(tmp_path / "file" / "x.hdf5", make([3], "t"))


def test_a_file_that_is_there_is_replaced_only_by_force(make, tmp_path):
    path = d4rl.write(tmp_path / "file.hdf5", make([3], "t"))
    with pytest.raises(UserError, match="exists, and is not overwritten: force=True"):
        d4rl.write(path, make([4], "t"))
    assert len(d4rl.read(path)) == 3
    assert len(d4rl.read(d4rl.write(path, make([4], "t"), force=True))) == 4


@pytest.mark.parametrize("name", ["x.npz", "x.npy", "x", "x.hdf5.gz"])
def test_hdf5_is_written_under_its_own_name_alone(make, tmp_path, name):
    """By which it is read: as an npz it was no zip archive."""
    with pytest.raises(UserError, match="what is written is HDF5; expected a path"):
        d4rl.write(tmp_path / name, make([3], "t"))
    assert not [*tmp_path.iterdir()]
    assert len(d4rl.read(d4rl.write(tmp_path / "x.h5", make([3], "t")))) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rewards": np.zeros(5, np.float32)}, "rewards: 5 rows; expected 6"),
        ({"timeouts": np.zeros(5, bool)}, "timeouts: 5 rows; expected 6"),
        ({"rewards": np.zeros((6, 1), np.float32)}, r"rewards: shape \(6, 1\); expected \(6,\). Give one number a row"),
        ({"observations": np.zeros((6, 8, 8, 3), np.float32)}, "observations: shape .*Flatten each row"),
        ({"observations": np.full((6, 3), np.nan, np.float32)}, "observations: row 0 holds nan"),
        ({"next_observations": np.zeros((6, 4), np.float32)}, "next_observations: shape"),
        ({"infos": {"qpos": np.zeros((5, 2))}}, "infos/qpos has shape .*expected 6 rows"),
        ({"infos": {"word": np.array([*"abcdef"])}}, "infos/word has type"),
        ({"metadata": {"action_low": [-2.0, -2.0], "action_high": [-1.0, -1.0]}}, "actions: row 0 holds"),
    ],
    ids=str,
)
def test_what_would_not_be_read_is_not_written(make, tmp_path, changes, said):
    with pytest.raises(DataError, match=said):
        d4rl.write(tmp_path / "file.hdf5", replace(make([6], "t"), **changes))
    empty = {name: values[:0] for name, values in make([6], "t").columns().items()}
    with pytest.raises(DataError, match=r"Nothing is written to .*file\.hdf5: rewards: 0 rows"):
        d4rl.write(tmp_path / "file.hdf5", OfflineDataset(**empty))
    assert not [*tmp_path.iterdir()]


def test_actions_of_an_environment_s_own_units_are_written_and_read(make, tmp_path):
    """The error of a reader without an environment names its own argument, and no option of the command line."""
    dataset = make([6], "t")
    path = d4rl.write(tmp_path / "file.hdf5", replace(dataset, actions=2 * np.sign(dataset.actions - 0.2)))
    with pytest.raises(DataError, match=r"expected \[-1, 1\]. Read with action_limit=None") as raised:
        d4rl.read(path)
    assert "--env" not in str(raised.value)
    assert np.abs(d4rl.read(path, action_limit=None).actions).max() == 2
    assert len(d4rl.read(path, action_limit=2.0)) == 6


def test_a_changed_value_fails_the_checksum(make, tmp_path):
    path = d4rl.write(tmp_path / "file.hdf5", make([3], "t"))
    with h5py.File(path, "r+") as file:
        file["rewards"][1] += 1
    with pytest.raises(DataError, match=r"file\.hdf5: the contents have SHA-256"):
        d4rl.read(path)


def test_seal_gives_a_foreign_file_a_checksum_and_changes_nothing_else(make, tmp_path):
    dataset = make([3], "t")
    path = raw(tmp_path / "file.hdf5", dataset)
    assert "sha256" not in d4rl.read(path).metadata
    assert d4rl.seal(path) == d4rl.read(path).metadata["sha256"] == d4rl.seal(path)
    assert_same(d4rl.read(path), dataset)


@pytest.mark.parametrize("key", d4rl.REQUIRED)
def test_a_missing_key_is_named(make, tmp_path, key):
    path = raw(tmp_path / "file.hdf5", make([3], "t"), **{key: None})
    with pytest.raises(DataError, match=rf"file\.hdf5: {key} is missing; it holds: [a-z, ]+\."):
        d4rl.read(path)


def test_all_that_is_missing_is_said_at_once_and_what_can_be_done_without_it(make, tmp_path):
    path = raw(tmp_path / "file.hdf5", make([3], "t"), rewards=None, terminals=None)
    with pytest.raises(DataError) as refused:
        d4rl.read(path)
    assert str(refused.value) == (
        f"{path}: rewards and terminals are missing; it holds: actions, observations, timeouts. Of diffrl's agents "
        "only bc, diffusion_bc and diffuser (unguided) do without: for them write zeros. Where no episode "
        "ends in a terminal state, terminals are False in every row."
    )
    path = raw(tmp_path / "other.hdf5", make([3], "t"), rewards=None, reward=np.zeros(3))
    with pytest.raises(DataError, match=r"Is 'reward' the rewards\? Then rename it\.$"):
        d4rl.read(path)


@pytest.mark.parametrize(
    ("renamed", "said"),
    [
        (("obs", "action"), ["Is 'obs' the observations?", "Is 'action' the actions?"]),
        (("observation", "acts"), ["Is 'observation' the observations?", "Is 'acts' the actions?"]),
        (("s", "action"), ["Is 'action' the actions?", "Columns are known by D4RL's names."]),
    ],
)
def test_a_column_of_another_name_is_asked_about_as_one_thing_alone(
    renamed: tuple[str, str], said: list[str], tmp_path: Path
) -> None:
    names = [*renamed, "rewards", "terminals"]
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for name in names:
            file[name] = np.zeros((4, 2) if name in renamed else 4, np.float32)
    with pytest.raises(DataError, match="observations and actions are missing") as caught:
        d4rl.read(tmp_path / "a.hdf5")
    text = str(caught.value)
    assert all(part in text for part in said)
    assert text.count("?") == sum(part.endswith("?") for part in said)


def test_a_file_that_is_missing_a_folder_or_no_hdf5_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.hdf5 does not exist"):
        d4rl.read(tmp_path / "nothing.hdf5")
    with pytest.raises(DataError, match="is a folder"):
        d4rl.read(tmp_path)
    (tmp_path / "page.hdf5").write_text("<html>Not found</html>")
    with pytest.raises(DataError, match=r"page\.hdf5 is not an HDF5 file: it begins with b'<html>"):
        d4rl.read(tmp_path / "page.hdf5")
    (tmp_path / "empty.hdf5").write_bytes(b"")
    with pytest.raises(DataError, match="0 bytes"):
        d4rl.read(tmp_path / "empty.hdf5")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_named(make, tmp_path, share):
    path = d4rl.write(tmp_path / "file.hdf5", make([2000], "t", has_next=True))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=r"file\.hdf5 cannot be read to its end"):
        d4rl.read(path)


def test_a_damaged_block_is_an_error_that_names_its_key(make, tmp_path):
    path = d4rl.write(tmp_path / "file.hdf5", make([2000], "t"))
    with h5py.File(path) as file:
        offset = file["rewards"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[offset + 40 : offset + 80] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(DataError, match="'rewards'"):
        d4rl.read(path)


@pytest.mark.parametrize("without", [(), ("timeouts",)])
def test_a_column_cut_short_is_blamed_alone(tmp_path, make, without):
    """Whichever it is: rewards are no measure of the others."""
    path = d4rl.write(tmp_path / "short.hdf5", make([1200], "t"))
    with h5py.File(path, "a") as file:
        for key in ("rewards", *without):
            del file[key]
        file["rewards"] = np.zeros(100, np.float32)
    with pytest.raises(DataError) as caught:
        d4rl.read(path)
    said = "rewards: 100 rows; expected 1,200, as in most other columns. The file may be cut short."
    assert str(caught.value) == f"{path}: {said}"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rewards": np.float32([0, 1, np.nan])}, "rewards: row 2 holds nan"),
        ({"observations": np.full((3, 3), 1e300)}, "observations: row 0 holds inf"),
        ({"actions": np.float32([[0, 0], [0, 3], [0, 0]])}, "actions: row 1 holds 3"),
        ({"actions": np.int64([0, 1, 2])}, "actions are whole numbers"),
        ({"rewards": np.zeros(4, np.float32)}, "rewards: 4 rows; expected 3, as in most other columns"),
        ({"observations": np.zeros((3, 2, 2), np.float32)}, r"observations: shape \(3, 2, 2\)"),
        ({"terminals": np.float32([0, 0.5, 1])}, r"terminals: row 1 holds 0\.5"),
        ({"terminals": np.float32([0, 0, np.nan])}, "terminals: row 2 holds nan"),
        ({"terminals": np.zeros((3, 2), bool)}, r"terminals: shape \(3, 2\)"),
        ({"rewards": np.float32(1)}, r"rewards: shape \(\)"),
        ({"observations": np.array(["a", "b", "c"], "S1")}, "observations has type"),
    ],
)
def test_bad_contents_are_named_by_file_key_and_row(make, tmp_path, changes, text):
    path = raw(tmp_path / "file.hdf5", make([3], "t"), **changes)
    with pytest.raises(DataError, match=text) as error:
        d4rl.read(path)
    assert "file.hdf5" in str(error.value)


def test_an_empty_data_set_is_an_error(make, tmp_path):
    whole = make([3], "t")
    path = raw(tmp_path / "file.hdf5", whole, **{key: values[:0] for key, values in whole.columns().items()})
    with pytest.raises(DataError, match=r"file\.hdf5: rewards: 0 rows"):
        d4rl.read(path)


def test_object_types_are_refused_where_needed_and_ignored_elsewhere(make, tmp_path):
    path = raw(tmp_path / "file.hdf5", make([3], "t"), actions=None)
    with h5py.File(path, "r+") as file:
        file.create_dataset("infos/words", data=["a", "b", "c"], dtype=h5py.string_dtype())
        file.create_dataset("metadata/author", data="someone", dtype=h5py.string_dtype())
        file["metadata/odd"] = h5py.Empty("f4")
        file["outside"] = h5py.ExternalLink("/etc/passwd", "/")
        file.create_dataset("actions", (3,), dtype=h5py.vlen_dtype(np.float32))
    with pytest.raises(DataError, match="actions has type object"):
        d4rl.read(path)
    with h5py.File(path, "r+") as file:
        del file["actions"]
        file["actions"] = np.zeros((3, 1))
    dataset = d4rl.read(path)
    assert dataset.infos == {}
    assert dataset.metadata["author"] == "someone"


def test_check_can_be_left_out_to_look_at_a_bad_file(make, tmp_path):
    path = raw(tmp_path / "file.hdf5", make([3], "t"), rewards=np.float32([0, np.nan, 0]))
    assert d4rl.read(path, check=False).problems()


def test_real_rollouts_are_read(shared_data):
    expert = d4rl.read(shared_data / "rollouts" / "hopper_expert-v5.hdf5")
    assert (len(expert), expert.observation_size, expert.action_size) == (15_000, 11, 3)
    assert expert.has_next
    assert expert.metadata["algorithm"] == "tqc"
    medium = d4rl.read(shared_data / "rollouts" / "hopper_medium-v4.hdf5")
    assert (int(medium.terminals.sum()), int(medium.timeouts.sum())) == (86, 8)
    assert len(Transitions.from_dataset(medium)) == 60_000 - 8


def test_stored_next_observations_of_real_rollouts_equal_the_derived_ones(shared_data):
    dataset = d4rl.read(shared_data / "rollouts" / "halfcheetah_expert-v5.hdf5")
    inside = ~(dataset.terminals | dataset.timeouts)
    inside[-1] = False
    rows = np.flatnonzero(inside)
    np.testing.assert_array_equal(dataset.next_observations[rows], dataset.observations[rows + 1])


def test_real_human_demonstrations_need_clipping(shared_data):
    path = shared_data / "real" / "dapg_door_human_demos.npz"
    with pytest.raises(DataError, match=r"actions: row 4 holds 1\.01"):
        d4rl.read(path)
    dataset = d4rl.read(path, action_limit=None)
    assert (len(dataset), dataset.n_episodes, dataset.action_size) == (6_729, 25, 28)


def test_the_layout_of_other_programs_is_named_with_what_to_do(make, tmp_path):
    """Episodes by steps, and transposed columns: one line, whatever the number of columns."""
    columns = make([4, 4, 4], "ooo", has_next=True).columns()
    for name, other, text in [
        ("episodes", {k: v.reshape(3, 4, *v.shape[1:]) for k, v in columns.items()}, "join the first two axes"),
        ("episodes1", {k: v.reshape(3, 4, -1) for k, v in columns.items()}, "join the first two axes"),
        ("matlab", {k: np.atleast_2d(v.T) for k, v in columns.items()}, "Are they transposed?"),
        ("images", columns | {"observations": np.zeros((12, 5, 5))}, "Flatten each row to one vector"),
        ("observations", columns | {"observations": columns["observations"].T}, "Is it transposed?"),
        ("short", columns | {"observations": columns["observations"][:7]}, "may be cut short"),
    ]:
        with h5py.File(tmp_path / f"{name}.hdf5", "w") as file:
            for key, values in other.items():
                file[key] = values
        with pytest.raises(DataError) as error:
            d4rl.read(tmp_path / f"{name}.hdf5")
        said = str(error.value).splitlines()
        assert text in said[0], name
        assert len(said) == 1, said


@pytest.mark.parametrize("name", ["dones", "is_last"])
def test_ends_of_both_kinds_in_place_of_terminals_are_named(make, tmp_path, name):
    columns = make([4, 4], "to").columns()
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for key in ("observations", "actions", "rewards"):
            file[key] = columns[key]
        file[name] = columns["terminals"] | columns["timeouts"]
    with pytest.raises(DataError, match=rf"{name} mixes terminal ends.*write `terminals`.* and `timeouts`"):
        d4rl.read(tmp_path / "a.hdf5")
