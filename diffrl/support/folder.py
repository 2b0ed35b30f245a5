"""Folders of runs and of models: one process at a time works in one, checksums tell damage, what is cut is cleared.

`SHA256SUMS` in a folder has the digests of its files, as `sha256sum` writes and checks them. It is written last, and is
compared with at every read: `verified` is the one door. Folders of older versions have none, which is said once.
"""

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffrl.support.console import console
from diffrl.support.errors import UserError, counted, disk_full, first_line, singular
from diffrl.support.files import (
    SMALL,
    atomic_path,
    clear_abandoned,
    lock_file,
    read_bytes,
    sha256,
    to_write,
    to_yaml,
    typed,
)

if TYPE_CHECKING:
    from torch import Tensor

SUMS, LOCK = "SHA256SUMS", ".lock"
ABOUT = "run.json"
"""The first file that a run writes: what stands beside it is the run's."""
SWEEP = "sweep.json"
"""The file that lists the runs of a sweep, in its folder, where each run has a folder of its own."""
IMAGES, IMAGES_DISTIL = "images", "images-distil"
"""What `kind` in it says of a run that fine-tunes an image model, and of one that distils one."""
AGAIN = "Give the command that began it again; its folder may be used anew."
"""What to do about a run that was cut before its first checkpoint."""
EDITED = ("config.yaml", "settings.yaml", "finetune.yaml")
"""Files that people edit on purpose."""
_WITHOUT = "Restore it from a copy; or, if you know the other files to be sound, delete it."
_said: set[str] = set()
_turn = threading.RLock()
"""Held while a folder's checksums are read to be written anew: the pages of votes write from a thread of theirs."""


class Damaged(UserError):
    """A file that is not as it was written, or cannot be read. The text is file, why, remedy: a sentence each."""

    def __init__(self, file: Path, why: str, remedy: str = "Restore it from a copy.") -> None:
        super().__init__(f"{file} {why}. {remedy}".rstrip())
        self.file, self.why = file, why


def say_once(text: str) -> None:
    """Print a warning, unless this process has printed it before."""
    if text not in _said:
        _said.add(text)
        console.print(f"[yellow]{text}[/]")


# --- one process at a time -----------------------------------------------------------------------------------------


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, ascending; damaged ones included."""
    names = (path.name for path in (folder / "checkpoints").glob("[0-9]*"))
    return sorted(int(name) for name in names if len(name) == 9 and name.isascii() and name.isdigit())


def ends_sooner(folder: Path, made_for: int, now: int, what: str = "steps") -> str:
    """What is said of a run that is to end after fewer steps, or whatever it counts, than it was made for."""
    return f"{folder} was made for {counted(made_for, what)}, and is to end at {now:,} now."


def too_far(folder: Path, done: int, asked: int, what: str = "steps", unit: str = "") -> str:
    """What is said of a run that has made more steps, or whatever it counts, than it is asked for.

    unit: what --steps counts, where it is to be told.
    """
    has = f"{folder} has {counted(done, what)} already"
    counts = f", which counts {unit}," if unit and unit != what else ""
    return f"{has}, more than the {counted(asked, what)} asked for: give a larger --steps{counts} to go on."


def refuse_fewer(folder: Path, asked: int | None, what: str = "steps", unit: str = "") -> None:
    """Raise UserError where a run's newest whole checkpoint is of more steps than it is asked for. Needs no torch.

    Only checkpoints of more steps are read, to see whether they are whole.
    """
    for step in reversed(steps(folder)):
        if asked is None or asked < 1 or step <= asked:
            return
        try:
            found = (folder / "checkpoints" / f"{step:09d}").iterdir()
            files = [file for file in found if file.name not in (SUMS, LOCK)]
            whole = all(verified(file, say=False) for file in files)
        except (OSError, Damaged):
            whole = False
        if whole and files:
            raise UserError(too_far(folder, step, asked, what, unit))


def all_done(folder: Path, done: int, what: str = "steps", lost: Sequence[str] = (), unit: str = "") -> str:
    """What is said of a run that has nothing left to do.

    lost: what of it is gone or damaged, and is made again. unit: what --steps counts, where it is to be told.
    """
    more = f"N {unit}" if unit else "N"
    made = f"its one {singular(what)} is done" if done == 1 else f"all {done:,} {what} are done"
    if lost:
        return f"{folder}: {made}. Gone, damaged or out of date, and made again: {', '.join(lost)}."
    return f"{folder}: {made}. `diffrl resume {typed(folder)} --steps N` goes on to {more} in all."


def without_checkpoint(folder: Path) -> str:
    """What is said of a run that has no checkpoint: it was cut before its first, or has lost them; two sentences."""
    if not has_lost_checkpoints(folder):
        return f"{folder} holds no checkpoint: it was cut before its first. {AGAIN}"
    shown = f" `diffrl report {typed(folder)}` shows its scores." if (folder / "scores.json").is_file() else ""
    return (
        f"{folder} has lost its checkpoints: restore them from a copy; or begin again in another folder, or with this "
        f"one removed.{shown}"
    )


def has_lost_checkpoints(folder: Path) -> bool:
    """Whether a run's folder without a checkpoint has what a run writes after its first one."""
    return not steps(folder) and any((folder / name).exists() for name in _OF_PROGRESS)


def mends_scores(folder: Path) -> str:
    """What to do about a run's scores.json that is lost or damaged: a sentence."""
    return f"`diffrl resume {typed(folder)}` makes the evaluations of the checkpoints that are there again."


def what_works(folder: Path) -> str:
    """What to do about a run that could not be written on: a sentence."""
    if kept := steps(folder):
        return (
            f"The last checkpoint, of step {kept[-1]}, is untouched: `diffrl resume {typed(folder)}` goes on from it."
        )
    return "There is no checkpoint yet: then give the same command again, whose folder may be used anew."


@contextlib.contextmanager
def held(folder: Path, then: str = "", made: bool = False) -> Iterator[None]:
    """In the block this process alone works in the folder, which is made if need be; and removed if it stays empty.

    What a killed process left half-written in it is cleared. The lock is the system's, so that it ends with a process,
    however that ends. then: what to do once there is space again, where the disk fills up in the block; by default
    `what_works`. made: the folder has just been made for this.

    Raises UserError where another process is in the folder, where it is none, and where the disk is full; and for an
    address of another machine.
    """
    to_write(folder, "runs")
    made = made or not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_file(folder / LOCK)
    except (FileExistsError, NotADirectoryError) as error:
        file = next(part for part in (folder, *folder.parents) if part.exists())
        raise UserError(f"{file} is a file, and {folder} is to be a folder: choose another path.") from error
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be written to: {error.strerror or error}.") from error
    if lock is None:
        raise UserError(f"Another process is working in {folder}: wait until it has ended, or choose another folder.")
    try:
        for part in (folder, folder / "checkpoints"):
            clear_abandoned(part)
        yield
    except Exception as error:
        if not (reason := disk_full(error)):
            raise
        raise UserError(
            f"{folder} cannot be written to: {reason}. Free some space. {then or what_works(folder)}"
        ) from error
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(lock)
        if made:
            with contextlib.suppress(OSError):  # there is something in it
                folder.rmdir()


@contextlib.contextmanager
def claimed(out: Path | None, stem: str, files: Collection[str]) -> Iterator[Path]:
    """Yield the folder of a new run, `out` or a new one runs/STEM-TIME, in which it is alone: see `held`.

    files: what the run will write at its beginning, besides `ABOUT`, which it writes first. A run that was cut before
    its first checkpoint is cleared away; so is one of images that has measured nothing and made no round, as where its
    reward fails at once. Raises UserError where there is a run that can go on, or a file of the user's.
    """
    folder = _new(stem) if out is None else to_write(out, "runs")
    with held(folder, made=out is None):
        refuse(folder, files)
        if (folder / ABOUT).exists():
            _clear(folder)
        for name in (SUMS, *files, ABOUT):  # in this order, so that a cut leaves it ours
            (folder / name).unlink(missing_ok=True)
        yield folder


def refuse(folder: Path | None, files: Collection[str]) -> None:
    """Raise UserError where `claimed` would refuse a folder for what is in it; None: a new one will be made."""
    if folder is None:
        return
    ours = (folder / ABOUT).exists()
    if (folder / SWEEP).exists():
        raise UserError(
            f"{folder} is a sweep's folder, in which every run has a folder of its own: choose another --out. "
            f"`diffrl sweep ... --out {typed(folder)}` adds runs to it."
        )
    goes_on = steps(folder) and not _as_it_began(folder)
    if goes_on or (ours and any((folder / name).exists() for name in _OF_PROGRESS)):
        if has_lost_checkpoints(folder):
            raise UserError(
                f"{folder} holds a run that has lost its checkpoints: restore them from a copy; or choose another "
                "--out, or remove the folder."
            )
        raise UserError(f"{folder} holds a run already: `diffrl resume {typed(folder)}`, or choose another --out.")
    for name in files:
        if (folder / name).exists() and not ours:
            raise UserError(
                f"{folder / name} is there already, and belongs to no run: it is not overwritten. Move it away, or "
                "choose another --out."
            )
    if not ours and folder.is_dir():
        others = sorted(path.name for path in folder.iterdir() if not _may_be_there(path))
        if others:
            raise UserError(f"{folder} is neither empty nor a run: {others[0]} is in it. Choose another --out.")


def _clear(folder: Path) -> None:
    """Remove what a run that is begun anew makes again, and no file of somebody else's beside it."""
    if _as_it_began(folder):
        shutil.rmtree(folder / "checkpoints" / f"{0:09d}")
        for name in (f"{0:06d}", "control", "reference"):
            (folder / "images" / f"{name}.png").unlink(missing_ok=True)
    shutil.rmtree(folder / "teacher", ignore_errors=True)
    for name in ("checkpoints", "images"):
        with contextlib.suppress(OSError):  # not empty, or not there
            (folder / name).rmdir()


def _may_be_there(path: Path) -> bool:
    """Whether a file in a new run's folder is no reason to refuse it: hidden, or a log, as a sweep's of its run."""
    return path.name.startswith(".") or path.suffix == ".log" or path.name in ("log.txt", "error.txt", "tensorboard")


_OF_PROGRESS = ("scores.json", "metrics.csv")
"""Files that a run writes after its first checkpoint."""
_OF_WORTH = (*_OF_PROGRESS, "evaluations.json", "pairs.safetensors", "votes.json")
"""Files of a run of images that took time, or a person, to make."""


def _as_it_began(folder: Path) -> bool:
    """Whether a folder's run is one of images, with its model as it began alone: its command makes all of it again."""
    if steps(folder) != [0] or any((folder / name).exists() for name in _OF_WORTH):
        return False
    try:
        about = json.loads(read_bytes(folder / ABOUT))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(about, dict) and about.get("kind") == IMAGES


def _new(stem: str) -> Path:
    """A folder of its own, made here, so that two runs of the same second do not share one.

    Raises UserError where the current folder takes none.
    """
    stem = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        path = Path("runs") / f"{stem}{suffix}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"{path} cannot be written: {why}. Choose another place for it: --out FOLDER.") from error
        return path
    raise UserError(f"runs/{stem} exists a thousand times; choose another --out.")


# --- checksums -----------------------------------------------------------------------------------------------------


def verified(path: Path, say: bool = True) -> bytes:
    """The content of a file of a folder, which is as it was written: its digest is in the folder's `SHA256SUMS`.

    say: whether a folder without one is said to have none. Raises Damaged for other content, and where there is none.
    """
    folder, sums = path.parent, None
    before: tuple[dict[str, list[str]], str] | None = None
    for _ in range(_ATTEMPTS):
        sums = _read_sums(folder)
        try:
            data = read_bytes(path, None if path.suffix == ".safetensors" else SMALL)
        except OSError as error:
            raise Damaged(path, f"cannot be read: {error.strerror or error}", "") from error
        if sums is None:
            if say:
                say_once(f"{folder} has no checksums ({SUMS}; older versions wrote none): it is read unchecked.")
            return data
        found = digest(data)
        if found in sums.get(path.name, ()):
            return data
        if before == (sums, found):  # nobody is writing
            break
        before = sums, found
    if sums is None or path.name not in sums:
        raise Damaged(folder / SUMS, f"is damaged: it does not tell of {path.name}", _WITHOUT)
    if path.name in EDITED:
        raise Damaged(
            path,
            f"was changed since the run was made (its checksum in {SUMS} is another one)",
            f"On purpose? `diffrl resume {typed(folder)} --accept-changes`. Otherwise restore it from a copy.",
        )
    raise Damaged(path, f"is damaged: its checksum does not match {SUMS}")


_ATTEMPTS = 100
"""How often a file is compared with its checksum at most, while another process goes on replacing both."""


def read_json(path: Path, say: bool = True) -> Any:
    """What a JSON file of a folder holds: see `verified`. Raises Damaged where it is no JSON."""
    data = verified(path, say)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Damaged(path, f"is damaged: {first_line(error)[:200]}") from error


def read_tensors(path: Path, say: bool = True) -> "dict[str, Tensor]":
    """The tensors of a safetensors file of a folder: see `verified`. Raises Damaged where it is none."""
    import safetensors.torch

    data = verified(path, say)
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # of damaged headers: SafetensorError, KeyError, ValueError, OverflowError, TypeError
        raise Damaged(path, f"is damaged: {first_line(error)[:200]}") from error


def sealed(folder: Path) -> bool:
    """Whether the folder has checksums."""
    return (folder / SUMS).exists()


def seal(folder: Path, names: Collection[str]) -> None:
    """Write the checksums of these files, of those that there are: when they have just been written, or had none."""
    with _turn:
        there = [name for name in names if (folder / name).is_file()]
        _write_sums(folder, {name: [sha256(folder / name)] for name in there})


def write(path: Path, data: bytes) -> None:
    """Write a file of a folder, whole or not at all, with its checksum where the folder has them.

    A kill at any moment leaves a folder that can be read: for a moment, the old content and the new one are both right.
    """
    with _turn:
        sums = _read_sums(path.parent)
        if sums is not None:
            new = digest(data)
            _write_sums(path.parent, {**sums, path.name: [*sums.get(path.name, []), new]})
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)
        if sums is not None:
            _write_sums(path.parent, {**sums, path.name: [new]})


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file of a folder: see `write`."""
    write(path, json.dumps(value, indent=1).encode())


def write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    """Write a YAML file of a folder: see `write`."""
    write(path, to_yaml(values).encode())


def add(path: Path) -> None:
    """Take a file that has just been written into its folder's checksums, where the folder has them."""
    with _turn:
        sums = _read_sums(path.parent)
        if sums is not None:
            _write_sums(path.parent, {**sums, path.name: [sha256(path)]})


def accept(folder: Path) -> None:
    """Take the files that people edit (`EDITED`) as they stand now into the folder's checksums."""
    for name in EDITED:
        if sealed(folder) and (folder / name).is_file():
            try:
                verified(folder / name)
            except Damaged:
                say_once(f"{folder / name} is taken as it stands now.")
                add(folder / name)


def recorded(folder: Path) -> Collection[str]:
    """The names of the files of a folder that its `SHA256SUMS` has digests of; of a folder without one none."""
    return _read_sums(folder) or ()


_ONLY_THERE = ("metrics.csv", "evaluations.json", "distil.json", "checkpoints", "tensorboard", "model", "images")
"""Files and folders of a run that have no checksums in it, and cannot be made again."""


def spare(path: Path | None, force: bool) -> None:
    """Raise UserError where a file is there that is not to be replaced, and for an address; None: nothing is written.

    force: it is replaced, but for a part of a run or of an exported policy: what its `SHA256SUMS` names, and what only
    it has (its metrics, checkpoints, TensorBoard's files, model and images).
    """
    if path is None or not to_write(path).is_file():
        return
    if not force:
        raise UserError(f"{path} exists. Use --force to replace it.")
    place = path.resolve()
    for folder in place.parents:
        if sealed(folder) and any((folder / about).is_file() for about in (ABOUT, "config.json")):
            name = place.relative_to(folder)
            if name.parts[0] in (SUMS, *_ONLY_THERE) or name.as_posix() in recorded(folder):
                raise UserError(f"{path} is part of {folder}, which would lose it: write to another file.")


def set_aside(path: Path) -> Path:
    """Rename a damaged file, so that a new one can be begun; give its new path."""
    aside = path.with_name(f"{path.name}.damaged")
    path.replace(aside)
    with _turn:
        sums = _read_sums(path.parent)
        if sums is not None:
            _write_sums(path.parent, {name: digests for name, digests in sums.items() if name != path.name})
    return aside


def digest(data: bytes) -> str:
    """The SHA-256 digest of a file's content, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sums_text(sums: Mapping[str, Collection[str]]) -> str:
    """The text of a `SHA256SUMS` of files with these digests, by their names."""
    return "".join(f"{one}  {name}\n" for name, each in sorted(sums.items()) for one in each)


def _write_sums(folder: Path, sums: Mapping[str, Collection[str]]) -> None:
    with atomic_path(folder / SUMS) as temporary:
        temporary.write_text(sums_text(sums))


def _read_sums(folder: Path) -> dict[str, list[str]] | None:
    """The digests of a folder's files by name, of each file one, or two while it is replaced; None: it has none."""
    path = folder / SUMS
    try:
        data = read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise Damaged(path, f"cannot be read: {error.strerror or error}", "") from error
    found: dict[str, list[str]] = {}
    for line in data.decode(errors="replace").splitlines():
        one, _, name = line.partition("  ")
        if len(one) != 64 or not name:
            raise Damaged(path, "is damaged: it has a line that is no checksum", _WITHOUT)
        found.setdefault(name, []).append(one)
    return found
