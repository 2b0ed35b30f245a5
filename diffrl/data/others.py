"""What a file holds beside D4RL's columns."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import h5py

from diffrl.data.columns import Hdf5Table, find, open_table, walk_all
from diffrl.data.d4rl import BOUNDARIES, OPTIONAL, REQUIRED
from diffrl.support.errors import DataError

_GROUPS = ("infos", "metadata")
_OWN = ("sha256",)
"""Attributes that are written here."""


def left_out(path: Path, copied: Iterable[str]) -> tuple[list[str], list[str]]:
    """The columns, and the attributes, of an HDF5 file or an npz that a copy of it does not have, by name.

    copied: the names of the `infos/` and `metadata/` that it has. Columns that mark ends under other names are in its
    `timeouts`. An attribute of a column or a group is called "NAME of COLUMN". Nothing but names is read, and nothing
    is refused: where the file's groups nest too deep, or are damaged, those are given that could be read.
    """
    copied, columns, attributes = set(copied), list[str](), list[str]()
    with suppress(DataError), open_table(path) as table:
        top = [name for name in table.names() if not name.startswith(tuple(f"{group}/" for group in _GROUPS))]
        known = (*REQUIRED, *OPTIONAL, *_GROUPS)
        columns += [name for name in top if name not in known and name.lower() not in BOUNDARIES]
        if not isinstance(table, Hdf5Table):
            columns += [name for name in table.names() if name not in top and name not in copied]
            return columns, attributes
        attributes += [name for name in table.file.attrs if name not in _OWN]
        for name, item in walk_all(table.file, None):
            attributes += [f"{attribute} of {name}" for attribute in item.attrs]
        for group in _GROUPS:
            inside = find(table.file, group, str(path))
            for name, item in walk_all(inside, None) if isinstance(inside, h5py.Group) else ():
                if isinstance(item, h5py.Dataset) and f"{group}/{name}" not in copied:
                    columns.append(f"{group}/{name}")
    return columns, attributes
