"""What a file says of itself is looked at before its values, and none leads out of it."""

import os
import tracemalloc
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from diffrl import cli
from diffrl.data import columns, d4rl
from diffrl.support.errors import DataError


@pytest.fixture
def file(make, tmp_path) -> Path:
    """Ten rows in two episodes, without a checksum and without timeouts."""
    path = tmp_path / "file.hdf5"
    with h5py.File(path, "w") as opened:
        for key, values in make([5, 5], "oo").columns().items():
            if key != "timeouts":
                opened[key] = values
    return path


def secret(folder: Path) -> Path:
    """A named pipe: whoever opens it waits for ever."""
    os.mkfifo(folder / "secret")
    return folder / "secret"


TIMEOUTS = np.isin(np.arange(10), (4, 9))


@pytest.mark.parametrize("link", ["soft", "soft to soft", "relative", "hard", "group"])
def test_links_inside_the_file_are_followed(file, link):
    with h5py.File(file, "r+") as opened:
        opened["elsewhere/t"] = TIMEOUTS
        if link == "soft to soft":
            opened["elsewhere/u"] = h5py.SoftLink("t")
        if link == "group":
            opened["there"] = h5py.SoftLink("/elsewhere")
        target = {"soft to soft": "elsewhere/u", "relative": "./elsewhere/t", "group": "there/t"}.get(link)
        opened["timeouts"] = opened["elsewhere/t"] if link == "hard" else h5py.SoftLink(target or "/elsewhere/t")
    assert d4rl.read(file).episodes().tolist() == [[0, 5], [5, 10]]


@pytest.mark.parametrize("name", ["timeouts", "rewards", "next_observations", "Truncations", "metadata/note"])
@pytest.mark.parametrize("way", ["link", "link through", "storage", "virtual"])
def test_what_leads_out_of_the_file_is_refused_before_it_is_opened(file, tmp_path, name, way):
    pipe = secret(tmp_path)
    with h5py.File(file, "r+") as opened:
        if name in opened:
            del opened[name]
        if way == "link":
            opened[name] = h5py.ExternalLink(str(pipe), "/x")
        elif way == "link through":
            opened["outside"] = h5py.ExternalLink(str(pipe), "/")
            opened[name] = h5py.SoftLink("/outside/x")
        elif way == "storage":
            opened.create_dataset(name, (10,), "f4", external=[(str(pipe), 0, 40)])
        else:
            layout = h5py.VirtualLayout((10,), "f4")
            layout[:] = h5py.VirtualSource(str(pipe), "x", (10,))
            opened.create_virtual_dataset(name, layout)
    if name == "metadata/note" and way.startswith("link"):
        assert "note" not in d4rl.read(file).metadata  # no column: it is left out
        return
    with pytest.raises(DataError, match=rf"file\.hdf5: {name} is (a link to another file|kept outside|a virtual)"):
        d4rl.read(file)


def test_a_column_that_is_not_needed_is_not_touched_and_not_copied(file, tmp_path, capsys):
    pipe = secret(tmp_path)
    with h5py.File(file, "r+") as opened:
        opened.create_dataset("infos/secret", (10,), "f4", external=[(str(pipe), 0, 40)])
        opened.create_dataset("camera", (10, 2**40), "u1", chunks=(1, 2**20))
    assert len(d4rl.read(file, infos=False)) == 10
    assert cli.main(["data", "convert", str(file), str(tmp_path / "copy.hdf5")]) == 2
    assert "infos/secret is kept outside of the file" in capsys.readouterr().err
    assert not (tmp_path / "copy.hdf5").exists()
    with h5py.File(file, "r+") as opened:
        del opened["camera"]
    with pytest.raises(DataError, match="infos/secret is kept outside"):
        d4rl.seal(file)


@pytest.mark.parametrize(
    ("make_it", "said"),
    [
        (lambda opened: opened.create_group("timeouts"), r"timeouts is a group; .* Remove it\.$"),
        (lambda opened: opened.create_dataset("timeouts", data=h5py.Empty("f4")), "timeouts is an empty data set"),
        (lambda opened: opened.__setitem__("timeouts", h5py.SoftLink("/nothing")), "where there is nothing"),
        (lambda opened: opened.__setitem__("timeouts", h5py.SoftLink("/timeouts")), "without an end"),
        (
            lambda opened: opened.create_dataset("timeouts", (10,), "?", chunks=(2**29,), maxshape=(None,)),
            "timeouts, 0.0 KiB, is stored in parts of 512.0 MiB: it is damaged",
        ),
        (lambda opened: opened.__setitem__("done", np.zeros(9)), r"done: shape \(9,\); expected a mark for each row"),
    ],
)
def test_a_column_that_is_no_column_does_not_count_as_absent(file, make_it, said):
    with h5py.File(file, "r+") as opened:
        make_it(opened)
    with pytest.raises(DataError, match=said):
        d4rl.read(file)


def test_shapes_are_compared_before_values_are_read(file):
    """The column that does not fit has 2^50 rows: it could not be read."""
    with h5py.File(file, "r+") as opened:
        opened.create_dataset("next_observations", (2**50, 3), "f4", chunks=(2**10, 3), compression="gzip")
    with pytest.raises(DataError, match="says that it is"):
        d4rl.read(file)
    with h5py.File(file, "r+") as opened:
        del opened["next_observations"]
        opened.create_dataset("next_observations", (2**20, 3), "f4", chunks=(2**10, 3), compression="gzip")
    for kwargs in ({}, {"rows": 5}):
        with pytest.raises(DataError, match=r"next_observations: 1,048,576 rows; expected 10"):
            d4rl.read(file, **kwargs)
    assert d4rl.read(file, check=False).problems()


def test_more_than_the_memory_is_a_sentence_with_sizes(make, tmp_path, monkeypatch):
    path = d4rl.write(tmp_path / "file.hdf5", make([3000], "t"))
    monkeypatch.setattr(columns, "free_memory", lambda: 20_000)
    said = r"holds 76\.2 KiB \(observations \(3000, 3\) alone 35\.2 KiB\); 19\.5 KiB.*--rows"  # 26 bytes a row
    with pytest.raises(DataError, match=said):
        d4rl.read(path)
    assert len(d4rl.read(path, rows=500)) == 500


def peak(path: Path, **options: object) -> int:
    tracemalloc.start()
    d4rl.read(path, **options)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def test_a_checksum_is_verified_part_by_part_whatever_is_read(make, tmp_path):
    """24 MB of infos are read in blocks of 4, and a change to them is seen though nobody asked for them."""
    dataset = make([1000], "t")
    dataset.infos["camera"] = np.zeros((1000, 6000), np.float32)
    path = d4rl.write(tmp_path / "file.hdf5", dataset)
    assert peak(path, infos=False) < 12e6 < 24e6 < peak(path)
    with h5py.File(path, "r+") as opened:
        opened["infos/camera"][999, 5999] = 1
    for options in ({"infos": False}, {"rows": 5}):
        with pytest.raises(DataError, match="the contents have SHA-256"):
            d4rl.read(path, **options)


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_rows_cut_while_reading(make, tmp_path, suffix):
    dataset = make([5, 5], "tt", has_next=True)
    path = tmp_path / f"file{suffix}"
    if suffix == ".npz":
        np.savez(path, **dataset.columns())
    else:
        d4rl.write(path, dataset)
    for rows in (1, 5, 7, 9, 10, 11):
        found, expected = d4rl.read(path, rows=rows), dataset.head(rows)
        for key, values in expected.columns().items():
            np.testing.assert_array_equal(found.columns()[key], values, err_msg=key)
        assert ("sha256" in found.metadata) == (suffix == ".hdf5" and rows >= 10)
    with pytest.raises(DataError, match="ask for at least 1"):
        d4rl.read(path, rows=0)


def test_a_column_of_an_npz_in_the_order_of_columns_is_read(make, tmp_path):
    dataset = make([5, 5], "tt")
    np.savez(tmp_path / "f.npz", **dataset.columns() | {"observations": np.asfortranarray(dataset.observations)})
    for rows in (None, 4):
        found = d4rl.read(tmp_path / "f.npz", rows=rows)
        np.testing.assert_array_equal(found.observations, dataset.observations[:rows])


def test_an_npz_whose_array_is_not_what_its_header_says_is_refused(make, tmp_path):
    np.savez(tmp_path / "f.npz", **make([3], "t").columns())
    with zipfile.ZipFile(tmp_path / "f.npz") as whole, zipfile.ZipFile(tmp_path / "g.npz", "w") as changed:
        for name in whole.namelist():
            content = whole.read(name)
            if name == "rewards.npy":
                content = content.replace(b"(3,), ", b"(3000000000,), ".ljust(6))[: len(content) + 9]
            changed.writestr(name, content)
    with pytest.raises(DataError, match=r"g\.npz, key 'rewards': cannot be read as a plain array"):
        d4rl.read(tmp_path / "g.npz")


def test_a_checksum_is_added_once_and_asked_for_by_info_alone(file, make, tmp_path, capsys):
    from envs import datasets

    datasets.load_dataset(file)
    assert capsys.readouterr() == ("", "")
    (tmp_path / "other").mkdir()
    np.savez(tmp_path / "other" / "f.npz", **make([3], "t").columns())
    for path, none in ((file, True), (tmp_path / "other" / "f.npz", False)):
        cli.main(["data", "info", str(path)])
        assert ("checksum: none" in capsys.readouterr().out) == none
    before = {key: values.tobytes() for key, values in d4rl.read(file).columns().items()}
    assert cli.main(["data", "info", str(file), "--add-checksum"]) == 0
    stored = d4rl.read(file).metadata["sha256"]
    assert stored in capsys.readouterr().out
    assert {key: values.tobytes() for key, values in d4rl.read(file).columns().items()} == before
    assert {path.name for path in file.parent.iterdir()} == {file.name, "other"}
    cli.main(["data", "info", str(file)])
    assert "checksum: none" not in capsys.readouterr().out


@pytest.mark.parametrize("linked", ["column", "hard", "infos"])
def test_a_file_with_links_is_read_after_it_was_sealed(file, linked):
    with h5py.File(file, "r+") as data:
        ends = np.zeros(len(data["rewards"]), bool)
        if linked == "infos":
            data["stuff/goal"] = ends.astype("f4")
            data.pop("infos", None)
            data["infos"] = h5py.SoftLink("/stuff")
        else:
            data.pop("timeouts", None)
            data["extra/x"] = ends
            data["truncations"] = h5py.SoftLink("/extra/x") if linked == "column" else data["extra/x"]
    before = d4rl.read(file)
    d4rl.seal(file)
    assert d4rl.fingerprint(d4rl.read(file)) == d4rl.fingerprint(before)


def test_pipes_and_devices_are_refused_before_they_are_opened(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.hdf5")
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "zero.hdf5").symlink_to("/dev/zero")
    for name, what in (("pipe.hdf5", "a named pipe"), ("pipe.npz", "a named pipe"), ("zero.hdf5", "a device")):
        assert cli.main(["data", "info", str(tmp_path / name)]) == 2
        assert f"{name} is {what}" in capsys.readouterr().err
        assert d4rl.count_rows(tmp_path / name) is None


def test_groups_are_walked_as_h5py_walks_them_but_not_without_an_end(file):
    with h5py.File(file, "r+", track_order=True) as opened:
        opened["b/z"], opened["b/a/x"], opened["a/y"], opened["b/empty"] = 1, 2, [3.0], h5py.Empty("f4")
        opened["b/again"], opened["a/cycle"], opened["c"] = opened["b/z"], opened["b"], opened["/"]
        opened["b/soft"] = h5py.SoftLink("/a/y")
        expected: list[str] = []
        opened.visititems(
            lambda name, item: expected.append(name) if getattr(item, "shape", None) is not None else None
        )
        assert [name for name, _ in columns.walk(opened, "file")] == expected
        assert len(expected) == 4 + 3
        group = opened.id
        for _ in range(2000):
            group = h5py.h5g.create(group, b"g")
    with pytest.raises(DataError, match=r"file\.hdf5 has more than 32 groups in one another"):
        d4rl.seal(file)


def test_a_file_of_many_keys_names_ten(tmp_path):
    with h5py.File(tmp_path / "file.hdf5", "w") as opened:
        for i in range(200):
            opened[f"{i:03}{'x' * 500}"] = 0
    with pytest.raises(DataError) as caught:
        d4rl.read(tmp_path / "file.hdf5")
    assert "(200 in all)" in str(caught.value)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("key", ["observations", "next_observations"])
def test_the_parts_of_a_dictionary_are_to_be_joined_and_not_removed(file, key):
    with h5py.File(file, "r+") as opened:
        opened.pop(key, None)
        for part in ("a", "b"):
            opened[f"{key}/{part}"] = np.zeros((10, 2), np.float32)
    said = rf"{key} is a group; .* Join its parts \(a, b\) into one array of columns, .* Gymnasium's order of keys"
    with pytest.raises(DataError, match=said) as error:
        d4rl.read(file)
    assert "Remove" not in str(error.value)
