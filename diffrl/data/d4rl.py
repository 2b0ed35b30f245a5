"""D4RL's HDF5 layout in and out, with its rules about what ends an episode.

Flat arrays `observations`, `actions`, `rewards`, `terminals` (required), `timeouts`, `next_observations`, `infos/*`,
`metadata/*` (optional). Files written here carry the SHA-256 of their contents as the root attribute `sha256`, which
is verified on reading. Nothing is ever unpickled. An `.npz` file with the same keys is read too.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
import numpy.typing as npt

from diffrl.data.offline import ACTION_LIMIT, OfflineDataset, count_timeouts
from diffrl.support.errors import DataError, UserError, nearest
from diffrl.support.files import atomic_path

Array: TypeAlias = npt.NDArray[Any]

REQUIRED = ("observations", "actions", "rewards", "terminals")
OPTIONAL = ("timeouts", "next_observations")
PICKLES = (".pkl", ".pickle")
"""How the names of pickled files end."""
_PICKLED = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))
_BLOCK = 2**22
"""Bytes of an array that are read at once for its checksum."""
_CHUNK = 2**18
"""Bytes that HDF5 compresses as one: h5py's own guess for a column that grows is a few kilobytes, slow to read."""
_FETCH_AGAIN = "Write it again, or if it is D4RL's: `diffrl data download ID --force` (maze2d: `generate`)."


def read(
    path: Path | str,
    *,
    max_episode_steps: int | None = None,
    action_limit: float | None = ACTION_LIMIT,
    rows: int | None = None,
    check: bool = True,
) -> OfflineDataset:
    """Read an HDF5 file (or an `.npz`) in D4RL's layout.

    Columns may be (N, 1) where (N,) is meant, of any numeric type. Where `timeouts` is missing, episodes are counted
    out by `max_episode_steps` if that is given, as D4RL does; else only terminals end them. `rows` keeps the first
    rows. A stored checksum is verified. `check=False` leaves out `OfflineDataset.validate`, for `diffrl data info`.

    Raises DataError naming file, key and row: file missing, no HDF5, cut short, a key missing or not numeric, shapes
    or lengths that do not fit, NaN or infinity, actions outside [-action_limit, action_limit], a wrong checksum.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {what}; expected an HDF5 file in D4RL's layout. Check the path.")
    arrays, stored = _read_npz(path) if path.suffix == ".npz" else _read_hdf5(path)
    found = digest(arrays) if stored is not None else None
    if found != stored:
        raise DataError(
            f"{path}: the contents have SHA-256 {found}; the file says {stored}. It was damaged or changed "
            f"after it was written. {_FETCH_AGAIN}"
        )
    dataset = _from_arrays(arrays, path, max_episode_steps)
    dataset.metadata.update({"path": str(path)} | ({"sha256": stored} if stored else {}))
    if check:
        dataset.validate(str(path), action_limit)
    return dataset if rows is None else dataset.head(rows)


def count_rows(path: Path) -> int | None:
    """The number of rows of an HDF5 file, reading none of them; None where it has no rewards or is no HDF5."""
    try:
        with h5py.File(path, "r") as file:
            return int(file["rewards"].shape[0])
    except (OSError, KeyError, AttributeError):
        return None


def write(path: Path | str, dataset: OfflineDataset) -> Path:
    """Write `dataset` as compressed HDF5, under a temporary name first, with its checksum. Returns the path.

    Metadata that is neither text, number nor array is stored as JSON text. Raises UserError where the place cannot be
    written, DataError for infos that are not numeric.
    """
    arrays = dataset.columns()
    arrays |= {f"infos/{key}": np.asarray(values) for key, values in dataset.infos.items()}
    for key, values in arrays.items():
        if values.dtype.kind not in "biufS":
            raise DataError(f"{key} has type {values.dtype}, which {path} cannot hold; expected numbers.")
    return write_blocks(path, [arrays], dataset.metadata)


def write_blocks(path: Path | str, blocks: Iterable[Mapping[str, Array]], metadata: Mapping[str, Any]) -> Path:
    """Write data that come in parts as one file, as `write` does; one part at a time is in memory.

    blocks: the parts, each a table of arrays by name with the rows first; names, types and shapes of a row are the same
    in all. Returns the path. Raises UserError where the place cannot be written.
    """
    path = Path(path).expanduser()
    try:
        with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
            for block in blocks:
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
                if key not in ("path", "sha256"):
                    file[f"metadata/{key}"] = _encode(value)
            file.attrs["sha256"] = digest(_datasets(file))
    except (OSError, RuntimeError) as error:  # HDF5 closes a file on a full disk with the second
        why = "No space left on device" if "No space left" in str(error) else str(error)
        raise UserError(f"Cannot write {path}: {why}. Choose another place, or make room there.") from error
    return path


def _datasets(file: h5py.File) -> dict[str, Any]:
    """All arrays of an open file by name, without reading their values."""
    found: dict[str, Any] = {}
    file.visititems(lambda name, item: found.__setitem__(name, item) if isinstance(item, h5py.Dataset) else None)
    return found


def seal(path: Path) -> str:
    """Add the checksum of its contents to an HDF5 file that has none, such as one just downloaded; return it."""
    arrays, stored = _read_hdf5(path)
    if stored is None:
        stored = digest(arrays)
        with h5py.File(path, "r+") as file:
            file.attrs["sha256"] = stored
    return stored


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
        for start in range(0, len(values), rows):
            part = np.asarray(values[start : start + rows], order="C")
            total.update(part.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def _read_hdf5(path: Path) -> tuple[dict[str, Array], str | None]:
    """Every numeric or fixed-length text array of the file by name, and its checksum if it has one.

    Links to other files are not followed; types that would need unpickling are left out.
    """
    if not h5py.is_hdf5(path):
        with path.open("rb") as file:
            beginning = file.read(24)
        if path.suffix in PICKLES or beginning[:2] in _PICKLED:
            raise DataError(
                f"{path} is a pickle, as Stable-Baselines3's save_replay_buffer writes: it is refused, because reading "
                "one runs whatever code it holds. Export the buffer from the program that has it: "
                "`diffrl.data.sb3.write('buffer.hdf5', model.replay_buffer)`."
            )
        what = f"it begins with {beginning!r}" if beginning else "it has 0 bytes"
        raise DataError(f"{path} is not an HDF5 file: {what}. {_FETCH_AGAIN}")
    arrays: dict[str, Array] = {}
    key = ""

    def visit(name: str, item: Any) -> None:
        nonlocal key
        key = name
        if not isinstance(item, h5py.Dataset) or item.shape is None:
            return
        if item.dtype.kind in "biufS":
            arrays[name] = np.asarray(item[()])
        elif h5py.check_string_dtype(item.dtype) is not None and item.shape == ():
            arrays[name] = _encode(item.asstr()[()])
        elif name in REQUIRED + OPTIONAL:
            raise DataError(f"{path}: {name} has type {item.dtype}; expected numbers. Write it as float32 or bool.")

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
            stored = file.attrs.get("sha256")
    except (OSError, RuntimeError) as error:
        where = f", at key {key!r}" if key else ""
        raise DataError(
            f"{path} cannot be read to its end{where} ({error}); it has {path.stat().st_size} bytes and may be cut "
            f"short or damaged. {_FETCH_AGAIN}"
        ) from error
    return arrays, None if stored is None else str(stored)


def _read_npz(path: Path) -> tuple[dict[str, Array], str | None]:
    key = ""
    arrays = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for key in file.files:
                arrays[key] = file[key]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        where = f", key {key!r}" if key else ""
        raise DataError(f"{path}{where}: cannot be read as an .npz file of plain arrays ({error}).") from error
    return arrays, None


def _from_arrays(arrays: Mapping[str, Array], path: Path, max_episode_steps: int | None) -> OfflineDataset:
    for key in REQUIRED:
        if key not in arrays:
            have = ", ".join(sorted(arrays)) or "none"
            raise DataError(
                f"{path}: the key {key!r} is missing ({nearest(key, arrays) if arrays else 'the file is empty'}); "
                f"it holds: {have}. Expected {', '.join(REQUIRED)}: rename the keys to D4RL's."
            )
    for key in REQUIRED + OPTIONAL:
        if key in arrays and arrays[key].dtype.kind not in "biuf":
            raise DataError(f"{path}: {key} has type {arrays[key].dtype}; expected numbers.")
        if key in arrays and arrays[key].ndim == 0:
            raise DataError(f"{path}: {key}: shape (), a single value; expected one row a time step.")
    if arrays["actions"].dtype.kind in "iu":
        raise DataError(
            f"{path}: actions are whole numbers ({arrays['actions'].dtype}); expected real-valued (N, A) actions. "
            "Discrete actions are not supported."
        )
    terminals = _flags(arrays["terminals"], "terminals", path)
    metadata = {key.removeprefix("metadata/"): _decode(v) for key, v in arrays.items() if key.startswith("metadata/")}
    if "timeouts" in arrays:
        timeouts = _flags(arrays["timeouts"], "timeouts", path)
    elif max_episode_steps is not None and terminals.ndim == 1:
        timeouts = count_timeouts(terminals, max_episode_steps)
        metadata["timeouts"] = f"not in the file: every {max_episode_steps} steps"
    else:
        timeouts = np.zeros_like(terminals)
        metadata["timeouts"] = "not in the file: none"
    rewards = _column(arrays["rewards"]).astype(np.float32, copy=False)
    return OfflineDataset(
        observations=_rows(arrays["observations"]),
        actions=_rows(arrays["actions"]),
        rewards=rewards,
        terminals=terminals,
        timeouts=timeouts,
        next_observations=_rows(arrays["next_observations"]) if "next_observations" in arrays else None,
        infos={
            key.removeprefix("infos/"): values
            for key, values in arrays.items()
            if key.startswith("infos/") and values.shape[:1] == rewards.shape[:1] and values.dtype.kind in "biuf"
        },
        metadata=metadata,
    )


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
