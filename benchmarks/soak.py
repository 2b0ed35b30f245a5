"""A long run, watched: are memory and open files flat?

    python benchmarks/soak.py --hours 2           trains, samples, and writes benchmarks/results/soak.md
    python benchmarks/soak.py --hours 0.05        a few minutes, printed and not recorded

Behaviour cloning with a tiny network on a made pendulum's data, so that what is not training is most of it: an
evaluation, a checkpoint and TensorBoard events several times a second. Resident memory and open files of the process
and of those that it has started are read from /proc. What is stated is the slope of a straight line through the
samples after the first tenth (imports, first evaluations), with its standard error, and what it makes of a day.
"""

import contextlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asked import asked
from trees import ROOT, environment, machine, processor
from unchanged_inputs import write_pendulum

from diffrl.support.files import atomic_path
from diffrl.support.schema import Positive, check

PAGE = ROOT / "benchmarks" / "results" / "soak.md"
LEFT_OUT = 0.1
"""The share of the time that is no part of the slope."""
FLAT = 64.0
"""MB a day: a slope below it, or one that is within twice its standard error of 0, counts as flat."""
WORDS = (
    "train --agent bc --dataset data.hdf5 --env Pendulum-v1 --workers 1 --eval-workers 0 --no-compile "
    "--steps 1000000000 --eval-every 100 --eval-episodes 1 --log-every 10 --seeds 0 --agent.width 8 --agent.layers 1 "
    "--agent.batch-size 16 --out run"
)


@dataclass(frozen=True)
class Soak:
    """Train for hours and watch memory and open files."""

    hours: Positive = 2.0
    """How long."""
    every: Positive = 5.0
    """Seconds between samples."""

    def __post_init__(self) -> None:
        check(self)

    def run(self) -> int:
        """Do it. Gives 1 where something grows, or the run ended of itself."""
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            samples, steps, code = watched(Path(folder), 3600 * self.hours, self.every)
        if code not in (0, 130, 143, -signal.SIGTERM, -signal.SIGINT) or len(samples) < 10:
            print(f"soak: the run ended with {code} after {len(samples)} samples", file=sys.stderr)
            return 1
        text, flat = stated(samples, steps)
        print(text)
        if self.hours >= 1:
            about = machine()
            said = f"{about['git']}, {processor(about)}, torch {about['torch']}"
            with atomic_path(PAGE) as to:
                to.write_text(f"# Soak\n\n`python benchmarks/soak.py --hours {self.hours:g}` ({said}):\n\n{text}\n")
        return int(not flat)


Sample = tuple[float, float, int, int]
"""Seconds since the start, MB resident, open files, processes."""


def watched(folder: Path, seconds: float, every: float) -> tuple[list[Sample], int, int]:
    """The samples of a run of so many seconds in a folder, the steps it made, and its exit code when told to stop."""
    write_pendulum(folder / "data.hdf5")
    command = [sys.executable, "-m", "diffrl", *WORDS.split()]
    samples: list[Sample] = []
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment(ROOT), stdout=log, stderr=log)
        began = time.monotonic()
        try:
            while time.monotonic() - began < seconds and process.poll() is None:
                time.sleep(every)
                if (folder / "run" / "scores.json").exists():  # it has begun
                    samples.append((time.monotonic() - began, *_of_processes(process.pid)))
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(60)
    made = sorted((folder / "run" / "checkpoints").glob("[0-9]*"))
    if not samples:
        print((folder / "log").read_text()[-2000:], file=sys.stderr)
    return samples, int(made[-1].name) if made else 0, code


def _of_processes(root: int) -> tuple[float, int, int]:
    """MB resident, open files and the number of a process and its descendants."""
    resident, files, found, waiting = 0.0, 0, 0, [root]
    while waiting:
        folder = Path(f"/proc/{waiting.pop()}")
        with contextlib.suppress(OSError, IndexError):  # it may have ended
            resident += int((folder / "status").read_text().split("VmRSS:")[1].split()[0]) / 1024
            files += len(list((folder / "fd").iterdir()))
            found += 1
            for task in (folder / "task").iterdir():
                waiting += [int(pid) for pid in (task / "children").read_text().split()]
    return resident, files, found


def slope(times: list[float], values: list[float]) -> tuple[float, float]:
    """The slope of the straight line of least squares, and its standard error."""
    line = statistics.linear_regression(times, values)
    n, mean = len(times), statistics.fmean(times)
    spread = sum((t - mean) ** 2 for t in times)
    rest = sum((v - line.intercept - line.slope * t) ** 2 for t, v in zip(times, values, strict=True))
    return line.slope, (rest / (n - 2) / spread) ** 0.5


def stated(samples: list[Sample], steps: int) -> tuple[str, bool]:
    """What is said of the samples, as Markdown; and whether all is flat."""
    last = samples[-1][0]
    kept = [sample for sample in samples if sample[0] >= LEFT_OUT * last]
    lines = ["| | at first | at last | largest | a day, by the slope | |", "|---|---|---|---|---|---|"]
    flat = True
    for name, i, unit in (("resident memory", 1, "MB"), ("open files", 2, "")):
        values: list[Any] = [float(sample[i]) for sample in kept]
        a_second, error = slope([sample[0] for sample in kept], values)
        day, spread = 86_400 * a_second, 86_400 * error
        good = day < (FLAT if i == 1 else 1.0) or abs(day) < 2 * spread
        flat &= good
        cells = (f"{values[0]:.0f} {unit}", f"{values[-1]:.0f} {unit}", f"{max(values):.0f} {unit}")
        lines.append(
            f"| {name} | {' | '.join(cells)} | {day:+.1f} ± {spread:.1f} {unit} | {'flat' if good else 'GROWS'} |"
        )
    hours = f"{last / 3600:.2f} hours, {steps:,} steps, {steps // 100:,} evaluations and checkpoints"
    return "\n".join([f"{hours}; {len(samples)} samples.", "", *lines]), flat


if __name__ == "__main__":
    sys.exit(asked(Soak, description=__doc__).run())
