"""Going on with a run of any kind from its newest checkpoint."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffrl.runs import kind as kinds
from diffrl.support import folder, schema
from diffrl.support.console import console
from diffrl.support.errors import UserError
from diffrl.support.files import to_write
from diffrl.support.folder import IMAGES, IMAGES_DISTIL, held
from diffrl.support.machine import usual_torch
from diffrl.support.schema import Count, Natural, PositiveLimit
from diffrl.tuning import config as tuning
from diffrl.tuning.distil_config import DISTIL

if TYPE_CHECKING:
    from diffrl.runs.run import Run


@usual_torch()
def resume(
    path: Path | str,
    *,
    steps: int | None = None,
    device: str | None = None,
    eval_workers: int | None = None,
    stop_kl: float | None = None,
    dataset: str | None = None,
    accept_changes: bool = False,
    quiet: bool = False,
) -> Path:
    """Go on with a run, bit for bit as if it had not been cut, to `steps` steps in all; give its folder.

    steps: by default what the run was made for; of a run of images in what its algorithm counts by, images scored or
    rounds. device: another than the run's. eval_workers: for an offline run, another number than its own, on which no
    score depends. stop_kl: for a run of images that stopped at its own, another bound. Where a run acts in
    environments, each begins a new episode. dataset: where the run's data are now; their contents must be the same; a
    run that has made all its steps is only told so.
    accept_changes: take config.yaml, or another file of settings, as it was edited since the run was made; of a run of
    images not what its evaluations measure by, such as the seed or the reward.

    A run that has made all its steps is left as it is, which is said. One may end at fewer steps than it was made for,
    but not at fewer than it has made. Raises UserError where the run cannot go on so, and where another process is
    working in its folder.
    """
    given = (steps, "steps", Count), (eval_workers, "eval_workers", Natural), (stop_kl, "stop_kl", PositiveLimit)
    steps, eval_workers, stop_kl, device, dataset = (
        schema.held(value, expected | None, name)
        for value, name, expected in (*given, (device, "device", str), (dataset, "dataset", str))
    )
    path = to_write(path, "runs")
    kind = kinds.kind_of(path)
    if kind not in (IMAGES, IMAGES_DISTIL) and not folder.steps(path):  # of images, some begin anew
        raise UserError(folder.without_checkpoint(path))
    if accept_changes:
        take_edited(path, kind)
    if stop_kl is not None and kind != IMAGES:
        raise UserError(f"--stop-kl is for runs that fine-tune image models, and {path} is none.")
    if eval_workers is not None and kind != kinds.OFFLINE:
        raise UserError(f"--eval-workers is for offline runs, and {path} is evaluated in the process that trains.")
    options: dict[str, Any] = {"steps": steps, "device": device, "quiet": quiet}
    if kind == IMAGES:
        if dataset is not None:
            raise UserError(f"--dataset is for runs that learn from a data set, and {path} is one of images.")
        from diffrl.images.run import FinetuneRun, print_run
        from diffrl.images.saved import gone_for_good, is_whole

        finished = FinetuneRun.read(path)
        config = finished.asked(steps)
        folder.refuse_fewer(path, config.rounds, "rounds", config.unit)
        changed = stop_kl is not None or device is not None or "WORLD_SIZE" in os.environ
        if not changed and is_whole(finished, config):  # shown without torch and without its model
            with held(path):
                if not quiet:
                    if steps is not None and config.plan:
                        console.print(f"{config.plan}.")
                    console.print(folder.all_done(path, config.rounds, "rounds", unit=config.unit), markup=False)
                    if gone := gone_for_good(finished, config.rounds):
                        console.print(gone, markup=False)
                    print_run(finished)
            return path
        from diffrl.images import job

        return job.resume(path, stop_kl=stop_kl, **options)
    if kind in (kinds.OFFLINE, kinds.ONLINE, IMAGES_DISTIL):  # others round their steps up
        folder.refuse_fewer(path, steps)
    if kind == IMAGES_DISTIL:
        if dataset is not None:
            raise UserError(f"--dataset is for runs that learn from a data set, and {path} is one of images.")
        from diffrl.images import distil_job

        return distil_job.resume(path, **options)
    from diffrl.runs.run import Run

    with held(path):
        run = Run.read(path)
        from diffrl.runs.train import Complete, moved

        if dataset is not None:
            run = moved(run, dataset, quiet)
        if not quiet and (other := run.other_package()):
            console.print(other, style="yellow", markup=False, highlight=False)
        done = max(folder.steps(path), default=0)
        if steps is not None and done < steps < run.config.steps and not quiet:
            console.print(folder.ends_sooner(path, run.config.steps, steps), markup=False)
        try:
            return _resume(run, eval_workers, options)
        except Complete as complete:
            if not quiet:
                console.print(str(complete), markup=False)
            return path


def take_edited(path: Path, kind: str) -> None:
    """Take the settings of a run of this kind as they were edited. Raises UserError where that may not be."""
    if not path.is_dir():
        return
    with held(path):
        if kind == IMAGES:
            from diffrl.images.comparable import accept

            accept(path)
        else:
            folder.accept(path)


def _resume(run: "Run", eval_workers: int | None, options: dict[str, Any]) -> Path:
    """Go on with a run that learns from a data set, whatever its kind."""
    if run.kind == kinds.OFFLINE:
        from diffrl.runs.train import resume_offline

        return resume_offline(run, eval_workers=eval_workers, **options)
    if run.kind == kinds.ONLINE:
        from diffrl.runs.online import resume_online

        return resume_online(run, **options)
    if run.kind in tuning.ALGORITHMS:
        from diffrl.runs.tune import resume_tuning

        return resume_tuning(run, **options)
    if run.kind == DISTIL:
        from diffrl.runs.distil import resume_distil

        return resume_distil(run, **options)
    raise UserError(f"{run.path} is a run of the kind {run.kind!r}, which this version of diffrl does not know.")
