"""Checkpoints that travel: a run's folder with its newest checkpoint, as a tar in parts of a size that comes back."""

import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from kinds import SESSIONS, newest_step

PART = 15 * 2**20
"""Bytes of a part: a file that comes back has at most 16 MiB."""
_NEVER_CHANGE = ("config.yaml", "run.json", "preprocessing.safetensors", "SHA256SUMS")
RUN_FILES = (*_NEVER_CHANGE, "scores.json", "metrics.csv", SESSIONS)


def files_of(run: Path) -> list[Path]:
    """What a run goes on from: all but older checkpoints, TensorBoard's events and pictures."""
    step = newest_step(run)
    checkpoint = [] if step is None else sorted((run / "checkpoints" / f"{step:09d}").iterdir())
    return [run / name for name in RUN_FILES if (run / name).exists()] + checkpoint


def size_of(run: Path) -> int:
    """Bytes of its tar: files in blocks of 512 with a header each, the whole in records of 10,240."""
    blocks = sum(1024 + path.stat().st_size + 511 for path in files_of(run))
    return (blocks // tarfile.RECORDSIZE + 2) * tarfile.RECORDSIZE


def pack(run: Path, out: Path, part: int = PART) -> list[Path]:
    """Write `out`/checkpoints-RUN.tar.00, .01, ... and give them."""
    splitter = _Splitter(out / f"checkpoints-{run.name}.tar", part)
    with tarfile.open(fileobj=splitter, mode="w|") as archive:
        for path in files_of(run):
            archive.add(path, str(path.relative_to(run.parent)))
    splitter.close()
    return splitter.parts


def restore(folder: Path, runs: Path) -> Iterator[str]:
    """Unpack what `pack` left in `folder` into `runs`; give the names. A run that is as far already is left alone."""
    for name in sorted({path.name.rsplit(".", 1)[0] for path in folder.glob("checkpoints-*.tar.[0-9][0-9]")}):
        with tempfile.TemporaryFile() as whole, tempfile.TemporaryDirectory(dir=runs) as temporary:
            for path in sorted(folder.glob(f"{name}.[0-9][0-9]")):
                whole.write(path.read_bytes())
            whole.seek(0)
            with tarfile.open(fileobj=whole) as archive:
                archive.extractall(temporary, filter="data")
            for packed in Path(temporary).iterdir():
                target = runs / packed.name
                if (newest_step(target) or 0) >= (newest_step(packed) or 0):
                    continue
                if target.exists():
                    target.replace(Path(temporary) / ".older")
                packed.replace(target)
                yield target.name


class _Splitter:
    """A file to write to, which goes on in the next file when one is full."""

    def __init__(self, stem: Path, size: int) -> None:
        self._stem, self._size, self._left = stem, size, 0
        self._file: BinaryIO | None = None
        self.parts: list[Path] = []

    def write(self, data: bytes) -> int:
        """Append."""
        rest = memoryview(data)
        while rest:
            if self._file is None or not self._left:
                self.close()
                self.parts.append(self._stem.with_name(f"{self._stem.name}.{len(self.parts):02d}"))
                self._file, self._left = self.parts[-1].open("wb"), self._size
            n = self._file.write(rest[: self._left])
            self._left -= n
            rest = rest[n:]
        return len(data)

    def close(self) -> None:
        """Close the file at hand."""
        if self._file is not None:
            self._file.close()
        self._file = None
