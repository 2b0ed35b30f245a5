"""The episodes of a data set in Minari's format, read as Minari reads them, but no more than is asked for.

Minari's own reader takes every column into memory, also `infos`, and follows what a file says wherever it leads. Here
each array is looked at before its values are read, and what leads out of the folder's files is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from gymnasium import spaces

from diffrl.data.columns import Array, check_inside, find, gib, open_hdf5
from diffrl.support.errors import DataError, UserError
from diffrl.support.files import read_json, reading, regular_file
from diffrl.support.machine import free_memory

INSTALL = "Reading and writing Minari data needs an extra: pip install 'diffrl[minari]'"
AGAIN = "Download or write it again."
_STEPS = ("rewards", "terminations", "truncations")
_ARROW = ("observations", "actions", *_STEPS)


@dataclass(frozen=True)
class Episode:
    """One episode of T steps: T + 1 observations, arrays in the dictionaries or tuples of their space."""

    id: int
    observations: Any
    actions: Any
    rewards: Array
    terminations: Array
    truncations: Array


@contextmanager
def door(folder: Path) -> Iterator[None]:
    """In the block, whatever a damaged data set makes its readers raise becomes a DataError, as `reading` says.

    A package that is missing is a UserError that names the extra.
    """
    with reading(f"{folder} cannot be read as Minari data", AGAIN, DataError):
        try:
            yield
        except ImportError as error:
            raise UserError(f"{INSTALL} ({error})") from error


def read_metadata(folder: Path) -> dict[str, Any]:
    """What `data/metadata.json` says; before anything else is read, that it is what Minari's reader can be given.

    Raises DataError where it is damaged, and where it names no spaces: Minari would make the environment that it names
    to ask for them, and so run what a file says.
    """
    found = read_json(folder / "data" / "metadata.json", advice=AGAIN, error=DataError)
    if not isinstance(found, dict):
        raise DataError(f"{folder}: metadata.json holds no entries. {AGAIN}")
    for key in ("observation_space", "action_space"):
        if not isinstance(found.get(key), str):
            raise DataError(f"{folder}: metadata.json has no {key}, and no environment is made to ask it. {AGAIN}")
    if found.get("data_format") not in ("hdf5", "arrow", "parquet"):
        raise DataError(f"{folder}: metadata.json has no data_format hdf5, arrow or parquet. {AGAIN}")
    for key in ("total_episodes", "total_steps"):
        if not isinstance(found.get(key), int):
            raise DataError(f"{folder}: metadata.json has no {key}, a whole number. {AGAIN}")
    return found


def episodes(folder: Path, data: Any) -> Iterator[Episode]:
    """The episodes of a `minari.MinariDataset` in `folder`, in order. Raises DataError, also for more than fits."""
    budget = _Budget(folder, free_memory())
    storage = data.storage
    if storage.FORMAT == "hdf5":
        path = folder / "data" / "main_data.hdf5"
        with open_hdf5(path, AGAIN) as file:
            for number in map(int, data.episode_indices):
                yield _of_hdf5(file, number, storage, path, budget)
        return
    for number in map(int, data.episode_indices):
        yield _of_arrow(folder / "data" / str(number), number, storage, budget)


@dataclass
class _Budget:
    """The memory that is free, of which the episodes take their part before they are read."""

    folder: Path
    free: int
    taken: int = 0

    def take(self, size: int) -> None:
        self.taken += size
        if self.taken > self.free:
            raise DataError(
                f"{self.folder} holds more than {gib(self.taken)}; {gib(self.free)} of memory are free. Read fewer "
                "rows: --rows N."
            )


def _of_hdf5(file: h5py.File, number: int, storage: Any, path: Path, budget: _Budget) -> Episode:
    name = f"episode_{number}"
    where = f"{path}: {name}"
    group = find(file, name, str(path))
    if not isinstance(group, h5py.Group):
        raise DataError(f"{where} is missing. {AGAIN}")

    def column(parent: h5py.Group, key: str) -> h5py.Dataset:
        item = find(parent, key, where)
        if not isinstance(item, h5py.Dataset) or item.shape is None or not item.shape:
            raise DataError(f"{where}: {key} is missing, or no array. {AGAIN}")
        check_inside(item, f"{where}: {key}")
        budget.take(item.size * item.dtype.itemsize)
        return item

    def decoded(parent: h5py.Group, key: str, space: spaces.Space[Any]) -> Any:
        if isinstance(space, spaces.Dict | spaces.Tuple):
            part = find(parent, key, where)
            if not isinstance(part, h5py.Group):
                raise DataError(f"{where}: {key} is missing, or no group. {AGAIN}")
            if isinstance(space, spaces.Tuple):
                return tuple(decoded(part, f"_index_{i}", space.spaces[i]) for i in range(len(space.spaces)))
            return {key: decoded(part, key, space.spaces[key]) for key in space.spaces if key in part.keys()}  # noqa: SIM118 (`in part` follows links)
        # Text, and images, which are stored as JPEG.
        return storage._decode_space(column(parent, key), space)

    steps = {key: np.asarray(column(group, key)[:]) for key in _STEPS}
    observations = decoded(group, "observations", storage.observation_space)
    return Episode(number, observations, decoded(group, "actions", storage.action_space), **steps)


def _of_arrow(folder: Path, number: int, storage: Any, budget: _Budget) -> Episode:
    from minari.dataset._storages.arrow_storage import _decode_space
    from pyarrow import dataset as arrow  # type: ignore[import-untyped]

    files = sorted(path for path in folder.glob("*") if path.name[0] not in "_." and path.name != "metadata.json")
    if not files:
        raise DataError(f"{folder} has no files. Download or write the data set again.")
    for path in files:
        regular_file(path, f"a file in {storage.FORMAT} format", error=DataError)
        budget.take(path.stat().st_size)
    table = arrow.dataset([str(path) for path in files], format=storage.FORMAT).to_table(columns=[*_ARROW])
    table.validate(full=True)  # without it a damaged file may end the process
    batch = table.combine_chunks().to_batches()
    if len(batch) != 1:
        raise DataError(f"{folder} holds no steps. Download or write the data set again.")
    columns = {key: batch[0][key] for key in _ARROW}
    observations = _decode_space(storage.observation_space, columns["observations"], storage.jpeg_encoding)
    actions = _decode_space(storage.action_space, columns["actions"][:-1], storage.jpeg_encoding)
    return Episode(number, observations, actions, **{key: np.asarray(columns[key])[:-1] for key in _STEPS})
