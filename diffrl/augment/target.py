"""Where an enlarged data set goes."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffrl.augment.config import MINARI, Request, finished
from diffrl.data import d4rl, minari
from diffrl.data.config import HDF5_SUFFIXES
from diffrl.data.offline import OfflineDataset
from diffrl.support.errors import UserError
from diffrl.support.files import lock_file, spare_source, typed
from envs.datasets import locate


@contextmanager
def claimed(path: Path, named: str, busy: str) -> Iterator[None]:
    """In the block no other process of ours writes to `path`, whose folder is there and is known to take files.

    named: what the user calls it. busy: what is said where another process is at it. Raises UserError then, and where
    the folder cannot be written to.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = lock_file(lock)
    except OSError as error:
        raise UserError(f"Cannot write {named}: {error.strerror or error}. Choose another --out.") from error
    if descriptor is None:
        raise UserError(f"Another process is {busy}, or choose another --out.")
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


class Target:
    """Where a data set is written: an HDF5 file, or Minari's store.

    request: its `out` is a path ending in .hdf5 or .h5, or minari:ID; with `force` what is there is replaced. verb:
    whose model it is, which names the model's folder.
    Raises UserError for another `out`, and where something is there, unless it is to be replaced.
    """

    def __init__(self, request: Request, verb: str) -> None:
        self.out, self.force = str(request.out), request.force
        self.folder = request.model_folder(verb)
        path = Path(self.out).expanduser()
        self.to_file = path.suffix in HDF5_SUFFIXES
        if self.to_file:
            self.path = path
        elif self.out.startswith(MINARI):
            self.id = self.out.removeprefix(MINARI)
            if not minari.is_id(self.id):
                raise UserError(f"{self.out!r} is no Minari id; expected e.g. minari:hopper/synthetic-v0.")
            self.path = minari.store() / self.id
        else:
            raise UserError(f"Cannot write {self.out!r}: expected a path ending in .hdf5 or .h5, or minari:ID.")
        self.exists = self.path.exists()
        if self.to_file and self.path.is_dir():
            raise UserError(f"{self.out} is a folder; expected the path of a file: choose another --out.")
        if self.exists and not self.force:
            raise finished(self.out)
        self._before = _state(self.path)

    def spare(self, source: str) -> None:
        """Raise UserError where writing would destroy the data set `source`."""
        spare_source(locate(source).path, self.path, f"--out {self.out}", "choose another --out.")

    def claimed(self) -> AbstractContextManager[None]:
        """A block in which no other process of ours makes this data set: see `claimed`."""
        at = self.path if self.to_file else minari.store() / self.id.replace("/", "-")
        return claimed(at, self.out, f"making {self.out}: wait until it has ended")

    def write(
        self, blocks: Iterator[dict[str, NDArray[Any]]], metadata: dict[str, Any], source: OfflineDataset
    ) -> Path:
        """Write blocks of columns that were made from `source`; give the path of the data set.

        A file is written block by block. Minari's writer takes whole data sets: there all rows are in memory. Raises
        UserError where something is there by now that was not there at first, unless it is to be replaced.
        """
        self._unchanged()
        if self.to_file:
            return d4rl.write_blocks(self.path, self._until_written(blocks), metadata)
        parts = list(self._until_written(blocks))
        arrays: dict[str, Any] = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        benchmark = locate(str(source.metadata["dataset"])).benchmark
        return minari.write(
            self.id,
            OfflineDataset(**arrays, metadata=metadata),
            reference_scores=None if benchmark is None else benchmark.reference_scores,
            force=self.force,
        )

    def _until_written(self, blocks: Iterator[dict[str, NDArray[Any]]]) -> Iterator[dict[str, NDArray[Any]]]:
        """The blocks; once all are taken, what is there is looked at once more, before it would be replaced."""
        yield from blocks
        self._unchanged()

    def _unchanged(self) -> None:
        """Raise UserError where somebody else has written the data set since this was made."""
        if self.force or _state(self.path) == self._before:
            return
        raise UserError(
            f"{self.out} was written by something else in the meantime, and is not overwritten. The rows are kept in "
            f"{self.folder}: the same command with --force replaces it; with another --out and --folder "
            f"{typed(self.folder)} it writes them there."
        )

    def name(self, written: Path) -> str:
        """What commands call the data set that was written to a path."""
        return str(written) if self.to_file else self.id


def _state(path: Path) -> tuple[int, ...] | None:
    """What tells a file or folder from another one in its place; None where nothing is."""
    try:
        about = path.lstat()
    except OSError:
        return None
    return about.st_ino, about.st_size, about.st_mtime_ns
