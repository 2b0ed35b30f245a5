"""Files and folders at addresses such as s3://bucket/runs/NAME or https://host/file.hdf5, fetched: read, never written.

fsspec asks whoever keeps them; what comes is kept below `cache_directory()`, so that it comes once. A copy is known by
the address and by what its keeper says of each file (size, time, checksum): what has changed there is fetched anew.
Readers see a path of this machine, with their own checks: a run's checksums, a data file's checksum, nothing unpickled.
"""

import contextlib
import hashlib
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from diffrl.support.errors import UserError, closest, first_line
from diffrl.support.files import address_of, alone, atomic_path, cache_directory, path_of
from diffrl.support.unreached import received, unreached, why

_TELLING = (
    *("etag", "mtime", "lastmodified", "last-modified", "last_modified", "modified", "created", "updated"),
    *("checksum", "content-md5", "content_md5", "md5hash", "md5", "crc32c", "digest", "uid", "uuid"),
)
"""What keepers say of a file's state beside its size, in small letters."""
_Found: TypeAlias = Mapping[str, tuple[str, Any]]
"""Files by the names that they get here: where they are there, and what their keeper says of them."""


def local_file(name: str | Path, error: type[UserError] = UserError) -> Path:
    """The path of a file: of one at an address, of its copy here. Raises `error` where it cannot be had.

    Where its keeper cannot be reached, a copy that was fetched before will do, which is said.
    """
    if (address := address_of(name)) is None:
        return path_of(name)

    def ask() -> tuple[Any, _Found]:
        with _asking(address, error):
            system, place = _system(address, error)
            return system, {PurePosixPath(place).name: (place, system.info(place))}

    file = next(iter(_copy_or_kept(address, ask, error, _home(address)).iterdir()))
    with file.open("rb") as opened:
        beginning = opened.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if beginning.startswith((b"<!doctype html", b"<html")):
        raise error(
            f"What came from {address} is a web page, and no file of data: give the address of the file itself."
        )
    return file


def local_folder(name: str | Path, without: Collection[str] = ()) -> Path:
    """The path of a folder: of one at an address, of its copy here.

    without: names of folders in it that are not fetched. Raises UserError where it cannot be had. Where its keeper
    cannot be reached, a copy that was fetched before will do, which is said.
    """
    if (address := address_of(name)) is None:
        return path_of(name)

    def ask() -> tuple[Any, _Found]:
        with _asking(address, UserError):
            system, place = _system(address, UserError)
            base, found = PurePosixPath(place.rstrip("/")).name, {}
            for inner, file, about in _files(system, place, without):
                found[f"{base}/{inner}"] = file, about if _state(about) else system.info(file)
        if not found:
            raise UserError(f"There is no folder at {address}, or it is empty.")
        return system, found

    return next(iter(_copy_or_kept(address, ask, UserError, _home(address, without), _home(address)).iterdir()))


def _files(system: Any, place: str, without: Collection[str]) -> Iterator[tuple[str, str, Any]]:
    """Each file at any depth in the folder `place`: its path within, where it is, and what its keeper says of it.

    without: names of folders that are left out. Raises what the asking raises. A web server is asked folder by folder:
    fsspec's `find` would take one that cannot be asked for an empty one.
    """
    if not place.startswith(("http://", "https://")):
        found = system.find(place.rstrip("/") + "/", detail=True)
        if not found:
            with contextlib.suppress(FileNotFoundError):
                system.ls(place.rstrip("/"))  # which says what is in the way, if anything is
        for file, about in found.items():
            inner = _below(place, file)
            if inner is not None and not set(PurePosixPath(inner).parts[:-1]).intersection(without):
                yield inner, file, about
        return
    folders = [place.rstrip("/") + "/"]
    for asked in folders:
        try:
            listing = system.ls(asked, detail=True)
        except FileNotFoundError:  # an old link; of the first: there is none
            continue
        for about in sorted(listing, key=lambda about: str(about["name"])):
            file, is_folder = about["name"], about["type"] == "directory"
            inner = _below(place, file.rstrip("/"))
            if inner is None:
                continue
            if not is_folder:
                yield inner, file, about
            elif PurePosixPath(inner).name not in without and file not in folders:
                folders.append(file)


def _copy_or_kept(address: str, ask: Callable[[], tuple[Any, _Found]], error: type[UserError], *homes: Path) -> Path:
    """The folder with a copy of what `ask` finds; where it cannot reach who keeps the address, with one of before.

    homes: where that may be, the best first. One command may ask several times: it gets the same copy. Where something
    is found and then does not come whole, what was before will not do: it may have changed.
    """
    from diffrl.support.console import console

    said, at = _unreached.get(homes[0], (None, 0.0))
    if said is None or not said.is_dir() or time.monotonic() - at > _AGAIN:
        try:
            system, found = ask()
        except UserError as problem:
            asked = problem.__cause__
            if isinstance(asked, FileNotFoundError) and asked.__cause__ is not None:  # over HTTP
                asked = asked.__cause__
            kept = next((copy for home in homes for copy in _whole(home)), None)
            if kept is None or asked is None or not unreached(asked):
                raise
            if kept != said:
                when = time.strftime("%Y-%m-%d %H:%M", time.localtime(kept.stat().st_mtime))
                console.print(
                    f"{address} cannot be reached ({why(asked)}): the copy of {when} is used; whether it changed there "
                    "is not known.",
                    style="yellow",
                    markup=False,
                )
            said = kept
        else:
            _unreached.pop(homes[0], None)
            return _copy(address, homes[0], system, found, error)
    _unreached[homes[0]] = said, time.monotonic()
    return said


_unreached: dict[Path, tuple[Path, float]] = {}
"""By the folder with copies of an address that could not be reached, the copy that was used, and when it was last."""
_AGAIN = 10.0
"""Seconds after which an address that could not be reached is asked again: it may take half a minute to say so."""


def _whole(home: Path) -> list[Path]:
    """The copies in an address's folder, the newest first; each is whole, as it gets its name when all has come."""
    if not home.is_dir():
        return []
    found = [path for path in home.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _home(address: str, without: Collection[str] = ()) -> Path:
    """Where copies of an address are kept; those without some folders by themselves."""
    apart = f" without {sorted(without)}" if without else ""
    return cache_directory() / "remote" / _digest(address + apart)


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

        _require_scheme(address, {*fsspec.available_protocols(), *fsspec.registry}, error)
        more: dict[str, Any] = {}
        if address.startswith(("http://", "https://")):
            import aiohttp

            # As long as bytes come, it goes on: aiohttp's own limit is five minutes in all.
            more["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}
        system, place = fsspec.core.url_to_fs(address, **more)
    except ImportError as missing:
        name = getattr(missing, "name", None)
        asked_for = re.match(r"(?:Please )?install ([\w-]+) (?:to|for) access", first_line(missing), re.IGNORECASE)
        name = asked_for[1] if asked_for else name
        said = f"{name} is not installed" if name else first_line(missing).rstrip(".")
        extra = f" `pip install {name}` brings what {address.partition('://')[0]}:// needs." if asked_for else ""
        if name in ("fsspec", "aiohttp"):
            extra = " `pip install 'diffrl[remote]'` brings what http:// and https:// need."
        raise error(f"{address} cannot be opened: {said}.{extra}") from missing
    system.invalidate_cache()
    return system, place


def _require_scheme(address: str, known: Collection[str], error: type[UserError]) -> None:
    """Raise `error` where nothing is known to keep addresses of a scheme, with the one nearest to it."""
    scheme = address.partition("://")[0]
    if scheme in known:
        return
    near = closest(scheme, known, 0.7)
    hint = f"did you mean {near}://?" if near else "known are https://, s3://, gs:// and the others of fsspec's."
    raise error(f"{address}: there is no scheme {scheme}://; {hint}")


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
        raise error(f"{address} cannot be read: {why(cause)}. {_ADVICE}") from problem
    except Exception as problem:
        kinds = {kind.__name__ for kind in type(problem).__mro__}
        if not kinds.isdisjoint({"NoCredentialsError", "PartialCredentialsError"}):  # botocore's
            raise error(f"{address} cannot be read: no credentials for S3 are found here. {_CREDENTIALS}") from problem
        raise error(f"{address} cannot be read: {why(problem)}. {_ADVICE}") from problem


_CREDENTIALS = (
    "Set $AWS_ACCESS_KEY_ID and $AWS_SECRET_ACCESS_KEY, or keep them in ~/.aws/credentials (`aws configure`); for a "
    "bucket that anybody may read, set FSSPEC_S3_ANON=true."
)
_ADVICE = "Check the address and the network."


def _copy(address: str, home: Path, system: Any, found: _Found, error: type[UserError]) -> Path:
    """The folder in `home` with a copy of the files, made unless there is one of the same state."""
    from diffrl.support.console import console

    states = [(name, about.get("size"), _state(about)) for name, (_, about) in sorted(found.items())]
    known = all(told for *_, told in states)  # else a new content of the same size would go unseen
    kept = home / _digest(repr(states))
    waiting: Callable[[], None] = lambda: console.print(f"Waiting for another process, which fetches {address}.")  # noqa: E731
    with alone(kept, waiting):
        if known and kept.is_dir():
            return kept
        console.print(f"Fetching {address}", markup=False)
        with atomic_path(kept) as temporary:
            for name, (place, about) in found.items():
                target = temporary / name
                target.parent.mkdir(parents=True, exist_ok=True)
                size = about.get("size")
                try:
                    with _asking(address, error):
                        system.get_file(place, str(target))
                except error as problem:
                    broke = problem.__cause__
                    if broke is None or not (target.is_file() or received(broke)):
                        raise
                    if not (unreached(broke) or "ClientPayloadError" in type(broke).__name__):
                        raise
                    raise _cut(address, name, received(broke) or target.stat().st_size, size, error) from broke
                if size is not None and size != target.stat().st_size:
                    raise _cut(address, name, target.stat().st_size, size, error)
            shutil.rmtree(kept, ignore_errors=True)  # only now that all has come
        for old in home.iterdir():  # states that nobody asks for any more
            if old.is_dir() and old != kept and not old.name.startswith("."):
                shutil.rmtree(old, ignore_errors=True)
    return kept


def _cut(address: str, name: str, came: int, size: int | None, error: type[UserError]) -> UserError:
    """What is said of a download of which not all has come, or more than its keeper said."""
    of = "" if PurePosixPath(address).name == name else f" of {name}"
    if size is not None and came > size:
        return error(f"{address} cannot be read: {came:,} bytes came{of}, and it was said to have {size:,}.")
    far = f"{came:,} bytes" if size is None else f"{came:,} of {size:,} bytes"
    return error(f"{address} cannot be read: the download{of} was cut off at {far}; the same command fetches it again.")


def _state(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What tells that a file has changed, of what its keeper says of it."""
    return sorted((key.lower(), str(value)) for key, value in about.items() if key.lower() in _TELLING)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]
