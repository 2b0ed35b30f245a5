"""The episodes of a data set that is being made, one file each: what a kill leaves behind is whole, and is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffrl.data.columns import open_table
from diffrl.support.errors import DataError, UserError
from diffrl.support.files import atomic_path, clear_abandoned, read_json
from envs.ogbench.oracles import Episode

ABOUT = "about.json"
TRAIN, VALIDATION = 0, 1
"""The splits."""
_FARED = "fared"
_SUFFIX = ".npz"


def open_folder(folder: Path, about: Mapping[str, Any]) -> bool:
    """Make the folder ready for episodes of which `about` says all that decides them.

    Those in it of other settings are removed. Gives whether there were any.
    """
    written = folder / ABOUT
    replaced = False
    if folder.exists():
        try:
            same = read_json(written) == json.loads(json.dumps(about))
        except UserError:
            same = False
        if not same:
            replaced = any(folder.glob(f"*{_SUFFIX}"))
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    clear_abandoned(folder)
    if not written.exists():
        with atomic_path(written) as temporary:
            temporary.write_text(json.dumps(about, indent=1))
    return replaced


def place(folder: Path, split: int, number: int) -> Path:
    """The file of an episode."""
    return folder / f"{split}-{number:05d}{_SUFFIX}"


def write(folder: Path, split: int, number: int, episode: Episode) -> None:
    """Write an episode, whole or not at all."""
    columns: dict[str, Any] = {**episode.columns}
    columns[_FARED] = np.array([episode.targets, episode.reached, episode.attempts], np.int64)
    with atomic_path(place(folder, split, number)) as temporary:
        np.savez(temporary, **columns)


def read(folder: Path, split: int, number: int) -> Episode:
    """Read an episode. Raises DataError where it is not whole."""
    path = place(folder, split, number)
    with open_table(path) as table:
        columns = {key: table.read(column) for key in table.names() if (column := table.get(key)) is not None}
    fared = columns.pop(_FARED, np.zeros(0))
    if fared.shape != (3,) or len({len(values) for values in columns.values()}) != 1:
        raise DataError(f"{path} is no episode.")
    return Episode(columns, *(int(value) for value in fared))


def is_whole(folder: Path, split: int, number: int) -> bool:
    """Whether an episode is there; one that is damaged is removed."""
    path = place(folder, split, number)
    if not path.exists():
        return False
    try:
        read(folder, split, number)
    except DataError:
        path.unlink()
        return False
    return True
