"""What a stranger's file says of itself reaches the terminal as text: no escape code acts, nothing is endless."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from diffrl.cli import main
from diffrl.data.env_spec import EnvSpec
from diffrl.support.errors import printable

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


def test_a_long_id_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = file_with(tmp_path / "a.hdf5", env_id="x" * 2_000_000)
    main(["data", "info", str(file)])
    told = capsys.readouterr()
    assert "... (2,000,000 characters)" in told.out
    assert len(told.out + told.err) < 6000
    assert len(str(EnvSpec("a" * 10_000, {f"k{i}": i for i in range(1000)}))) < 500
