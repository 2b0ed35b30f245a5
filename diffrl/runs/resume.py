"""Going on with a run of any kind from its newest checkpoint."""

from pathlib import Path
from typing import Any

from diffrl.runs import run as kinds
from diffrl.runs.run import Run
from diffrl.support import folder
from diffrl.support.errors import UserError
from diffrl.support.files import to_write
from diffrl.support.folder import held
from diffrl.tuning import config as tuning
from diffrl.tuning.distil_config import DISTIL


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
    environments, each begins a new episode. dataset: where the run's data are now; their contents must be the same.
    accept_changes: take config.yaml, or another file of settings, as it was edited since the run was made.

    Raises UserError where the run cannot go on so, and where another process is working in its folder.
    """
    path = to_write(path, "runs")
    if accept_changes and path.is_dir():
        with held(path):
            folder.accept(path)
    kind = kinds.kind_of(path)
    if stop_kl is not None and kind != kinds.IMAGES:
        raise UserError(f"--stop-kl is for runs that fine-tune image models, and {path} is none.")
    if eval_workers is not None and kind != kinds.OFFLINE:
        raise UserError(f"--eval-workers is for offline runs, and {path} is evaluated in the process that trains.")
    options: dict[str, Any] = {"steps": steps, "device": device, "quiet": quiet}
    if kind == kinds.IMAGES:
        if dataset is not None:
            raise UserError(f"--dataset is for runs that learn from a data set, and {path} is one of images.")
        from diffrl.images import job

        return job.resume(path, stop_kl=stop_kl, **options)
    if kind == kinds.IMAGES_DISTIL:
        if dataset is not None:
            raise UserError(f"--dataset is for runs that learn from a data set, and {path} is one of images.")
        from diffrl.images import distil_job

        return distil_job.resume(path, **options)
    with held(path):
        run = Run.read(path)
        if dataset is not None:
            from diffrl.runs.train import moved

            run = moved(run, dataset, quiet)
        if kind == kinds.OFFLINE:
            from diffrl.runs.train import resume_offline

            return resume_offline(run, eval_workers=eval_workers, **options)
        if kind == kinds.ONLINE:
            from diffrl.runs.online import resume_online

            return resume_online(run, **options)
        if kind in tuning.ALGORITHMS:
            from diffrl.runs.tune import resume_tuning

            return resume_tuning(run, **options)
        if kind == DISTIL:
            from diffrl.runs.distil import resume_distil

            return resume_distil(run, **options)
    raise UserError(f"{path} is a run of the kind {kind!r}, which this version of diffrl does not know.")
