"""What a run's last attempt failed by: the file `error.txt` in its folder. No torch."""

import contextlib
from pathlib import Path

from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path, read_text

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
