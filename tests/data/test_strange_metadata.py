"""What a stranger's file says of itself reaches the terminal as text: no escape code acts, nothing is endless."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from diffrl.cli import main
from diffrl.data import d4rl
from diffrl.data.env_spec import EnvSpec
from diffrl.support.errors import DataError, printable

ESCAPES = "\x1b]0;pwned\x07\x1b[2J\x1b[31m\x9b1mX\u202e"


def file_with(path: Path, **metadata: Any) -> Path:
    """A data set of 40 rows whose metadata say this."""
    rng, n = np.random.default_rng(0), 40
    ends = np.zeros(n, bool)
    ends[9::10] = True
    with h5py.File(path, "w") as file:
        file["observations"] = rng.normal(size=(n, 3)).astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, (n, 1)).astype(np.float32)
        file["rewards"] = np.arange(n, dtype=np.float32)
        file["terminals"], file["timeouts"] = np.zeros(n, bool), ends
        for key, value in metadata.items():
            file[f"metadata/{key}"] = value
    return path


def test_text_is_made_printable() -> None:
    assert printable("a\nb\tc \u00e9 \u00b1") == "a\nb\tc \u00e9 \u00b1"
    assert printable(ESCAPES) == r"\x1b]0;pwned\x07\x1b[2J\x1b[31m\x9b1mX\u202e"
    assert printable("\udcff") == r"\udcff"
    assert printable("x" * 300, 200) == "x" * 200 + "... (300 characters)"


@pytest.mark.parametrize("spec", [False, True])
def test_escape_codes_of_metadata_are_not_printed(
    tmp_path: Path, spec: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"env_spec": json.dumps({"id": ESCAPES, "kwargs": {ESCAPES: ESCAPES}})} if spec else {}
    file = file_with(tmp_path / "a.hdf5", env_id=ESCAPES, author=ESCAPES, **more)
    main(["data", "info", str(file)])
    assert main(["train", "--agent", "bc", "--dataset", str(file), "--env", ESCAPES, "--steps", "1"]) == 2
    told = capsys.readouterr()
    assert {*"\x1b\x07\x9b\u202e"}.isdisjoint(told.out + told.err)
    assert (r"\x1b]0;pwned" in told.out, r"\x1b]0;pwned" in told.err) == (True, True)


def test_a_column_that_is_there_and_not_found_is_damaged(tmp_path: Path) -> None:
    """Each bit of the names in the file's heap is flipped: what is listed is never said to be missing."""
    file = file_with(tmp_path / "a.hdf5")
    sound = file.read_bytes()
    said = []
    for name in (b"actions\0", b"observations\0", b"rewards\0", b"terminals\0", b"timeouts\0"):
        at = sound.index(name)
        for bit in range(8 * len(name)):
            flipped = bytearray(sound)
            flipped[at + bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            try:
                d4rl.read(file)
            except DataError as error:
                said.append(str(error))
    damaged = [one for one in said if "damaged: in the file, but not to be found. " in one]
    assert damaged
    for missing, _, held in (one.partition(" missing; it holds: ") for one in said):
        listed = held.partition(".")[0].split(", ")
        assert not set(missing.partition(": ")[2].replace(" and ", ", ").split(", ")) & {*listed}


@pytest.mark.parametrize("where", ["limit", "kwargs"])
def test_a_time_limit_beyond_sense_is_refused(tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a file, and of --max-episode-steps: an environment that nothing else ends would be acted in for ever."""
    limit = {"max_episode_steps": 10**30}
    spec = {"id": "Pendulum-v1", **(limit if where == "limit" else {"kwargs": limit})}
    file = file_with(tmp_path / "a.hdf5", env_id="Pendulum-v1", env_spec=json.dumps(spec))
    for words in (["data", "info", str(file)], ["train", "--agent", "bc", "--dataset", str(file), "--steps", "1"]):
        assert main(words) == 2
        assert "which is no time limit; expected at most 10,000,000" in capsys.readouterr().err
    sound = str(file_with(tmp_path / "c.hdf5", env_id="Pendulum-v1"))
    words = ["train", "--agent", "bc", "--dataset", sound, "--steps", "1", "--out", str(tmp_path / "run")]
    assert main([*words, "--max-episode-steps", "10000001"]) == 2
    assert "expected at most 10,000,000" in capsys.readouterr().err
    assert EnvSpec("Pendulum-v1", {}, 10**7).time_limit() == 10**7


def test_a_long_id_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = file_with(tmp_path / "a.hdf5", env_id="x" * 2_000_000)
    main(["data", "info", str(file)])
    told = capsys.readouterr()
    assert "... (2,000,000 characters)" in told.out
    assert len(told.out + told.err) < 6000
    assert len(str(EnvSpec("a" * 10_000, {f"k{i}": i for i in range(1000)}))) < 500
