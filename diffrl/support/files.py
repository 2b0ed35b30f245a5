"""Files: reading that a damaged one cannot harm, writing that survives a kill, checksums, where data are kept."""

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs

from diffrl.support.errors import UserError, first_line, said_by

_KINDS = {
    stat.S_IFDIR: "is a folder",
    stat.S_IFIFO: "is a named pipe",
    stat.S_IFSOCK: "is a socket",
    stat.S_IFCHR: "is a device",
    stat.S_IFBLK: "is a device",
}


def regular_file(
    path: str | os.PathLike[str], expected: str, advice: str = "Check the path.", error: type[UserError] = UserError
) -> Path:
    """The path, which is that of a file, opening nothing: a named pipe would hang who opens it, a device never ends.

    expected: what kind of file, for the error. Raises `error`, with `advice`, where it is no file or cannot be seen.
    """
    path = Path(path)
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
        what = "" if kind == stat.S_IFREG else _KINDS.get(kind, "is no file")
    except (FileNotFoundError, NotADirectoryError):
        what = "does not exist"
    except (OSError, ValueError) as problem:  # ValueError: a null byte in the name
        what = f"cannot be opened ({getattr(problem, 'strerror', None) or problem})"
    if what:
        raise error(f"{path} {what}; expected {expected}. {advice}".rstrip())
    return path


@contextmanager
def reading(what: str, advice: str = "", error: type[UserError] = UserError) -> Iterator[None]:
    """The door for a kind of file: in the block, whatever its parser raises becomes `error`, in one line.

    What a parser raises on damaged input cannot be listed: from h5py, NumPy, zipfile, json and yaml came KeyError,
    TypeError, RecursionError, EOFError, NotImplementedError and others. So the block holds calls of the parser and
    no other code, and every Exception that is no UserError counts as damage.

    what: the beginning of the sentence, such as "FILE cannot be read". advice: its end.
    """
    try:
        yield
    except UserError:
        raise
    except MemoryError as problem:
        raise error(
            f"{what}: it does not fit into memory, or is damaged and says so of itself. {advice}".rstrip()
        ) from problem
    except Exception as problem:
        own = isinstance(problem, OSError | RuntimeError | ValueError) and first_line(problem)
        raise error(f"{what}: {(own or said_by(problem)).rstrip('.')}. {advice}".rstrip()) from problem


def read_text(
    path: str | os.PathLike[str], expected: str, limit: int = 2**26, error: type[UserError] = UserError
) -> str:
    """The text of a file in UTF-8. Raises `error` where it is no file, larger than `limit` bytes, or no text.

    expected: what kind of file, for the error, such as "a JSON file".
    """
    path = regular_file(path, expected, error=error)
    with reading(f"{path} cannot be read", error=error):
        with path.open("rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise error(f"{path} has more than {limit:,} bytes; expected {expected}. Check the path.")
        return content.decode()


def read_json(
    path: str | os.PathLike[str],
    what: str = "",
    advice: str = "",
    limit: int = 2**26,
    error: type[UserError] = UserError,
) -> Any:
    """What a JSON file holds. Raises `error` where it cannot be read, is larger than `limit` bytes, or is no JSON.

    what: the beginning of the sentence where it is no JSON; by default it names the path. advice: the sentence's end.
    """
    text = read_text(path, "a JSON file", limit, error)
    return parse_json(text, what or f"{path} is damaged, or no JSON", advice, error)


def parse_json(text: str | bytes, what: str, advice: str = "", error: type[UserError] = UserError) -> Any:
    """The value of a text in JSON. Raises `error`, beginning with `what`, for any other, however deep it nests."""
    with reading(what, advice, error):
        return json.loads(text)


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
