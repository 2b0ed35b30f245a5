from pathlib import Path

import h5py
import numpy as np
import pytest

from diffrl.data import d4rl
from diffrl.data.layouts import OF_D3RLPY, conversion
from diffrl.data.offline import OfflineDataset
from diffrl.support.errors import DataError
from tests.documents import ROOT


def of_d3rlpy(file: h5py.File, number: int, episode: dict[str, np.ndarray], terminated: bool) -> None:
    """An episode as ReplayBuffer.dump of d3rlpy 2 writes it: https://github.com/takuseno/d3rlpy, dataset/io.py."""
    columns = {**episode, "rewards": episode["rewards"][:, None], "terminated": terminated}
    for name, values in columns.items():
        file[f"{name}_{number}"] = values
    if not number:
        file["columns"] = list(columns)
        file["num_episodes"], file["version"] = 2, "2.1"


def of_robomimic(file: h5py.File, number: int, episode: dict[str, np.ndarray], terminated: bool) -> None:
    """An episode as https://robomimic.github.io/docs/datasets/overview.html has it, pictures among its observations."""
    group = file.create_group(f"data/demo_{number}")
    group["actions"], group["rewards"] = episode["actions"], episode["rewards"]
    group["dones"] = np.zeros(len(episode["rewards"]), int)
    group["obs/a_image"] = np.zeros((len(episode["rewards"]), 8, 8, 3), np.uint8)
    group["obs/b"], group["obs/c"] = episode["observations"][:, :1], episode["observations"][:, 1:]


@pytest.mark.parametrize(
    ("write", "named", "ends"), [(of_d3rlpy, "d3rlpy", (3, 1)), (of_robomimic, "robomimic", (4, 0))]
)
def test_the_python_that_is_offered_makes_a_file_that_is_read(tmp_path, monkeypatch, write, named, ends):
    """Of other libraries' layouts: every row once, in its episode; no column is said to be another's."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    steps = (3, 2, 4, 5)
    episodes = [
        {
            "observations": rng.normal(size=(n, 3)).astype(np.float32),
            "actions": rng.uniform(-1, 1, (n, 2)).astype(np.float32),
            "rewards": rng.normal(size=n).astype(np.float32),
        }
        for n in steps
    ]
    with h5py.File('it"s.h5', "w") as file:
        for number, episode in enumerate(episodes):
            write(file, number, episode, terminated=number == 1)
    with pytest.raises(DataError) as error:
        d4rl.read('it"s.h5')
    line, _, code = str(error.value).partition("\n\n")
    assert named in line
    assert "rename" not in line
    exec(code, {})
    found = d4rl.read("rollouts.npz")
    for name in ("observations", "actions", "rewards"):
        np.testing.assert_array_equal(getattr(found, name), np.concatenate([one[name] for one in episodes]))
    assert found.episode_lengths().tolist() == list(steps)
    assert (found.timeouts.sum(), found.terminals.sum()) == ends


def test_the_documentation_has_the_same_python():
    assert conversion(OF_D3RLPY, Path("buffer.h5")) in (ROOT / "docs" / "from_d3rlpy.md").read_text()


def test_readers_that_take_the_next_row_get_every_synthetic_transition(tmp_path, monkeypatch):
    """Episodes as d3rlpy's MDPDataset cuts them: s' is of the next row, and a row that a time-out ends is left out.

    https://github.com/takuseno/d3rlpy, dataset/transition_pickers.py and dataset/components.py (transition_count).
    """
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    n, ends = 50, np.arange(50) % 7 == 3
    s, after, a = (rng.normal(size=(n, size)).astype(np.float32) for size in (3, 3, 2))
    r = rng.normal(size=n).astype(np.float32)
    columns = {"observations": s, "actions": a, "rewards": r, "next_observations": after, "terminals": ends}
    d4rl.write("synthetic.hdf5", OfflineDataset(**columns, timeouts=~ends))
    text = (ROOT / "docs" / "from_d3rlpy.md").read_text()
    (code,) = (
        block.split("```")[0] for block in text.split("```python\n") if "synthetic.hdf5" in block.split("```")[0]
    )
    made: dict = {}
    exec(code, made)
    found, begin = [], 0
    for end in np.flatnonzero(made["terminals"] | made["timeouts"]) + 1:
        for i in range(begin, end if made["terminals"][end - 1] else end - 1):
            terminal = bool(made["terminals"][i])
            row = made["observations"][i], made["actions"][i], made["rewards"][i]
            found.append((*row, terminal, None if terminal else made["observations"][i + 1]))
        begin = end
    assert begin == len(made["observations"])
    assert len(found) == n
    for i, (observation, action, reward, terminal, successor) in enumerate(found):
        np.testing.assert_array_equal(observation, s[i])
        np.testing.assert_array_equal(action, a[i])
        assert (reward, terminal) == (r[i], ends[i])
        if not terminal:
            np.testing.assert_array_equal(successor, after[i])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"a,b\n1,2\n", "is text (.csv), which is not read. Data are read from HDF5 and .npz files"),
        ("a.parquet", b"PAR1\x15\x04", "is a Parquet file, which is not read. Data are read from HDF5 and .npz"),
        ("a.npz", b"", "has 0 bytes. Write it again"),
        ("a.npz", b"PAR1\x15\x04", "is a Parquet file"),
        ("a.npz", b"nothing known", "without the list of contents that stands at an .npz file's end"),
    ],
)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        d4rl.read(tmp_path / name)
    assert said in str(error.value)
    assert "BadZipFile" not in str(error.value)


def test_a_file_whose_name_ends_otherwise_is_told_how_to_be_named(make, tmp_path):
    columns = make([3], "t").columns()
    np.save(tmp_path / "a.npy", columns["observations"])
    np.savez(tmp_path / "a.npz", **columns)
    (tmp_path / "a.npz").rename(tmp_path / "zip.hdf5")
    d4rl.write(tmp_path / "a.hdf5", make([3], "t")).rename(tmp_path / "hdf5.npz")
    np.savez(tmp_path / "cut.npz", **columns)
    content = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    for name, said in (
        ("zip.hdf5", "rename it to end in .npz"),
        ("hdf5.npz", "is an HDF5 file, though its name ends in .npz: rename it to end in .hdf5"),
        ("a.npy", "is an .npy file, of one array, which is not read"),
        ("cut.npz", f"It has {len(content) // 2:,} bytes, without the list of contents"),
    ):
        with pytest.raises(DataError, match=said):
            d4rl.read(tmp_path / name)
