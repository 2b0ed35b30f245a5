"""What a run's last attempt failed by: the file `error.txt` in its folder; and what disks take nothing. No torch."""

import contextlib
import errno
import tempfile
from pathlib import Path

from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path, cache_directory, data_directory, read_text

ERROR = "error.txt"
"""The file in a run's folder with what its last attempt failed by."""


def keep(path: Path, text: str) -> None:
    """Keep what a run failed by in its folder; nothing where the disk takes nothing any more."""
    with contextlib.suppress(OSError), atomic_path(path / ERROR) as temporary:
        temporary.write_text(f"{text}\n")


def forget(path: Path) -> None:
    """Remove what a run failed by, as it goes on: another attempt is under way."""
    (path / ERROR).unlink(missing_ok=True)


def error_of(path: Path) -> str:
    """The last line of what a run's last attempt failed by; "" where it did not."""
    try:
        lines = read_text(path / ERROR, "a text").strip().splitlines()
    except UserError:
        return ""
    return lines[-1] if lines else ""


_FULL, _FORBIDDEN = (errno.ENOSPC, errno.EDQUOT), (errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of the system's where there is no space, and where nothing may be written."""


def unwritten(error: OSError) -> str:
    """What is said of an error of the system's: its file, why, and what to do; a sentence or two.

    Of the folders that things are kept in, the variable that names another one is said.
    """
    if error.filename is None:
        return str(error)
    why = f"{error.filename} cannot be written: {error.strerror}."
    place = Path(error.filename).absolute()
    for folder, variable in ((cache_directory(), "$DIFFRL_CACHE"), (data_directory(), "$DIFFRL_DATA")):
        if place == folder or folder in place.parents or (place in folder.parents and not place.exists()):
            return f"{why} {variable} names another folder for what is kept in {folder}."
    if error.errno in _FULL:
        return f"{why} Free some space, or choose another place for it."
    if error.errno in _FORBIDDEN:
        return f"{why} Choose another place for it, or make this one writable."
    return f"{error.filename}: {error.strerror}."


def require_cache(file: Path) -> None:
    """Raise UserError where what takes long to make cannot be kept at `file`, below `cache_directory`."""
    if why := no_room(file):
        raise UserError(f"{file} cannot be written: {why}. $DIFFRL_CACHE names another folder for it.")


def no_room(file: Path) -> str:
    """Why a file cannot be made where it is to be; "" where it can. A folder that is not there yet would be made."""
    folder = next((place for place in file.absolute().parents if place.exists()), file.parent)
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b" ")
    except OSError as error:
        return error.strerror or str(error)
    return ""
