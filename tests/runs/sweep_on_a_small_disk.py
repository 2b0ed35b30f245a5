"""A sweep on a tmpfs of little room, and again where there is enough: `python -m ... WORK ROOM`. Prints what was said.

The file system is mounted in a namespace of this process alone. Where the kernel grants none, it exits with 3.
"""

import contextlib
import io
import shutil
import sys
from pathlib import Path

from diffrl.cli import main
from tests.faults import disks
from tests.runs.sweep_cases import GRID

AMPLE = 64 * 2**20


def run(work: Path, room: int) -> int:
    """Leaves the sweep's folder at WORK/s."""
    if not disks.enter():
        return disks.NOT_POSSIBLE
    disk = disks.Disk(work / "disk")
    disk.mount(room)
    out = str(disk.path / "s")
    try:
        codes = []
        for words in (["sweep", *GRID, "--out", out], ["sweep", *GRID, "--out", out]):
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                codes.append(main(words))
            print(codes[-1], said.getvalue().strip().splitlines()[-1] if codes[-1] else "done")
            disk.mount(AMPLE, disks._REMOUNT)
        shutil.copytree(out, work / "s")
        return codes[-1]
    finally:
        disk.unmount()


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), int(sys.argv[2])))
