"""`diffrl doctor` on a full tmpfs, and the command that it recommends: `python -m tests.doctor_on_a_full_disk WORK`.

The file system is mounted in a namespace of this process alone. Where the kernel grants none, it exits with 3. Prints
what the doctor prints; the run is below WORK, as the user's home is.
"""

import contextlib
import io
import os
import shlex
import sys
from pathlib import Path

from diffrl.cli import main
from tests.faults import disks

SMALL = "--steps 2 --eval-every 2 --eval-episodes 1 --seeds 0 --rows 2000 --workers 1 --eval-workers 0 --no-compile"


def run(work: Path) -> int:
    """The exit code of what is recommended, made small."""
    if not disks.enter():
        return disks.NOT_POSSIBLE
    disk = disks.Disk(work / "disk")
    disk.mount(1 << 16)
    try:
        with contextlib.suppress(OSError), (disk.path / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(1 << 12)):
                pass
        os.chdir(disk.path)
        os.environ |= {"HOME": str(work), "COLUMNS": "200", "DIFFRL_CACHE": str(disk.path / "cache")}
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(disk.path / "compiled")
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            main(["doctor", "--no-rendering"])
        print(said.getvalue())
        _, *words = shlex.split(said.getvalue().splitlines()[-1])
        return main([*words, *SMALL.split()])
    finally:
        os.chdir("/")
        disk.unmount()


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))
