"""What a file holds beside D4RL's columns."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import h5py

from diffrl.data.columns import Hdf5Table, find, open_table, walk
from diffrl.data.d4rl import BOUNDARIES, OPTIONAL, REQUIRED

_GROUPS = ("infos", "metadata")
_OWN = ("sha256",)
"""Attributes that are written here."""


def left_out(path: Path, copied: Iterable[str]) -> tuple[list[str], list[str]]:
    """The columns, and the attributes, of an HDF5 file or an npz that a copy of it does not have, by name.

    copied: the names of the `infos/` and `metadata/` that it has. Columns that mark ends under other names are in its
    `timeouts`. An attribute of a column is called "NAME of COLUMN". Nothing but names is read.
    """
    copied = set(copied)
    with open_table(path) as table:
        top = [name for name in table.names() if not name.startswith(tuple(f"{group}/" for group in _GROUPS))]
        known = (*REQUIRED, *OPTIONAL, *_GROUPS)
        columns = [name for name in top if name not in known and name.lower() not in BOUNDARIES]
        if not isinstance(table, Hdf5Table):
            return columns + [name for name in table.names() if name not in top and name not in copied], []
        attributes = [name for name in table.file.attrs if name not in _OWN]
        for group in _GROUPS:
            inside = find(table.file, group, str(path))
            if isinstance(inside, h5py.Group):
                names = (f"{group}/{name}" for name, _ in walk(inside, f"{path}: {group}"))
                columns += [name for name in names if name not in copied]
                attributes += [f"{name} of {group}" for name in inside.attrs]
        for name, item in walk(table.file, str(path)):
            attributes += [f"{attribute} of {name}" for attribute in item.attrs]
    return columns, attributes
