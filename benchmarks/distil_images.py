"""Distilled image models: agreement, and distance to the teacher's images, against network calls; several seeds.

    python benchmarks/distil_images.py                         makes what is missing, then the table; 40 CPU minutes
    python benchmarks/distil_images.py --models tiny-digits --seeds 0
    python benchmarks/distil_images.py --no-make               the table of what is there

A cell is `diffrl distil MODEL --to WAY --calls N --seed S` with its shipped settings, a run under --out; one that was
cut goes on. Consistency models are of one call, rectified flows of two. A seed is that of the pairs, the updates and
the noise of the comparison, so that the teacher's rows, too, differ a little from seed to seed.

Agreement is the share of images that a classifier takes for what their prompts say. Distance is the root of the mean
square a pixel between images of the same noise, in [0, 1]. ± is the standard error over seeds. In bold: the calls that
the student was made for.
"""

import dataclasses
import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from asked import asked
from tables import Lines, console_of, fill, markdown, print_lines
from trees import machine, processor

from diffrl.images import distil_job
from diffrl.images.distil_config import RESULT, SETTINGS, ImageDistilConfig
from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path
from diffrl.support.machine import settle
from diffrl.support.statistics import estimate
from diffrl.support.stopping import Interrupted

PAGE = Path(__file__).resolve().parent / "results" / "distil_images.md"
CPU = "cpu_seconds.json"
"""The file in a run's folder of the CPU seconds that it took."""
Model = Literal["tiny-emoji", "tiny-digits"]
Way = Literal["consistency", "reflow"]
CALLS: dict[Way, int] = {"consistency": 1, "reflow": 2}


@dataclass(frozen=True)
class Bench:
    """Distil the built-in image models."""

    models: tuple[Model, ...] = ("tiny-emoji", "tiny-digits")
    """Which teachers."""
    ways: tuple[Way, ...] = ("consistency", "reflow")
    """Into what."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A run each."""
    steps: int = 1500
    """Updates of a run."""
    make: bool = True
    """Make what is missing; --no-make: show what is there."""
    out: Path = Path("runs/distil_images")
    """Folder of the runs."""


def folder(bench: Bench, model: Model, way: Way, seed: int) -> Path:
    """Where the run of a cell is."""
    return bench.out / f"{model}-{way}-{bench.steps}-{seed}"


def cell(bench: Bench, model: Model, way: Way, seed: int) -> dict[str, Any] | None:
    """What a run found, with its CPU seconds; made, or gone on with, where it is not whole. None: not to be made."""
    path = folder(bench, model, way, seed)
    result = path / RESULT
    if not result.exists():
        if not bench.make:
            return None
        config = ImageDistilConfig(teacher=model, to=way, calls=CALLS[way], steps=bench.steps, seed=seed)
        begun = (path / SETTINGS).exists()
        began, before = time.process_time(), seconds_of(path) if begun else 0.0
        try:
            if begun:
                distil_job.resume(path, quiet=True)
            else:
                distil_job.distil(config, out=path, quiet=True)
        finally:
            if before is not None and (path / SETTINGS).exists():  # also where it was stopped
                with atomic_path(path / CPU) as temporary:
                    temporary.write_text(json.dumps(before + time.process_time() - began))
        print(f"{path.name}: {time.process_time() - began:.0f} s", flush=True)
    return {"seed": seed, "rows": json.loads(result.read_text())["rows"], "cpu_seconds": seconds_of(path)}


def seconds_of(path: Path) -> float | None:
    """The CPU seconds that the run in a folder has taken; None where a kill left no word of them."""
    return float(json.loads((path / CPU).read_text())) if (path / CPU).exists() else None


def table(bench: Bench) -> Lines:
    """The table, a block a teacher: its own rows, over all runs' seeds, then each student's."""
    lines: Lines = [["model", "", "network calls", "agreement", "distance to the teacher's images", "CPU s"]]
    for model in bench.models:
        found = {way: [cell(bench, model, way, seed) for seed in bench.seeds] for way in bench.ways}
        there = {way: [one for one in cells if one is not None] for way, cells in found.items()}
        of_seed = {one["seed"]: one for cells in there.values() for one in cells}  # the teacher's rows are a seed's
        students = [("student", way, CALLS[way], cells) for way, cells in there.items()]
        for who, shown_as, own_calls, cells in [("teacher", "teacher", None, list(of_seed.values())), *students]:
            rows = [row for one in cells for row in one["rows"] if row["who"] == who]
            for calls in sorted({row["calls"] for row in rows}, reverse=who == "teacher"):
                own = [row for row in rows if row["calls"] == calls]
                agreement, distance = ([row[key] for row in own] for key in ("agreement", "distance"))
                shown = f"**{calls}**" if calls == own_calls else str(calls)
                timed = [one["cpu_seconds"] for one in cells if one["cpu_seconds"] is not None]
                seconds = mean(timed, 0) if timed and calls == own_calls else ""
                lines.append([model, shown_as, shown, mean(agreement, 3), mean(distance, 3), seconds])
    return lines


def mean(values: list[float], digits: int) -> str:
    """The mean over seeds, with its standard error where there are several."""
    found = estimate([[value] for value in values])
    error = f" ± {found.error:.{digits}f}" if len(values) > 1 else ""
    return f"{found.mean:.{digits}f}{error}"


def main(bench: Bench) -> int:
    """Make the cells, print the table, and put it into the page where the settings are the page's."""
    settle()
    try:
        lines = table(bench)
    except (UserError, Interrupted) as error:
        print(f"distil_images: {error}", file=sys.stderr)
        return error.exit_code
    print_lines(lines, "Distilled image models", console_of(120))
    runs = [folder(bench, *of) for of in itertools.product(bench.models, bench.ways, bench.seeds)]
    whole = all((run / RESULT).exists() for run in runs)
    if whole and bench == dataclasses.replace(Bench(), make=bench.make, out=bench.out):
        cpu, seeds = processor(machine()), " ".join(map(str, bench.seeds))
        fill(PAGE, "table", f"{markdown(lines)}\nSeeds {seeds}; {cpu}, one thread a process.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(asked(Bench, description=__doc__, config=(tyro.conf.AvoidSubcommands,))))
