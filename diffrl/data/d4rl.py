"""D4RL's HDF5 layout in and out, with its rules about what ends an episode.

Flat arrays `observations`, `actions`, `rewards`, `terminals` (required), `timeouts`, `next_observations`, `infos/*`,
`metadata/*` (optional). Files written here carry the SHA-256 of their contents as the root attribute `sha256`, which
is verified on reading. Nothing is ever unpickled. An `.npz` file with the same keys is read too.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias

import h5py
import numpy as np
import numpy.typing as npt

from diffrl.data.columns import FETCH_AGAIN, Column, Hdf5Table, Table, open_table
from diffrl.data.config import HDF5_SUFFIXES
from diffrl.data.layouts import other_layout
from diffrl.data.offline import ACTION_LIMIT, OfflineDataset, count_timeouts, refuse_whole
from diffrl.support.errors import DataError, UserError, closest, joined, listed
from diffrl.support.files import atomic_path, typed
from diffrl.support.schema import held

Array: TypeAlias = npt.NDArray[Any]

REQUIRED = ("observations", "actions", "rewards", "terminals")
NEEDING_NONE = ("bc", "diffusion_bc", "diffuser")
"""The agents of diffrl on which rewards have no influence, by default; those of packages say it themselves."""
OPTIONAL = ("timeouts", "next_observations")
CUTS = ("truncations", "truncation", "truncated", "timeout")
"""Other names of `timeouts`."""
ENDS = ("dones", "done", "is_last", "episode_terminals", "episode_ends")
"""Names of a column that marks every end of an episode, `terminals` and `timeouts` alike."""
STARTS = ("is_first", "episode_starts")
"""Names of a column that marks the first row of every episode."""
TERMINALS = ("terminal", "terminations", "terminated", "is_terminal")
"""Other names of `terminals`, which must be there too, with the same contents."""
BOUNDARIES = CUTS + ENDS + STARTS + TERMINALS
"""All columns that say where episodes end, beside `terminals` and `timeouts`."""
ALIASES = {
    "observations": ("obs", "states", "state"),
    "actions": ("acts", "act"),
    "rewards": ("rews", "rew"),
    "terminals": TERMINALS,
}
"""Names that others give to the columns that must be there: asked about where one is missing."""
_METADATA = 2**24
"""Bytes of an entry of the metadata at most."""
_BLOCK, _MOST = 2**22, 2**28
"""Bytes of an array that are read at once for its checksum, and at most where it is stored in larger parts."""
_CHUNK = 2**18
"""Bytes that HDF5 compresses as one: h5py's own guess for a column that grows is a few kilobytes, slow to read."""


def read(
    path: Path | str,
    *,
    max_episode_steps: int | None = None,
    action_limit: float | None = ACTION_LIMIT,
    rows: int | None = None,
    check: bool = True,
    infos: bool = True,
) -> OfflineDataset:
    """Read an HDF5 file (or an `.npz`) in D4RL's layout.

    Columns may be (N, 1) where (N,) is meant, of any numeric type. For `timeouts` any of `BOUNDARIES` is taken. Where
    there is none of them, episodes are counted out by `max_episode_steps` if that is given, as D4RL does; else only
    terminals end them. `rows` reads no more than the first rows. `infos=False` leaves `infos/*` unread. Shapes are
    compared before any value is read, and columns that are not D4RL's are never read but for a stored checksum, which
    is verified part by part whatever is read. `action_limit=None` takes actions of any size. `check=False` leaves out
    `OfflineDataset.validate`, for `diffrl data info`.

    Raises DataError naming file, key and row: file missing, no HDF5, cut short, a key missing or not numeric, shapes
    or lengths that do not fit, NaN or infinity, actions outside the bounds in the file's metadata (where it has none,
    [-action_limit, action_limit]), columns that contradict one another about ends, a wrong checksum, a column that
    leads out of the file, more than fits into memory.
    """
    path = Path(path).expanduser()
    if rows is not None and rows < 1:
        raise DataError(f"{rows} rows were asked for; ask for at least 1.")
    with open_table(path) as table:
        columns = _needed(table)
        shapes = _shapes(columns)
        problems = shapes.structural_problems()
        if problems and check:
            raise DataError("\n".join(f"{path}: {problem}" for problem in problems))
        if problems:  # there is nothing to read that would fit together
            return shapes
        if infos:
            n = len(shapes)
            columns |= {k: c for k, c in table.below("infos").items() if c.shape[:1] == (n,) and c.dtype.kind in "biuf"}
        columns |= _metadata(table)
        more = None if rows is None else rows + 1  # the row after tells nothing but that there is one
        table.check_memory(columns, more)
        arrays = {key: table.read(column, more) for key, column in columns.items()}
        if table.sha256 is not None:
            whole = {key: values for key, values in arrays.items() if values.shape == columns[key].shape}
            verify(table, whole)
    dataset = _from_arrays(arrays, path, max_episode_steps)
    dataset.metadata.update({"path": str(path)} | ({"sha256": table.sha256} if table.sha256 else {}))
    dataset = dataset if rows is None else dataset.head(rows)
    return dataset.validate(str(path), action_limit) if check else dataset


def _needed(table: Table) -> dict[str, Column]:
    """The columns that a data set is made of. Raises DataError for one that is missing or not numeric."""
    have = table.names()
    names = [name for name in have if name in REQUIRED + OPTIONAL or name.lower() in BOUNDARIES]
    columns = {name: column for name in names if (column := table.get(name)) is not None}
    if missing := [key for key in REQUIRED if key not in columns]:
        if other := other_layout(table, have):
            raise DataError(other)
        raise _lacks(table.path, missing, have)
    for key, column in columns.items():
        if column.dtype.kind not in "biuf":
            raise DataError(
                f"{table.path}: {key} has type {column.dtype}; expected numbers. Write it as float32 or bool."
            )
        if column.shape == () and key in REQUIRED + OPTIONAL:
            raise DataError(f"{table.path}: {key}: shape (), a single value; expected one row a time step.")
        if key.lower() in BOUNDARIES and column.shape[:1] not in ((), columns["rewards"].shape[:1]):
            raise DataError(
                f"{table.path}: {key}: shape {column.shape}; expected a mark for each row, as many as rewards has, "
                f"{columns['rewards'].shape}. Leave it out."
            )
    return columns


def _lacks(path: Path, missing: Sequence[str], have: Sequence[str]) -> DataError:
    """What is said of a file that lacks columns: which, what it holds, and what may stand for them."""
    are = "are" if len(missing) > 1 else "is"
    text = f"{path}: {joined(missing)} {are} missing; it holds: {listed(have) or 'nothing'}."
    others = [name for name in have if name not in REQUIRED + OPTIONAL]
    renamed = {key: name for key in missing for name in others if name.lower() in ALIASES[key]}
    for key in missing:
        near = closest(key, [name for name in others if name not in renamed.values()])
        if key not in renamed and near is not None and closest(near, REQUIRED) == key:
            renamed[key] = near
    for key, near in renamed.items():
        text += f" Is {near[:60]!r} the {key}? Then rename it."
    if len(renamed) < min(len(missing), len(others)):
        text += " Columns are known by D4RL's names."
    if "rewards" in missing and "rewards" not in renamed:
        text += f" Of diffrl's agents only {joined(NEEDING_NONE)} (unguided) do without: for them write zeros."
    ends = next((name for name in others if name.lower() in ENDS), None)
    if "terminals" in missing and "terminals" not in renamed and ends is not None:
        text += (
            f" {ends} mixes terminal ends and time-outs: write `terminals`, True where the state itself ended the "
            "episode, and `timeouts`, True where a limit of steps cut it."
        )
    elif "terminals" in missing and "terminals" not in renamed:
        text += " Where no episode ends in a terminal state, terminals are False in every row."
    return DataError(text)


def _shapes(columns: Mapping[str, Column]) -> OfflineDataset:
    """A data set of the columns' shapes, which holds one zero for all values and so takes no memory."""
    arrays: dict[str, Any] = {}
    lengths = [column.shape[0] for key in REQUIRED if (column := columns[key]).shape]
    usual = max(lengths, key=lengths.count) if lengths else 0  # a column that is not there has no length to blame
    for key in dict.fromkeys((*REQUIRED, "timeouts", *OPTIONAL)):
        shape = columns[key].shape if key in columns else (usual,)
        if key in ("observations", "actions", "next_observations"):
            if key not in columns:
                continue
            shape = (*shape, 1) if len(shape) == 1 else shape
        elif len(shape) == 2 and shape[1] == 1:
            shape = shape[:1]
        arrays[key] = np.broadcast_to(np.zeros((), np.bool_ if key in ("terminals", "timeouts") else np.float32), shape)
    return OfflineDataset(**arrays)


def _metadata(table: Table) -> dict[str, Column]:
    for key, column in (columns := table.below("metadata")).items():
        if column.nbytes() > _METADATA:
            raise DataError(
                f"{table.path}: {key} has {column.nbytes():,} bytes; expected at most {_METADATA:,}. Move it elsewhere."
            )
    return columns


def verify(table: Table, arrays: Mapping[str, Array]) -> None:
    """Raise DataError where a file's contents do not have its checksum. arrays: what has been read already, whole."""
    found = digest({name: arrays.get(name, values) for name, values in _contents(table).items()})
    if found != table.sha256:
        raise DataError(
            f"{table.path}: the contents have SHA-256 {found}; the file says {str(table.sha256)[:70]}. It was damaged "
            f"or changed after it was written. {FETCH_AGAIN}"
        )


def _contents(table: Table) -> dict[str, Any]:
    """All that the checksum is over: every array of an HDF5 file, and the columns of a data set also where linked."""
    assert isinstance(table, Hdf5Table)
    found = table.contents()
    for name in (*REQUIRED, *OPTIONAL):
        if name not in found and (column := table.get(name)) is not None:
            found[name] = column.source
    return found


def has_checksum(path: Path) -> bool:
    """Whether a file holds a checksum of its contents. Raises DataError where it cannot be read."""
    with open_table(path) as table:
        return table.sha256 is not None


def count_rows(path: Path) -> int | None:
    """The number of rows of a file, reading none of them; None where it has no actions or cannot be read."""
    try:
        with open_table(path) as table:
            column = table.get("actions")
            return None if column is None or not column.shape else column.shape[0]
    except DataError:
        return None


def write(path: Path | str, dataset: OfflineDataset, *, force: bool = False) -> Path:
    """Write `dataset` as compressed HDF5, under a temporary name first, with its checksum. Returns the path.

    Metadata that is neither text, number nor array is stored as JSON text. force: replace the file if it exists.

    Raises UserError where it exists otherwise, for a name that does not end in .hdf5 or .h5 and a place that cannot be
    written; DataError for what `dataset.validate` refuses (actions only beside bounds in the metadata), and for infos
    that are not numeric or not a row a time step.
    """
    path, dataset = Path(path).expanduser(), held(dataset, OfflineDataset, "dataset")
    if path.suffix not in HDF5_SUFFIXES:
        raise UserError(f"Cannot write {path}: what is written is HDF5; expected a path ending in .hdf5 or .h5.")
    if path.exists() and not force:
        raise UserError(f"{path} exists, and is not overwritten: force=True replaces it, or write to another path.")
    dataset.validate(f"Nothing is written to {path}", math.inf)
    infos = {f"infos/{key}": np.asarray(values) for key, values in dataset.infos.items()}
    for key, values in infos.items():
        if values.dtype.kind not in "biufS":
            raise DataError(f"{key} has type {values.dtype}, which {path} cannot hold; expected numbers.")
        if len(values.shape) == 0 or len(values) != len(dataset):
            raise DataError(f"{key} has shape {values.shape}; expected {len(dataset):,} rows, as in rewards.")
    return write_blocks(path, [dataset.columns() | infos], dataset.metadata)


def write_blocks(path: Path | str, blocks: Iterable[Mapping[str, Array]], metadata: Mapping[str, Any]) -> Path:
    """Write data that come in parts as one file, as `write` does; one part at a time is in memory.

    blocks: the parts, each a table of arrays by name with the rows first; names, types and shapes of a row are the same
    in all. Returns the path. Raises UserError where the place cannot be written.
    """
    path = Path(path).expanduser()
    try:
        with atomic_path(path) as temporary, _new_file(temporary) as (file, check):
            for block in blocks:
                check()
                for key, values in block.items():
                    if key not in file:
                        rest, n = values.shape[1:], len(values)
                        rows = min(_CHUNK * n // max(values.nbytes, 1), max(n, 2**12))
                        chunks = (max(rows, 1), *rest) if values.size else True
                        options = {"compression": "gzip", "shuffle": True, "chunks": chunks}
                        file.create_dataset(key, (0, *rest), values.dtype, maxshape=(None, *rest), **options)
                    column = file[key]
                    column.resize(len(column) + len(values), axis=0)
                    column[len(column) - len(values) :] = values
            for key, value in metadata.items():
                if key not in ("path", "sha256", "timeouts"):  # of the file that was read
                    file[f"metadata/{key}"] = _encode(value)
            file.attrs["sha256"] = digest(Hdf5Table(path, file).contents())
    except OSError as error:
        raise UserError(
            f"Cannot write {path}: {error.strerror or error}. Choose another place, or make room there."
        ) from error
    return path


class _Kept:
    """A file that HDF5 writes through, and that keeps the first error of writing instead of telling HDF5 of it.

    Told of a full disk, HDF5 leaves objects that cannot be closed, and each prints a traceback of its own as it dies.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def _try(self, method: Callable[..., Any], *arguments: Any) -> None:
        if self.error is None:
            try:
                method(*arguments)
            except OSError as error:
                self.error = error

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        while len(left) and self.error is None:
            try:
                left = left[self._file.write(left) :]
            except OSError as error:
                self.error = error
        return len(data)

    def truncate(self, size: int) -> int:
        self._try(self._file.truncate, size)
        return size

    def flush(self) -> None:
        self._try(self._file.flush)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(buffer)  # type: ignore[attr-defined,no-any-return]


@contextmanager
def _new_file(path: Path) -> Iterator[tuple[h5py.File, Callable[[], None]]]:
    """A new HDF5 file to write on, and what raises OSError where it could not be written so far; so does the end."""

    def check() -> None:
        if kept.error is not None:
            raise kept.error

    with path.open("w+b", buffering=0) as raw:
        kept = _Kept(raw)
        try:
            with h5py.File(kept, "w") as file:
                yield file, check
        finally:
            check()  # what HDF5 raises besides comes of it


def seal(path: Path) -> str:
    """Add the checksum of its contents to an HDF5 file that has none, such as one just downloaded; return it.

    The file is replaced by a copy with the checksum, so that nothing is lost where the disk is full or the process
    dies. Raises DataError where it cannot be read, or is an `.npz`, which has no place for one; UserError where it
    cannot be written.
    """
    path = Path(path).expanduser().resolve()
    with open_table(path) as table:
        if not isinstance(table, Hdf5Table):
            raise DataError(f"{path} can hold no checksum: `diffrl data convert {typed(path)} NEW.hdf5` writes one.")
        if table.sha256 is not None:
            return table.sha256
        found = digest(_contents(table))
    try:
        with atomic_path(path) as temporary:
            shutil.copy(path, temporary)
            with h5py.File(temporary, "r+") as file:
                file.attrs["sha256"] = found
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error}. It is as it was.") from error
    return found


def fingerprint(dataset: OfflineDataset) -> str:
    """The `digest` of a data set's columns: the same for the same data, wherever they were read from."""
    return digest(dataset.columns())


def digest(arrays: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal, over names, types, shapes and values of all arrays, in the order of their names.

    The arrays may be those of an open file and larger than memory: their rows are read in turn.
    """
    total = hashlib.sha256()
    for key in sorted(arrays):
        values = arrays[key]
        total.update(f"{key} {values.dtype.str} {values.shape}\n".encode())
        if values.ndim == 0:
            total.update(np.asarray(values[()]).reshape(-1).view(np.uint8).data)
            continue
        rows = max(_BLOCK * len(values) // max(values.nbytes, 1), 1)
        chunk = (getattr(values, "chunks", None) or (1,))[0]  # whole ones: a part of one costs as much to read
        if chunk * values.nbytes <= _MOST * len(values):
            rows = max(rows // chunk, 1) * chunk
        for start in range(0, len(values), rows):
            part = np.asarray(values[start : start + rows], order="C")
            total.update(part.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def _from_arrays(arrays: Mapping[str, Array], path: Path, max_episode_steps: int | None) -> OfflineDataset:
    """The data set of the columns that `_needed` has let through, with their infos and metadata."""
    refuse_whole(arrays["actions"], f"{path}: ")
    terminals = _flags(arrays["terminals"], "terminals", path)
    metadata = {key.removeprefix("metadata/"): _decode(v) for key, v in arrays.items() if key.startswith("metadata/")}
    found = _timeouts(arrays, terminals, path)
    if found is not None:
        timeouts, column = found
        if column != "timeouts":
            metadata["timeouts"] = f"from the file's column {column!r}"
    elif max_episode_steps is not None and terminals.ndim == 1:
        timeouts = count_timeouts(terminals, max_episode_steps)
        metadata["timeouts"] = f"not in the file: every {max_episode_steps} steps"
    else:
        timeouts = np.zeros_like(terminals)
        metadata["timeouts"] = "not in the file: none"
    return OfflineDataset(
        observations=_rows(arrays["observations"]),
        actions=_rows(arrays["actions"]),
        rewards=_column(arrays["rewards"]).astype(np.float32, copy=False),
        terminals=terminals,
        timeouts=timeouts,
        next_observations=_rows(arrays["next_observations"]) if "next_observations" in arrays else None,
        infos={key.removeprefix("infos/"): v for key, v in arrays.items() if key.startswith("infos/")},
        metadata=metadata,
    )


def _timeouts(
    arrays: Mapping[str, Array], terminals: npt.NDArray[np.bool_], path: Path
) -> tuple[npt.NDArray[np.bool_], str] | None:
    """The rows at which an episode was cut, and the column that says so: `timeouts`, or one of another name.

    None where no column says so. Raises DataError for columns that contradict one another, or do not fit.
    """
    timeouts, named = None, ""
    if "timeouts" in arrays:
        timeouts, named = _flags(arrays["timeouts"], "timeouts", path), "timeouts"
    for key in (key for name in BOUNDARIES for key in arrays if key.lower() == name):
        if arrays[key].ndim == 0:
            continue  # a setting, such as the number of steps after which episodes were cut
        if _column(arrays[key]).shape != terminals.shape:
            raise DataError(
                f"{path}: {key} has type {arrays[key].dtype} and shape {arrays[key].shape}; expected a mark for each "
                f"row as in terminals, {terminals.shape}. Write it as `timeouts`, or leave it out."
            )
        marks, name = _flags(arrays[key], key, path), key.lower()
        ends, ends_named = (
            (terminals, "terminals") if timeouts is None else (terminals | timeouts, f"terminals, {named}")
        )
        if name in STARTS:
            marks = np.concatenate([marks[1:], ends[-1:]])  # nothing here tells what came after the last row
        if name in TERMINALS:
            ends, ends_named, odd = terminals, "terminals", marks != terminals
        elif name not in CUTS and (marks == terminals).all():
            continue  # the same column once more: it tells nothing of cuts
        elif timeouts is not None:
            odd = (marks != timeouts) & ~terminals if name in CUTS else marks != ends
        elif name in CUTS:
            timeouts, named, odd = marks, key, np.zeros_like(marks)
        else:
            timeouts, named, odd = marks & ~terminals, key, terminals & ~marks
        if odd.any():
            row = int(np.flatnonzero(odd)[0])
            raise DataError(
                f"{path}: {key} contradicts {ends_named}: row {row} is {'an' if marks[row] else 'no'} end by {key}, "
                f"{'an' if ends[row] else 'no'} end by {ends_named}. Leave out the one that is wrong."
            )
    return None if timeouts is None else (timeouts, named)


def _column(values: Array) -> Array:
    """A column (N, 1) as (N,); everything else unchanged, for `problems()` to report."""
    return values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values


def _rows(values: Array) -> npt.NDArray[np.float32]:
    """A column (N,) as (N, 1), in float32; a number too large becomes infinite, which `problems()` reports."""
    with np.errstate(over="ignore"):
        return (values[:, None] if values.ndim == 1 else values).astype(np.float32, copy=False)


def _flags(values: Array, key: str, path: Path) -> npt.NDArray[np.bool_]:
    values = _column(values)
    odd = np.flatnonzero((values != 0) & (values != 1))
    if len(odd):
        row = odd[0] // max(1, values[0].size)
        raise DataError(f"{path}: {key}: row {row} holds {values.flat[odd[0]]}; expected True or False (1 or 0).")
    return values.astype(np.bool_)


def _encode(value: Any) -> Array:
    """A metadata value as an array that HDF5 stores without object types."""
    if isinstance(value, bool | int | float | np.number | np.bool_ | np.ndarray):
        array = np.asarray(value)
        if array.dtype.kind in "biufS":
            return array
        value = array.tolist()
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return np.asarray(np.bytes_(text.encode() or b" "))


def _decode(array: Array) -> Any:
    if array.dtype.kind == "S" and array.ndim == 0:
        return bytes(array[()]).decode(errors="replace").rstrip()
    return array.item() if array.ndim == 0 else array
