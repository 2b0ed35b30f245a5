"""`diffrl resume`, of which `--resume RUN` of the other verbs is a spelling."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from diffrl.commands.words import take
from diffrl.support.errors import UserError


@dataclass(frozen=True)
class Resume:
    """Go on with a run of any kind from its newest checkpoint, bit for bit as if it had not been cut.

    Where a run acts in environments (online, dppo), each begins a new episode; all else goes on bit for bit.
    """

    run_folder: Annotated[Positional[Path], tyro.conf.arg(name="run", metavar="RUN")]
    """The run's folder."""
    steps: int | None = None
    """Steps in all, to make the run longer; by default what it was made for. Of a run of images: images scored (or
    rounds, for an algorithm that scores none)."""
    device: str | None = None
    """Another device than the run's."""
    eval_workers: int | None = None
    """Offline runs: another number of processes that evaluate than the run's; no score depends on it."""
    stop_kl: float | None = None
    """Runs of images: another bound than the run's, where that has stopped it."""


def run(arguments: Sequence[str]) -> int:
    """Parse what stands after `diffrl resume` and do it."""
    words = list(arguments)
    if not words:
        raise UserError("Which run? `diffrl resume RUN`, such as runs/NAME; `diffrl resume --help` shows more.")
    given = tyro.cli(Resume, args=words, prog="diffrl resume")
    from diffrl.runs.resume import resume
    from diffrl.runs.run import IMAGES, kind_of

    if kind_of(given.run_folder) == IMAGES:
        from diffrl.commands.finetune import spread
        from diffrl.images.run import FinetuneRun

        if spread(FinetuneRun.read(given.run_folder).config.processes, ["resume", *words]):
            return 0
    resume(
        given.run_folder,
        steps=given.steps,
        device=given.device,
        eval_workers=given.eval_workers,
        stop_kl=given.stop_kl,
    )
    return 0


def asked(words: Sequence[str]) -> bool:
    """Whether a verb's words are the old spelling, `--resume RUN ...`."""
    return any(word.split("=")[0] == "--resume" for word in words)


def spelled(words: Sequence[str], online: bool = False) -> int:
    """Do what `--resume RUN ...` says after another verb. online: which is for online runs alone."""
    rest = list(words)
    folder = take(rest, "--resume")
    if {"-h", "--help"} & set(words) or folder is None:
        return run(["--help"])
    if online:
        from diffrl.runs.run import OFFLINE, kind_of

        if kind_of(folder) == OFFLINE:
            raise UserError(
                f"{folder} is an offline run: `diffrl resume {folder}` goes on with it offline, "
                f"`diffrl online {folder}` in its environment."
            )
    return run([folder, *rest])
