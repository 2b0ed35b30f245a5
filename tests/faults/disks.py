"""Full disks: a run on a small tmpfs that fills up at one write after another, and goes on once there is room.

    python -m tests.faults.disks WORK RESULTS.jsonl CASES [NAME ...]

The file system is mounted in a namespace of this process alone (of a user's own where it is not root's), and is gone
with it. Where the kernel grants neither, it exits with 3: nothing is simulated.
"""

import ctypes
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import unchanged_digests

from tests.faults import forked, sound

NOT_POSSIBLE = 3
"""The exit code where no file system can be mounted."""
_PAGE = 4096
_AMPLE = 256 * 2**20
_NEW_MOUNTS, _NEW_USER, _PRIVATE, _REMOUNT = 0x20000, 0x10000000, 0x44000, 32

WORDS: dict[str, tuple[str, str | None, str]] = {
    "train": (sound.RUNS["train"].replace("--out train", "--out disk/train"), "resume disk/train", "train"),
    "augment": (f"{sound.AUGMENT} --samples 2000".replace("--out ", "--out disk/"), None, "new.hdf5"),
    "nft": (sound.RUNS["nft"].replace("--out nft", "--out disk/nft"), "resume disk/nft", "nft"),
    "distil": (sound.RUNS["distil"].replace("--out distil", "--out disk/distil"), "resume disk/distil", "distil"),
    "finetune": (sound.RUNS["images"].replace("--out images", "--out disk/images"), "resume disk/images", "images"),
    "generate": ("data generate maze2d-umaze-v1 --rows 2000 --output disk/maze.hdf5", None, "maze.hdf5"),
    "convert": (f"data convert {sound.DATA} disk/copy.hdf5", None, "copy.hdf5"),
}
"""By name: the words after `diffrl`, how it is resumed, and what is written."""


@dataclass(frozen=True)
class Filled:
    """What became of a command on a disk with little room."""

    name: str
    room: int
    """Bytes."""
    became: str
    """One of `forked.CLASSES`: a clear error, or an equal load where the room was enough."""
    then: str
    """"equal", "unequal" or "stuck": once there was room."""
    said: str


def enter() -> bool:
    """Give this process mounts of its own; whether that was possible."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(_NEW_MOUNTS | (0 if user == 0 else _NEW_USER)) != 0:
        return False
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    return bool(libc.mount(None, b"/", None, _PRIVATE, None) == 0)


class Disk:
    """A file system in memory, at a path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._libc = ctypes.CDLL(None, use_errno=True)

    def mount(self, size: int, flags: int = 0) -> None:
        """Of so many bytes; with `_REMOUNT`, that it has from now on."""
        self.path.mkdir(exist_ok=True)
        options = f"size={size}".encode()
        if self._libc.mount(b"tmpfs", os.fsencode(self.path), b"tmpfs", flags, options) != 0:
            raise OSError(ctypes.get_errno(), f"tmpfs cannot be mounted at {self.path}")

    def unmount(self) -> None:
        """Away with it, and what is on it."""
        self._libc.umount2(os.fsencode(self.path), 2)

    @property
    def used(self) -> int:
        """Bytes."""
        about = os.statvfs(self.path)
        return (about.f_blocks - about.f_bfree) * about.f_frsize


class Filler:
    """Runs commands on small disks."""

    def __init__(self, work: Path) -> None:
        self._folder = work.resolve() / "full"
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        sound.preload()
        source = sound.build(work.resolve() / "sound", ("train", "diffusion", "images"))
        shutil.copytree(source / "diffusion", self._folder / "diffusion")
        for name in (sound.DATA, sound.WIDE):
            shutil.copyfile(source / name, self._folder / name)
        self._disk = Disk(self._folder / "disk")

    def whole(self, name: str) -> tuple[Any, int]:
        """What a command writes where there is room, and the bytes that it takes."""
        self._disk.mount(_AMPLE)
        try:
            done = forked.run(WORDS[name][0].split(), self._folder, seconds=60)
            if done.ended != "0":
                raise RuntimeError(f"diffrl {WORDS[name][0]}: {done.ended}\n{done.output[-2000:]}")
            return self._digests(name), self._disk.used
        finally:
            self._disk.unmount()

    def fill(self, name: str, room: int, whole: Any) -> Filled:
        """A command where there is so much room; and then, where there is enough."""
        begin, resume, _ = WORDS[name]
        self._disk.mount(room)
        try:
            first = forked.run(begin.split(), self._folder, look=lambda: True)
            became = first.classify(True)
            self._disk.mount(_AMPLE, _REMOUNT)
            then, said = ("equal" if self._digests(name) == whole else "unequal"), first.output[-500:]
            if became != forked.EQUAL:
                again = forked.run(resume.split(), self._folder, seconds=60) if resume else first
                if again.ended != "0":
                    again = forked.run(begin.split(), self._folder, seconds=60)
                if again.ended != "0":
                    then, said = "stuck", f"{said}\nthen: {again.where} {again.output[-500:]}"
                else:
                    then = "equal" if self._digests(name) == whole else "unequal"
            return Filled(name, room, became, then, f"{first.where} {said}")
        finally:
            self._disk.unmount()

    def _digests(self, name: str) -> Any:
        path = self._disk.path / WORDS[name][2]
        try:
            return unchanged_digests.of_folder(path) if path.is_dir() else unchanged_digests.of_file(path)
        except (OSError, ValueError):  # half a file
            return None


def main(work: str, to: str, cases: str, *names: str) -> None:
    """Fill disks: of each command, so many sizes that they end at one write after another."""
    if not enter():
        sys.exit(NOT_POSSIBLE)
    filler, chosen = Filler(Path(work)), names or tuple(WORDS)
    each = max(int(cases) // len(chosen), 1)
    with Path(to).open("w") as file:
        for name in chosen:
            whole, used = filler.whole(name)
            pages = used // _PAGE + 1
            for i in range(each):
                room = _PAGE * max(1, round(pages * (i + 1) / (each + 1)))
                file.write(json.dumps(asdict(filler.fill(name, room, whole))) + "\n")
                file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
