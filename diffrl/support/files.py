"""Files: which path or address a name means, reading that a damaged one cannot harm, writing that survives a kill.

And checksums, and where data are kept. What is at an address is fetched by `diffrl.support.remote`.
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shlex
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import platformdirs

from diffrl.support.errors import UserError, first_line, said_by
from diffrl.support.machine import free_memory

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+([^/].*)", re.DOTALL)
_HERE = ("file", "local")
"""Schemes of paths on this machine."""


def address_of(name: str | Path) -> str | None:
    """The address that a name is, SCHEME://REST; None for a path of this machine, file:///PATH too.

    A path of pathlib's has lost a slash of it, which makes no difference. What exists here is a path.
    """
    found = _ADDRESS.fullmatch(str(name))
    if found is None or found[1].lower() in _HERE:
        return None
    with suppress(OSError):  # a name that is too long for a path
        if Path(name).exists():
            return None
    return f"{found[1].lower()}://{found[2]}"


def path_of(name: str | Path) -> Path:
    """The path that a name means which is no address: of file:///PATH, PATH."""
    found = _ADDRESS.fullmatch(str(name))
    return Path("/", found[2].removeprefix("localhost/")) if found and found[1].lower() in _HERE else Path(name)


def to_write(name: str | Path, what: str = "files") -> Path:
    """The path of this machine that something is to be written to. Raises UserError for an address, file:// too."""
    if (path := path_of(name)) != Path(name):
        raise UserError(f"{str(name).partition(':')[0]}://{path}: {what} are written to a path: give {path}.")
    if (address := address_of(name)) is None:
        return path
    raise UserError(
        f"{address}: {what} are written to a path, on a cluster one that all nodes share, such as /shared/runs/NAME. "
        "Object stores have no locks and do not rename: copy the folder there at the end."
    )


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: with the length of the header of JSON that follows."""
    with plain_file(path).open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8


def same_place(one: Path | None, other: Path) -> bool:
    """Whether two paths are one file or folder, by another spelling or a link too; None is none."""
    if one is None:
        return False
    with suppress(OSError):  # one that is not there
        return one.samefile(other)
    return one.resolve() == other.resolve()


def spare_source(source: Path | None, target: Path, named: str, advice: str) -> None:
    """Raise UserError where `target` is an address, or where writing it would destroy `source`: in it, or around it.

    source: a file or a folder; None is none. named: what the user calls the target. advice: the sentence's end.
    """
    to_write(target)
    if source is None:
        return
    if same_place(source, target):
        where = f"{named} is the data set itself"
    elif _inside(target, source):
        where = f"{named} lies in the folder of the data set itself"
    elif _inside(source, target):
        where = f"{named} is a folder that holds the data set itself"
    else:
        return
    raise UserError(f"{where}, which would be lost: {advice}")


def _inside(path: Path, folder: Path) -> bool:
    """Whether a path lies in a folder, at any depth; of a link, whether it or what it leads to does."""
    places = (path.resolve(), path.parent.resolve() / path.name)
    return any(same_place(parent, folder) for place in places for parent in place.parents)


def unused(folder: Path) -> None:
    """Raise UserError where something is in the place of a folder that is to be made by --to; it may be empty."""
    to_write(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already, and is not overwritten: move it away, or choose another --to.")


def beside(folder: str | Path, name: str) -> Path:
    """Where a file that belongs into a folder is written: into it, or for one at an address into this one."""
    if (address := address_of(folder)) is None:
        return path_of(folder) / name
    return Path(f"{PurePosixPath(address).name}-{name}")


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


class NotAFile(OSError):
    """A name that a file was looked for under is that of a pipe, a device or a folder."""


def plain_file(path: str | os.PathLike[str]) -> Path:
    """The path, which is that of a file: see `regular_file`. Raises NotAFile, for callers to whom no file can be read.

    Whatever opens a file by a name that somebody else's folder holds asks here first.
    """
    path = Path(path)
    kind = stat.S_IFMT(path.stat().st_mode)
    if kind != stat.S_IFREG:
        raise NotAFile(errno.EINVAL, f"it {_KINDS.get(kind, 'is no file')}, and is to be a file", str(path))
    return path


SMALL = 2**26
"""Bytes of a file at most that holds no arrays: checksums, JSON, YAML, a table of scores."""


def read_bytes(path: str | os.PathLike[str], limit: int | None = SMALL) -> bytes:
    """The content of a file. Raises OSError where it is none, has more than `limit` bytes, or more than memory is free.

    limit: None where it holds arrays, of any size.
    """
    with plain_file(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if limit is None:
            limit = size
            if size > SMALL and size > (free := free_memory()):
                raise OSError(errno.ENOMEM, f"it has {size:,} bytes, and {free:,} of memory are free", str(path))
        data = file.read(min(size, limit) + 1)
        if len(data) > limit:
            raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes, which no such file has", str(path))
        return data


def beginning(path: Path) -> str:
    """The first characters of a file, by which a page of ours is known."""
    with plain_file(path).open("rb") as file:
        return file.read(2000).decode(errors="replace")


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
    path: str | os.PathLike[str], expected: str, limit: int = SMALL, error: type[UserError] = UserError
) -> str:
    """The text of a file in UTF-8, without the byte order mark that Notepad may have begun it with.

    Raises `error` where it is no file, larger than `limit` bytes, or no text.

    expected: what kind of file, for the error, such as "a JSON file".
    """
    path = regular_file(path, expected, error=error)
    with reading(f"{path} cannot be read", error=error):
        if path.stat().st_size > limit:
            raise error(f"{path} has more than {limit:,} bytes; expected {expected}. Check the path.")
        return read_bytes(path, limit).decode("utf-8-sig")


def read_json(
    path: str | os.PathLike[str],
    what: str = "",
    advice: str = "",
    limit: int = SMALL,
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


_YAML = 2**18
"""Bytes of a configuration at most: it takes seconds to read as many."""
_NESTED = 50
"""How deep lists and mappings of a configuration may lie in one another."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Aliases (`*name`), anchors (`&name`) and merges (`<<`) are refused: ten lines of them stand for a billion values.
    Raises UserError where it cannot be read, is larger or nests deeper than any configuration, or is none.
    """
    import yaml  # most verbs' --help needs no file's

    def refused(at: Any, what: str) -> UserError:
        return UserError(f"{path} is not valid YAML: line {at.start_mark.line + 1} has {what}.")

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            if getattr(event, "anchor", None) is not None:  # of an alias too
                raise refused(event, "an anchor or an alias: write the value out")
            self.depth += 1
            if self.depth > _NESTED:
                raise refused(event, f"more than {_NESTED} levels in one another")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def flatten_mapping(self, node: Any) -> None:
            if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
                raise refused(node, "a merge, <<: write the values out")

    hint = f"For a data set: --agent NAME --dataset {path}." if path.suffix not in (".yaml", ".yml") else ""
    try:
        text = read_text(path, "a configuration in YAML", _YAML)
    except UserError as error:
        raise UserError(f"The configuration {error} {hint}".rstrip()) from error
    with reading(f"{path} is not valid YAML", hint):
        try:
            values = yaml.load(text, Loader)
        except yaml.MarkedYAMLError as error:
            place = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
            raise UserError(f"{path} is not valid YAML: {error.problem}{place}. {hint}".rstrip()) from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a configuration: expected keys such as `dataset` and `agent`.")
    return values


def to_yaml(values: Mapping[str, Any]) -> str:
    """The values as YAML that `read_yaml` takes: what stands twice is written twice, without an alias."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return str(yaml.dump(dict(values), Dumper=Dumper, sort_keys=False))


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path (a file or a folder to be) beside `path`; rename it to `path` when the block succeeds.

    Whatever stood at `path` stays untouched until then, and a failed block leaves nothing behind: what is written is on
    the disk (fsync) before it is renamed. What a killed process left behind in the same place is removed.
    A folder cannot replace a non-empty folder: remove the old one first. Raises UserError for an address.
    """
    path = to_write(Path(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_abandoned(path.parent, path.name)
    with _named(path):
        temporary, lock = _temporary(path)
    inner = temporary / path.name
    try:
        with _named(path, temporary):
            yield inner
        for file in [inner] if inner.is_file() else sorted(p for p in inner.rglob("*") if p.is_file()):
            _fsync(file)
        inner.replace(path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextmanager
def or_removed(folder: Path) -> Iterator[None]:
    """In the block a folder is made and filled: where that fails, one that was not there before goes again."""
    there = folder.exists()
    try:
        yield
    except BaseException:
        if not there:
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def _named(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Let errors of the system's in the block name the file that is written, and not a temporary one or none."""
    try:
        yield
    except OSError as error:
        of = None if error.filename is None else Path(os.fsdecode(error.filename))
        unnamed = of is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
        if temporary is None or unnamed or (of is not None and temporary in (of, *of.parents)):
            error.filename = str(path)
        raise


def by_umask(folder: Path) -> None:
    """Give all files in a folder that was written just now the mode that a new file has here, by the umask.

    Where the file system knows no modes they stay as they are.
    """
    with contextlib.suppress(OSError):
        with tempfile.TemporaryDirectory(dir=folder) as probe:
            file = Path(probe) / "file"
            file.touch()
            mode = file.stat().st_mode
        for file in folder.rglob("*"):
            if file.is_file():
                file.chmod(mode)


_MARK = ".tmp"
"""What the names of temporary folders end with."""


def _temporary(path: Path) -> tuple[Path, int | None]:
    """A new folder beside `path`, and what holds its lock: while its owner lives it is not `clear_abandoned`."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_MARK, dir=path.parent))
        try:
            lock = _lock(folder)
        except OSError:  # a file system, or a machine, that locks no folders: there nothing is cleared
            return folder, None
        if lock is not None:
            return folder, lock
        shutil.rmtree(folder, ignore_errors=True)  # somebody has just taken it for an abandoned one


def clear_abandoned(folder: Path, name: str | None = None) -> None:
    """Remove the temporary folders in `folder` (of files of this name) that killed processes have left there."""
    for temporary in folder.glob(f".{'*' if name is None else glob.escape(name)}.*{_MARK}"):
        with suppress(OSError):  # its owner has just removed it; or see `_temporary`
            if (lock := _lock(temporary)) is not None:
                shutil.rmtree(temporary, ignore_errors=True)
                os.close(lock)


def lock_file(path: Path) -> int | None:
    """Make a file and lock it, until the descriptor that comes back is closed; None where somebody has locked it.

    The lock ends with the process. Whoever holds it may remove the file. Raises OSError where none can be made. On a
    file system without locks nobody is kept out.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:  # its owner has removed it in between
            pass
        except OSError:
            return descriptor
        os.close(descriptor)


@contextmanager
def alone(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """In the block this process alone makes the file `path`: while another one is at it, wait. waiting: hears of it."""
    lock = to_write(path).with_name(f".{path.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    if (descriptor := lock_file(lock)) is None:
        waiting()
        while (descriptor := lock_file(lock)) is None:
            time.sleep(0.2)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """Open and lock a folder; None where another process, or another opening of this one, has locked it."""
    if fcntl is None:
        raise OSError("no locks")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 digest of a file, in hexadecimal."""
    with plain_file(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_directory() -> Path:
    """Where data sets are kept: `$DIFFRL_DATA`, else the user's data folder of the platform.

    Raises UserError where `$DIFFRL_DATA` is a file.
    """
    chosen = os.environ.get("DIFFRL_DATA")
    if chosen and Path(chosen).expanduser().is_file():
        raise UserError(f"$DIFFRL_DATA is {chosen}, which is a file; expected a folder, in which data sets are kept.")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_data_dir("diffrl"))


def cache_directory() -> Path:
    """Where things that can be made again are kept: `$DIFFRL_CACHE`, else the user's cache folder of the platform."""
    chosen = os.environ.get("DIFFRL_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("diffrl"))


def typed(path: Path | str) -> str:
    """A path as one types it in a shell: quoted where it must be, from ./ on where it begins with a dash."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)
