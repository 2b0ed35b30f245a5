"""`diffrl resume`, of which `--resume RUN` of the other verbs is a spelling."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from diffrl.commands.words import parse, take
from diffrl.support.errors import UserError
from diffrl.support.files import to_write, typed

if TYPE_CHECKING:
    from diffrl.images.config import FinetuneConfig


@dataclass(frozen=True)
class Resume:
    """Go on with a run of any kind from its newest checkpoint, bit for bit as if it had not been cut.

    A run that has made all its steps is left as it is, with exit code 0.
    Where a run learns by acting (online, dppo, nft), each environment begins a new episode, so that it is the uncut
    run's equal only where a checkpoint ends the episodes; all else goes on bit for bit.
    """

    run_folder: Annotated[Positional[Path], tyro.conf.arg(name="run", metavar="RUN")]
    """The run's folder."""
    steps: int | None = None
    """Steps in all, to make the run longer, or to end it sooner; by default what it was made for. A run of images
    counts the images that are scored; of dpo and supervised, rounds."""
    queries: int | None = None
    """Runs of images that count the images scored: the same as --steps, by its name in `diffrl finetune` and with its
    default."""
    rounds: int | None = None
    """Runs of images by dpo and supervised: the same as --steps, by its name in `diffrl finetune` and with its
    default."""
    device: str | None = None
    """Another device than the run's, which is the default."""
    eval_workers: int | None = None
    """Offline runs: another number of processes that evaluate than the run's, which is the default; no score depends on
    it."""
    stop_kl: float | None = None
    """Runs of images: another bound than the run's, which is the default, where that has stopped it."""
    dataset: str | None = None
    """Where the run's data set is now, if it has moved; its contents must be the same. By default where it was. A
    finished run is only told."""
    accept_changes: bool = False
    """Take config.yaml (or settings.yaml, finetune.yaml) as you have edited it since the run was made; of a run of
    images not what its evaluations measure by (docs/runs.md)."""


def run(arguments: Sequence[str]) -> int:
    """Parse what stands after `diffrl resume` and do it."""
    words = list(arguments)
    if not words:
        raise UserError("Which run? `diffrl resume RUN`, such as runs/NAME; `diffrl resume --help` shows more.")
    given = parse(Resume, words, "diffrl resume")
    to_write(given.run_folder, "runs")
    _refuse_sweep(given.run_folder)
    from diffrl.runs.kind import kind_of
    from diffrl.runs.resume import resume, take_edited
    from diffrl.support import folder

    accepting = given.accept_changes and "WORLD_SIZE" not in os.environ  # else the process that started this one did
    steps, names = given.steps, {"--queries": given.queries, "--rounds": given.rounds}
    if kind_of(given.run_folder) == folder.IMAGES:
        from diffrl.commands.finetune import spread
        from diffrl.images.comparable import require_to
        from diffrl.images.run import FinetuneRun
        from diffrl.images.saved import is_whole

        if accepting:
            take_edited(given.run_folder, folder.IMAGES)
            accepting = False
        found = FinetuneRun.read(given.run_folder)
        steps = _in_all(steps, names, found.config)
        processes, config = found.config.processes, found.asked(steps)
        if processes > 1 and not is_whole(found, config):
            require_to(found, config)  # said once, and not by each process
            if spread(processes, ["resume", *words]):
                return 0
    elif told := next((name for name, value in names.items() if value is not None), None):
        raise UserError(f"{told} is for runs of images, and {given.run_folder} is none: give --steps.")
    resume(
        given.run_folder,
        steps=steps,
        device=given.device,
        eval_workers=given.eval_workers,
        stop_kl=given.stop_kl,
        dataset=given.dataset,
        accept_changes=accepting,
    )
    return 0


def _refuse_sweep(path: Path) -> None:
    """Raise UserError for a sweep's folder, which has runs in it and is none."""
    from diffrl.support.folder import ABOUT, SWEEP

    if not (path / SWEEP).is_file() or (path / ABOUT).exists():
        return
    inside = min((str(about.parent) for about in path.glob(f"*/{ABOUT}")), default=None)
    one = "" if inside is None else f" `diffrl resume {typed(inside)}` goes on with one of them."
    raise UserError(
        f"{path} is a sweep's folder, not a run's: `diffrl sweep --out {typed(path)}` goes on with all its runs.{one}"
    )


def _in_all(steps: int | None, names: Mapping[str, int | None], config: FinetuneConfig) -> int | None:
    """What a run of images is to reach in all: `steps`, or what was given by its own `names`, --queries and --rounds.

    Raises UserError for a name that the run's algorithm does not count by, and for two numbers.
    """
    from diffrl.images.config.base import flag

    for name, value in names.items():
        if value is None:
            continue
        if name != flag(config.counts):
            scores = "runs by the images it scores" if config.counts == "queries" else "scores no images as it goes on"
            raise UserError(f"{config.algo} {scores}: give {flag(config.counts)}.")
        if steps is not None:
            raise UserError(f"--steps and {name} are the same: give one of them.")
        steps = value
    return steps


def asked(words: Sequence[str]) -> bool:
    """Whether a verb's words are the old spelling, `--resume RUN ...`."""
    return any(word.split("=")[0] == "--resume" for word in words)


def spelled(words: Sequence[str], online: bool = False) -> int:
    """Do what `--resume RUN ...` says after another verb. online: that verb is for online runs alone."""
    rest = list(words)
    folder = take(rest, "--resume")
    if {"-h", "--help"} & set(words) or folder is None:
        return run(["--help"])
    if online:
        from diffrl.runs.kind import OFFLINE, kind_of

        if kind_of(folder) == OFFLINE:
            raise UserError(
                f"{folder} is an offline run: `diffrl resume {typed(folder)}` goes on with it offline, "
                f"`diffrl online {typed(folder)}` in its environment."
            )
    return run([folder, *rest])
