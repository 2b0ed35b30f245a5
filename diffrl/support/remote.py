"""Files and folders at addresses such as s3://bucket/runs/NAME or https://host/file.hdf5, fetched: read, never written.

fsspec asks whoever keeps them; what comes is kept below `cache_directory()`, so that it comes once. A copy is known by
the address and by what its keeper says of each file (size, time, checksum): what has changed there is fetched anew.
Readers see a path of this machine, with their own checks: a run's checksums, a data file's checksum, nothing unpickled.
"""

import contextlib
import hashlib
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from diffrl.support.errors import UserError, first_line, said_by
from diffrl.support.files import address_of, alone, atomic_path, cache_directory, path_of

_TELLING = (
    *("etag", "mtime", "lastmodified", "last-modified", "last_modified", "modified", "created", "updated"),
    *("checksum", "content-md5", "content_md5", "md5hash", "md5", "crc32c", "digest", "uid", "uuid"),
)
"""What keepers say of a file's state beside its size, in small letters."""


def local_file(name: str | Path, error: type[UserError] = UserError) -> Path:
    """The path of a file: of one at an address, of its copy here. Raises `error` where it cannot be had."""
    if (address := address_of(name)) is None:
        return path_of(name)
    with _asking(address, error):
        system, place = _system(address, error)
        found = {PurePosixPath(place).name: (place, system.info(place))}
    return next(iter(_copy(address, system, found, error).iterdir()))


def local_folder(name: str | Path, without: Collection[str] = ()) -> Path:
    """The path of a folder: of one at an address, of its copy here.

    without: names of folders in it that are not fetched. Raises UserError where it cannot be had.
    """
    if (address := address_of(name)) is None:
        return path_of(name)
    with _asking(address, UserError):
        system, place = _system(address, UserError)
        found = {}
        for file, about in system.find(place.rstrip("/") + "/", detail=True).items():
            inner = _below(place, file)
            if inner is None or set(PurePosixPath(inner).parts[:-1]).intersection(without):
                continue
            found[inner] = file, about if _state(about) else system.info(file)
    if not found:
        raise UserError(f"There is no folder at {address}, or it is empty.")
    base = PurePosixPath(place.rstrip("/")).name
    return _copy(address, system, {f"{base}/{inner}": about for inner, about in found.items()}, UserError) / base


def _below(place: str, file: str) -> str | None:
    """The path of a file within the folder `place`; None for what lies elsewhere, as links of a web page may."""
    place, scheme = place.rstrip("/") + "/", re.compile(r"^[a-z][a-z0-9+.-]*:/+")
    root, whole = scheme.sub("", place).lstrip("/"), scheme.sub("", file).lstrip("/")
    inner = whole.removeprefix(root)
    odd = not whole.startswith(root) or not inner or {"", ".", ".."}.intersection(inner.split("/"))
    return None if odd or re.search(r"[?#\\:\0]", inner) else inner


def _system(address: str, error: type[UserError]) -> tuple[Any, str]:
    """What keeps the address, of fsspec's, and the place there. Raises `error` where its library is missing."""
    if "::" in address:
        raise error(f"{address}: expected one address, not a chain of them.")
    try:
        import fsspec

        more: dict[str, Any] = {}
        if address.startswith(("http://", "https://")):
            import aiohttp

            # As long as bytes come, it goes on: aiohttp's own limit is five minutes in all.
            more["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}
        system, place = fsspec.core.url_to_fs(address, **more)
    except ImportError as missing:
        name = getattr(missing, "name", None)
        said = f"{name} is not installed" if name else first_line(missing).rstrip(".")
        extra = " pip install 'diffrl[remote]' brings what http:// and https:// need."
        raise error(f"{address} cannot be opened: {said}.{extra if name in ('fsspec', 'aiohttp') else ''}") from missing
    system.invalidate_cache()
    return system, place


@contextlib.contextmanager
def _asking(address: str, error: type[UserError]) -> Iterator[None]:
    """A block that asks another machine, by libraries that raise what they like: all becomes `error`, in one line."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as problem:
        cause = problem.__cause__  # over HTTP whatever goes wrong is told so
        if cause is None or getattr(cause, "status", None) == 404:
            raise error(f"There is nothing at {address}.") from problem
        raise error(f"{address} cannot be read: {said_by(cause).rstrip('.')}. {_ADVICE}") from problem
    except Exception as problem:
        raise error(f"{address} cannot be read: {said_by(problem).rstrip('.')}. {_ADVICE}") from problem


_ADVICE = "Check the address and the network."


def _copy(address: str, system: Any, found: Mapping[str, tuple[str, Any]], error: type[UserError]) -> Path:
    """The folder with a copy of the files, made unless there is one of the same state. found: by name, place, state."""
    from diffrl.support.console import console

    states = [(name, about.get("size"), _state(about)) for name, (_, about) in sorted(found.items())]
    known = all(told for *_, told in states)  # else a new content of the same size would go unseen
    home = cache_directory() / "remote" / _digest(address)
    kept = home / _digest(repr(states))
    waiting: Callable[[], None] = lambda: console.print(f"Waiting for another process, which fetches {address}.")  # noqa: E731
    with alone(kept, waiting):
        if kept.is_dir():
            if known:
                return kept
            shutil.rmtree(kept)
        console.print(f"Fetching {address}", markup=False)
        with atomic_path(kept) as temporary:
            for name, (place, about) in found.items():
                target = temporary / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with _asking(address, error):
                    system.get_file(place, str(target))
                size, there = about.get("size"), target.stat().st_size
                if size is not None and size != there:
                    raise error(
                        f"{address} cannot be read: of {name} came {there:,} bytes, and it has {size:,}. The "
                        "connection may have broken: give the same command again."
                    )
        for old in home.iterdir():  # states that nobody asks for any more
            if old.is_dir() and old != kept and not old.name.startswith("."):
                shutil.rmtree(old, ignore_errors=True)
    return kept


def _state(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What tells that a file has changed, of what its keeper says of it."""
    return sorted((key.lower(), str(value)) for key, value in about.items() if key.lower() in _TELLING)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]
