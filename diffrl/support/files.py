"""Files: writing that survives a kill at any moment, checksums, and where data and caches are kept."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path (a file or a folder to be) beside `path`; rename it to `path` when the block succeeds.

    Whatever stood at `path` stays untouched until then, and a failed block leaves nothing behind: what is written is on
    the disk (fsync) before it is renamed.
    A folder cannot replace a non-empty folder: remove the old one first.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    inner = temporary / path.name
    try:
        yield inner
        for file in [inner] if inner.is_file() else sorted(p for p in inner.rglob("*") if p.is_file()):
            _fsync(file)
        inner.replace(path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 digest of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_directory() -> Path:
    """Where data sets are kept: `$DIFFRL_DATA`, else the user's data folder of the platform."""
    chosen = os.environ.get("DIFFRL_DATA")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_data_dir("diffrl"))


def cache_directory() -> Path:
    """Where things that can be made again are kept: `$DIFFRL_CACHE`, else the user's cache folder of the platform."""
    chosen = os.environ.get("DIFFRL_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("diffrl"))
