"""The columns of a data file, HDF5 or npz: names, types and shapes before any value, and no value from another file.

A column of an HDF5 file may be a link to another place in it. What leads out of the file is refused by name: external
links, external storage and virtual data sets would read any file that the reader may read into one that is passed on.
Whatever h5py, NumPy and zipfile raise on a damaged file becomes a DataError here. Nothing is ever unpickled.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
import numpy.typing as npt

from diffrl.support.errors import DataError, listed
from diffrl.support.files import reading, regular_file
from diffrl.support.machine import free_memory

Array: TypeAlias = npt.NDArray[Any]

PICKLES = (".pkl", ".pickle")
"""How the names of pickled files end."""
_PICKLED = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))
FETCH_AGAIN = "Write it again, or if it is D4RL's: `diffrl data download ID --force` (maze2d: `generate`)."
_HDF5, _ZIP = b"\x89HDF\r\n\x1a\n", (b"PK\x03\x04", b"PK\x05\x06")
"""How these files begin; an `.npz` is a zip archive."""
_OTHERS = {b"\x93NUMPY": "an .npy file, of one array", b"PAR1": "a Parquet file", b"ARROW1": "an Arrow file"}
"""What files of other kinds are, by how they begin."""
_TEXTS = (".csv", ".tsv", ".json", ".jsonl", ".txt")
"""How the names of files of text end."""
_READ = (
    "Data are read from HDF5 and .npz files with the arrays observations, actions, rewards and terminals, and from "
    "Minari's folders. In Python, `np.savez('rollouts.npz', observations=..., actions=..., rewards=..., "
    "terminals=..., timeouts=...)` writes one: docs/data.md#your-own-file."
)
_NEEDED = ("observations", "actions", "rewards", "terminals")
"""Columns that no file can do without."""
_LINKS = 16
"""Soft links that may follow on one another, HDF5's own number."""
_DEPTH = 32
"""Groups in one another at most."""
_LARGE, _DENSEST = 2**28, 1100
"""Bytes from which on a column must be there: stored in 1/1100 of its size at least, as gzip stores zeros."""


@dataclass(frozen=True)
class Column:
    """One array of an open file, of which no value has been read."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    values: Callable[[int | None], Array]
    """Reads the first so many rows, or all; of an array without rows, itself."""
    source: Any = None
    """The h5py.Dataset, for what reads it in parts."""

    def nbytes(self, rows: int | None = None) -> int:
        """The bytes of the first `rows` rows in memory, or of all."""
        kept = self.shape if rows is None or not self.shape else (min(rows, self.shape[0]), *self.shape[1:])
        return math.prod(kept) * self.dtype.itemsize


class Table:
    """The columns of an open file by name; see `open_table`."""

    path: Path
    sha256: str | None = None
    """The checksum that the file holds of itself."""

    def names(self) -> list[str]:
        """The names at the file's root, and of what lies in groups their whole paths."""
        raise NotImplementedError

    def get(self, name: str) -> Column | None:
        """The column of this name, or None. Raises DataError where it is no array of this file's own."""
        raise NotImplementedError

    def below(self, group: str) -> dict[str, Column]:
        """All columns in a group such as `infos`, by their whole names, but links and what is neither number nor text.

        Raises DataError for one that leads out of the file.
        """
        raise NotImplementedError

    def read(self, column: Column, rows: int | None = None) -> Array:
        """The first `rows` rows of a column, or all."""
        with reading(f"{self.path} cannot be read to its end, at key {column.name!r}", self.advice, DataError):
            return column.values(rows)

    @property
    def advice(self) -> str:
        """What to do where the file cannot be read, and how large it is."""
        return f"It has {self.path.stat().st_size:,} bytes and may be cut short or damaged. {FETCH_AGAIN}"

    def check_memory(self, columns: dict[str, Column], rows: int | None) -> None:
        """Raise DataError where so many rows of all these columns are more than the memory that is free."""
        sizes = {name: column.nbytes(rows) for name, column in columns.items()}
        total, free = sum(sizes.values()), free_memory()
        if total > free:
            largest = max(sizes, key=lambda name: sizes[name])
            raise DataError(
                f"{self.path} says that it holds {gib(total)} ({largest} {columns[largest].shape} alone "
                f"{gib(sizes[largest])}); {gib(free)} of memory are free. Read fewer rows: --rows N."
            )


@contextmanager
def open_table(path: Path) -> Iterator[Table]:
    """An HDF5 file, or an `.npz`, open for reading.

    Raises DataError for what is no file, for a file of another kind, and, in the block too, for a damaged one.
    """
    regular_file(path, "an HDF5 file in D4RL's layout", error=DataError)
    if path.suffix == ".npz":
        what = f"{path} cannot be read as an .npz file of plain arrays"
        _refuse_other(path, _beginning(path), FETCH_AGAIN)
        if not zipfile.is_zipfile(path):
            size = (
                f"It has {path.stat().st_size:,} bytes, without the list of contents that stands at an .npz file's end"
            )
            raise DataError(f"{what}. {size}: it may be cut short or damaged. {FETCH_AGAIN}")
        with reading(what, error=DataError), zipfile.ZipFile(path) as archive:
            yield NpzTable(path, archive)
        return
    with open_hdf5(path) as file:
        yield Hdf5Table(path, file)


def _beginning(path: Path) -> bytes:
    """The first bytes of a file."""
    with reading(f"{path} cannot be read", error=DataError), path.open("rb") as start:
        return start.read(24)


def _refuse_other(path: Path, beginning: bytes, advice: str) -> None:
    """Raise DataError for a file that is empty, or of another kind than its name says, if its beginning shows which."""
    if not beginning:
        raise DataError(f"{path} has 0 bytes. {advice}")
    if beginning.startswith(_HDF5) and path.suffix == ".npz":
        raise DataError(f"{path} is an HDF5 file, though its name ends in .npz: rename it to end in .hdf5.")
    if beginning.startswith(_ZIP) and path.suffix != ".npz":
        raise DataError(f"{path} is a zip archive, as .npz files are: if it is one, rename it to end in .npz.")
    kind = next((kind for start, kind in _OTHERS.items() if beginning.startswith(start)), None)
    if path.suffix.lower() in _TEXTS and beginning.isascii():
        kind = f"text ({path.suffix})"
    if kind is not None:
        raise DataError(f"{path} is {kind}, which is not read. {_READ}")


@contextmanager
def open_hdf5(path: Path, advice: str = FETCH_AGAIN) -> Iterator[h5py.File]:
    """An HDF5 file, open for reading. Raises DataError as `open_table` does. advice: what to do about a damaged one."""
    regular_file(path, "an HDF5 file", error=DataError)
    with reading(f"{path} cannot be read", error=DataError):
        is_hdf5 = h5py.is_hdf5(path)
    if not is_hdf5:
        beginning = _beginning(path)
        if path.suffix in PICKLES or beginning[:2] in _PICKLED:
            raise DataError(
                f"{path} is a pickle, as Stable-Baselines3's save_replay_buffer writes: it is refused, because reading "
                "one runs whatever code it holds. Export the buffer from the program that has it: "
                "`diffrl.data.sb3.write('buffer.hdf5', model.replay_buffer)`."
            )
        _refuse_other(path, beginning, advice)
        raise DataError(f"{path} is not an HDF5 file: it begins with {beginning!r}. {advice}")
    advice = f"It has {path.stat().st_size:,} bytes and may be cut short or damaged. {advice}"
    with reading(f"{path} cannot be read to its end", advice, DataError), h5py.File(path, "r") as file:
        yield file


class Hdf5Table(Table):
    """The arrays of an HDF5 file."""

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path, self.file = path, file
        stored = file.attrs.get("sha256")
        self.sha256 = None if stored is None else str(stored)

    def names(self) -> list[str]:
        """The names at the root, also of links."""
        return list(self.file)

    def get(self, name: str) -> Column | None:
        """The column of this name, or None; see `Table`."""
        item = find(self.file, name, str(self.path))
        if item is None:
            if name in self.names():
                raise DataError(f"{self.path}: {name} is damaged: in the file, but not to be found. {FETCH_AGAIN}")
            return None
        if not isinstance(item, h5py.Dataset) or item.shape is None:
            raise DataError(f"{self.path}: {name} {_no_array(name, item)}")
        return self._column(name, item)

    def below(self, group: str) -> dict[str, Column]:
        """All columns in a group; see `Table`."""
        top = find(self.file, group, str(self.path))
        items = walk(top, f"{self.path}: {group}") if isinstance(top, h5py.Group) else ()
        columns = (self._column(f"{group}/{name}", item) for name, item in items)
        return {column.name: column for column in columns if column.dtype.kind in "biufS"}

    def contents(self) -> dict[str, Any]:
        """All arrays by name, for the checksum over them: none that leads out of the file, links only if `linked`."""
        columns = (self._column(name, item) for name, item in walk(self.file, str(self.path)))
        return {
            column.name: column.values(None) if column.source is None else column.source
            for column in columns
            if column.dtype.kind in "biufS"
        }

    def _column(self, name: str, item: h5py.Dataset) -> Column:
        check_inside(item, f"{self.path}: {name}")
        if h5py.check_string_dtype(item.dtype) is not None and item.shape == () and item.dtype.kind == "O":
            text = np.asarray(np.bytes_(item.asstr()[()].encode() or b" "))
            return Column(name, (), text.dtype, lambda rows: text)

        def values(rows: int | None) -> Array:
            return np.asarray(item[()] if rows is None or item.shape == () else item[:rows])

        return Column(name, item.shape, item.dtype, values, item)


def _no_array(name: str, item: Any) -> str:
    """What is said of a column's name that stands for a group, or for an array that was never given a shape."""
    expected = "expected an array of one row a time step."
    if not isinstance(item, h5py.Group):
        return f"is an empty data set; {expected} {'Write it.' if name in _NEEDED else 'Remove it.'}"
    parts = f" ({listed(list(item))})" if len(item) else ""
    if name in _NEEDED or name == "next_observations":
        order = ", in Gymnasium's order of keys, list(env.observation_space)" if "observations" in name else ""
        return f"is a group; {expected} Join its parts{parts} into one array of columns, (N, size){order}."
    return f"is a group{parts}; {expected} Remove it."


def find(group: h5py.Group, name: str, where: str) -> Any:
    """The object of this name in an HDF5 file, through links inside the file; None where there is none.

    where: the file, for errors. Raises DataError for a link to another file, and for one that leads nowhere.
    """
    return _follow(group, name, f"{where}: {name}", _LINKS)


def _follow(start: h5py.Group, path: str, where: str, links: int) -> Any:
    item: Any = start.file["/"] if path.startswith("/") else start
    for part in path.split("/"):
        if part in ("", "."):
            continue
        key = part.encode(errors="surrogateescape")
        # h5py's own `in` and `get` follow a link into another file to see whether anything is there.
        if not isinstance(item, h5py.Group) or not item.id.links.exists(key):
            return None
        kind = item.id.links.get_info(key).type
        if kind == h5py.h5l.TYPE_HARD:
            item = item[key]
        elif kind == h5py.h5l.TYPE_SOFT and links > 0:
            target = item.id.links.get_val(key).decode(errors="surrogateescape")
            item = _follow(item, target, where, links - 1)
            if item is None:
                raise DataError(f"{where} is a link to {target[:100]!r}, where there is nothing. Remove or mend it.")
        elif kind == h5py.h5l.TYPE_SOFT:
            raise DataError(f"{where} is a link to a link to a link, without an end. Remove it.")
        else:
            raise DataError(f"{where} is a link to another file, which is not followed. Copy the values into this one.")
    return item


def walk(top: h5py.Group, where: str) -> Iterator[tuple[str, h5py.Dataset]]:
    """All arrays in a group and the groups in it, by name, each once, and no links.

    where: the file, for the DataError where there are more than `_DEPTH` groups in one another.
    """
    for name, item in walk_all(top, where):
        if isinstance(item, h5py.Dataset) and item.shape is not None:
            yield name, item


def walk_all(top: h5py.Group, where: str | None) -> Iterator[tuple[str, Any]]:
    """All arrays, groups and types in a group, by name, each once, and no links, as `Group.visititems` gives them.

    That takes minutes for thousands of groups in one another, which a damaged or hostile file may say it has.
    where: the file, for the DataError where there are more than `_DEPTH`; None: what lies deeper is passed over.
    """
    seen = set()

    def visit(group: h5py.Group, prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
        if depth > _DEPTH and where is None:
            return
        if depth > _DEPTH:
            raise DataError(f"{where} has more than {_DEPTH} groups in one another; expected arrays. Flatten it.")
        keys: list[bytes] = []
        group.id.links.iterate(keys.append)
        for key in sorted(keys):
            if group.id.links.get_info(key).type != h5py.h5l.TYPE_HARD:
                continue
            item = group[key]
            place = h5py.h5o.get_info(item.id).addr
            if place in seen:
                continue
            seen.add(place)
            name = prefix + key.decode(errors="surrogateescape")
            yield name, item
            if isinstance(item, h5py.Group):
                yield from visit(item, f"{name}/", depth + 1)

    seen.add(h5py.h5o.get_info(top.id).addr)
    return visit(top, "", 1)


def check_inside(item: h5py.Dataset, where: str) -> None:
    """Raise DataError where an array's values are in another file, or are not there at all; none is read.

    where: the file and the array's name.
    """
    created = item.id.get_create_plist()
    outside = ""
    if created.get_layout() == h5py.h5d.VIRTUAL:
        outside = "is a virtual data set, a view of other files"
    elif created.get_external_count() > 0:
        outside = f"is kept outside of the file, in {created.get_external(0)[0].decode(errors='replace')[:100]!r}"
    if outside:
        raise DataError(f"{where} {outside}: nothing is read from there. Copy its values into the file.")
    declared, stored = math.prod(item.shape) * item.dtype.itemsize, item.id.get_storage_size()
    if declared > max(_LARGE, _DENSEST * stored):
        raise DataError(
            f"{where} says that it is {item.shape}, {gib(declared)}, of which the file holds {stored:,} bytes. It is "
            f"damaged, or was never filled. {FETCH_AGAIN}"
        )
    chunk = math.prod(item.chunks or (0,)) * item.dtype.itemsize
    if chunk > max(_LARGE, 4 * declared):
        raise DataError(f"{where}, {gib(declared)}, is stored in parts of {gib(chunk)}: it is damaged. {FETCH_AGAIN}")


class NpzTable(Table):
    """The arrays of an npz file, a zip archive."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self.archive = path, archive
        self.members = {
            info.filename.removesuffix(".npy"): info for info in archive.infolist() if info.filename.endswith(".npy")
        }

    def names(self) -> list[str]:
        """All names."""
        return list(self.members)

    def get(self, name: str) -> Column | None:
        """The column of this name, or None; see `Table`."""
        if name not in self.members:
            return None
        info, what = self.members[name], f"{self.path}, key {name[:60]!r}: cannot be read as a plain array"
        with reading(what, FETCH_AGAIN, DataError):
            with self.archive.open(info) as stream:
                shape, by_columns, dtype = _header(stream)
                begin = stream.tell()
            declared = math.prod(shape) * dtype.itemsize
            if dtype.hasobject:
                raise DataError(f"{what}: it holds objects, which are pickled. Write it as float32 or bool.")
            if min(shape, default=0) < 0 or declared != info.file_size - begin:
                raise DataError(f"{what}: it should hold {declared:,} bytes, and holds {info.file_size - begin:,}.")
            if declared > max(_LARGE, _DENSEST * info.compress_size):
                raise DataError(f"{what}: it says that {info.compress_size:,} bytes hold {gib(declared)}.")

        def values(rows: int | None) -> Array:
            kept = shape if rows is None or not shape or by_columns else (min(rows, shape[0]), *shape[1:])
            array = np.empty(kept[::-1] if by_columns else kept, dtype)
            with self.archive.open(info) as stream:
                stream.read(begin)
                rest = array.reshape(-1).view(np.uint8) if array.size else np.empty(0, np.uint8)
                while rest.size:
                    part = stream.read(min(rest.size, 2**22))
                    if not part:
                        raise EOFError("the file ends within it")
                    rest[: len(part)] = np.frombuffer(part, np.uint8)
                    rest = rest[len(part) :]
                while stream.read(2**20):  # zip's checksum is that of the whole
                    pass
            return array.T[:rows] if by_columns else array

        return Column(name, shape, dtype, values)

    def below(self, group: str) -> dict[str, Column]:
        """All columns in a group; see `Table`."""
        found = (self.get(name) for name in self.members if name.startswith(f"{group}/"))
        columns = (_as_bytes(column) for column in found if column is not None)
        return {column.name: column for column in columns if column.dtype.kind in "biufS"}


def _as_bytes(column: Column) -> Column:
    """A column of NumPy's text as one of UTF-8, as HDF5 has it; any other as it is."""
    if column.dtype.kind != "U":
        return column
    utf8 = np.dtype(f"S{max(1, column.dtype.itemsize)}")  # both take up to four bytes a character
    return replace(
        column, dtype=utf8, values=lambda rows: np.char.encode(column.values(rows), "utf-8", "replace").astype(utf8)
    )


def _header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """The shape, whether the values lie by columns, and the type of an array in an .npy file."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(stream)
    if version not in readers:
        raise ValueError(f"version {version} of the format, which is for tables")
    shape, by_columns, dtype = readers[version](stream)
    return shape, by_columns and len(shape) > 1, dtype


def gib(size: int) -> str:
    """A number of bytes in words."""
    unit, name = next((u for u in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")) if size >= u[0]), (2**10, "KiB"))
    return f"{size / unit:,.1f} {name}"
